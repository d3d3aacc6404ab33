# SPDX-License-Identifier: Apache-2.0
"""A model as its user sees it: one variant of an extracted package, opened in its runtime.

Inputs and outputs are by the signature's names; what the variant's own tensors look like stays in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt_agent import runtimes, tensors
from edgeopt_wire import seam
from edgeopt_wire.archive import safe_path
from edgeopt_wire.errors import RecipeError, StoreError
from edgeopt_wire.manifest import Manifest, Variant

if TYPE_CHECKING:
    import numpy as np


class LoadedModel:
    """An opened variant. Use as a context manager, or call `close`; closing twice is harmless."""

    def __init__(self, manifest: Manifest, variant: Variant, session: runtimes.Session) -> None:
        self.manifest = manifest
        self.variant = variant
        self.session = session

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one inference, by signature names, batch axis included.

        Raises:
            RecipeError: The inputs are not the signature's.
            RuntimeFailure: The runtime failed, or gave other tensors than the manifest says.
        """
        return self.from_variant(self.session.run(self.to_variant(inputs)))

    def to_variant(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Convert inputs to the variant's own; the probe does this outside of what it times."""
        return tensors.to_variant(self.manifest.signature_inputs, self.variant.inputs, inputs)

    def from_variant(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Convert the variant's own outputs back to the signature's."""
        return tensors.from_variant(self.variant.outputs, self.manifest.signature_outputs, outputs)

    def close(self) -> None:
        """Release the runtime's memory."""
        self.session.close()


def find_variant(manifest: Manifest, variant_id: str) -> Variant:
    """Return the variant called `variant_id`.

    Raises:
        RecipeError: The package has none of this name; the message lists those it has.
    """
    known = [variant.id for variant in manifest.variants]
    if variant_id not in known:
        raise RecipeError(f"{manifest.title}: {seam.unknown('variant', variant_id, known)}")
    return manifest.variant(variant_id)


def open_model(folder: Path, manifest: Manifest, variant_id: str) -> LoadedModel:
    """Open a variant of the package that is extracted in `folder`; digests were checked when it was extracted.

    Raises:
        RecipeError: The package has no such variant.
        StoreError: The variant's file is not there.
        UnsupportedError: This machine cannot run it as the manifest asks.
        RuntimeFailure: The runtime could not load it.
    """
    variant = find_variant(manifest, variant_id)
    tensors.check_convertible(manifest.signature_inputs, variant.inputs)
    tensors.check_convertible(variant.outputs, manifest.signature_outputs)
    file = folder / safe_path(variant.file)
    if not file.is_file():
        raise StoreError(f"{file} is missing; install the package again")
    return LoadedModel(manifest, variant, runtimes.find(variant.runtime).load(file, variant))
