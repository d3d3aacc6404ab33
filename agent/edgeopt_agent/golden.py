# SPDX-License-Identifier: Apache-2.0
"""Golden samples: inputs in a package, and the outputs that a variant gave on the machine that built it.

Rules:
- Everything is in the signature's space; inputs are cast to the signature's dtype, outputs are float32.
- `outputs are good` means: bit-identical, or SQNR >= the variant's `min_sqnr_db` over all outputs and samples.
- Something that is not a number, where the golden output is one, is never good.

SQNR = 10 log10(sum golden^2 / sum (golden - found)^2), in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt_wire.archive import safe_path
from edgeopt_wire.errors import StoreError
from edgeopt_wire.manifest import Manifest, Variant
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Comparison:
    """How close outputs came to the golden ones. `sqnr_db` is None where it is infinite or no number."""

    is_ok: bool
    is_exact: bool
    sqnr_db: float | None
    reason: str = ""


def load_inputs(folder: Path, manifest: Manifest) -> list[dict[str, np.ndarray]]:
    """Return the golden samples, each one batch by the signature's input names.

    Raises:
        StoreError: They are missing, damaged or do not fit the signature.
    """
    return _load(folder / safe_path(manifest.golden_inputs), manifest.signature_inputs)


def load_outputs(folder: Path, manifest: Manifest, variant: Variant) -> list[dict[str, np.ndarray]]:
    """Return the variant's golden outputs, one entry for each golden sample.

    Raises:
        StoreError: They are missing, damaged or do not fit the signature.
    """
    specs = [TensorSpec(spec.name, spec.shape, "float32", spec.layout) for spec in manifest.signature_outputs]
    return _load(folder / safe_path(variant.golden), specs)


def compare(
    golden: Sequence[Mapping[str, np.ndarray]],
    found: Sequence[Mapping[str, np.ndarray]],
    *,
    min_sqnr_db: float,
) -> Comparison:
    """Compare outputs with golden ones; both are one mapping of name to array for each sample."""
    import numpy as np

    signal_power = noise_power = 0.0
    is_exact = True
    for sample, (expected, actual) in enumerate(zip(golden, found, strict=True)):
        for name, reference in expected.items():
            output = actual[name].astype(np.float32, copy=False)
            is_exact = is_exact and np.array_equal(reference, output, equal_nan=True)
            if not np.array_equal(np.isfinite(reference), np.isfinite(output)):
                return Comparison(
                    False, False, None, f"sample {sample}, output {name!r} has values that are no numbers"
                )
            usable = np.isfinite(reference)
            exact = reference[usable].astype(np.float64)
            signal_power += float(np.sum(exact**2))
            noise_power += float(np.sum((exact - output[usable].astype(np.float64)) ** 2))
    if is_exact:
        return Comparison(True, True, None)
    if noise_power == 0.0 or signal_power == 0.0:
        return Comparison(False, False, None, "the golden outputs are all zero or not finite, these are not")
    sqnr_db = 10 * math.log10(signal_power / noise_power)
    if sqnr_db >= min_sqnr_db:
        return Comparison(True, False, sqnr_db)
    return Comparison(
        False, False, sqnr_db, f"SQNR {sqnr_db:.1f} dB, at least {min_sqnr_db:.1f} dB are asked for"
    )


def _load(folder: Path, specs: Sequence[TensorSpec]) -> list[dict[str, np.ndarray]]:
    stacks = [_stack(folder / f"{index}.npy", spec) for index, spec in enumerate(specs)]
    counts = {len(stack) for stack in stacks}
    if len(counts) != 1 or counts == {0}:
        raise StoreError(
            f"{folder}: expected the same number of samples in every file, found {sorted(counts)}"
        )
    names = [spec.name for spec in specs]
    return [dict(zip(names, sample, strict=True)) for sample in zip(*stacks, strict=True)]


def _stack(file: Path, spec: TensorSpec) -> np.ndarray:
    """Read samples stacked on axis 0; each has `spec.shape`, whose batch axis is 1 and may be left out on disk."""
    import numpy as np

    try:
        array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise StoreError(f"cannot read the golden sample {file}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise StoreError(f"{file} is damaged: {error}; install the package again") from error
    shapes = (spec.shape, spec.shape[1:]) if spec.shape[:1] == (1,) else (spec.shape,)
    if array.ndim == 0 or array.shape[1:] not in shapes:
        raise StoreError(f"{file}: expected samples of shape {spec.shape} on axis 0, found {array.shape}")
    if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise StoreError(f"{file}: expected {spec.dtype}, found {array.dtype.name}")
    return np.ascontiguousarray(array.astype(spec.dtype).reshape(-1, *spec.shape))
