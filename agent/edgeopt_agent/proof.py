# SPDX-License-Identifier: Apache-2.0
"""Whether a variant still gives its golden outputs: loaded afresh in the probe's process, and as it serves in this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt_agent import golden
from edgeopt_agent.model import LoadedModel
from edgeopt_agent.probe import ProbeRequest
from edgeopt_wire.errors import EdgeoptError, RuntimeFailure
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.measurement import Measurement

if TYPE_CHECKING:
    import numpy as np

UNTOLD = frozenset({"memory", "timeout"})
"""Kinds of failure (`probe.Failure`) that say more of the moment than of the variant."""

Infer = Callable[[str, Mapping[str, "np.ndarray"]], "tuple[LoadedModel, dict[str, np.ndarray]]"]


@dataclass(frozen=True)
class Proof:
    """`is_right` is None where it could not be told."""

    is_right: bool | None
    why: str = ""
    sqnr_db: float | None = None


def prove_loaded(probe: Callable[[ProbeRequest], Measurement], request: ProbeRequest) -> Proof:
    """Load a variant in the probe's process, compare it with its golden outputs, and run it once more than that."""
    quick = ProbeRequest(
        folder=request.folder,
        variant=request.variant,
        package_sha256=request.package_sha256,
        device_id=request.device_id,
        device_class=request.device_class,
        stand_in_for=request.stand_in_for,
        warmup_ns=0,
        minimum_runs=1,
        minimum_ns=0,
        maximum_ns=0,
    )
    found = probe(quick)
    if found.extra.get("failure") in UNTOLD:
        return Proof(None, found.error)
    if found.error:
        return Proof(False, found.error)
    why = "" if found.golden_ok else next(iter(found.warnings), "the outputs are not the golden ones")
    return Proof(found.golden_ok, why, found.golden_sqnr_db)


def prove_served(infer: Infer, folder: Path, manifest: Manifest, variant_id: str) -> Proof:
    """Compare what serves in this process with its golden outputs, sample by sample, among other requests."""
    variant = manifest.variant(variant_id)
    if not variant.golden:
        return Proof(None, "the variant has no golden outputs")
    try:
        expected = golden.load_outputs(folder, manifest, variant)
        found = []
        for sample in golden.load_inputs(folder, manifest):
            loaded, outputs = infer(manifest.name, sample)
            if (loaded.manifest.version, loaded.variant.id) != (manifest.version, variant_id):
                return Proof(None, f"{loaded.manifest.version} {loaded.variant.id} serves")
            found.append(outputs)
        compared = golden.compare(expected, found, min_sqnr_db=variant.min_sqnr_db)
    except RuntimeFailure as error:
        return Proof(False, str(error))
    except EdgeoptError as error:  # it does not serve, is too busy, or its samples cannot be read
        return Proof(None, str(error))
    return Proof(compared.is_ok, compared.reason, compared.sqnr_db)
