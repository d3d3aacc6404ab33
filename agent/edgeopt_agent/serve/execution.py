# SPDX-License-Identifier: Apache-2.0
"""Running the rows of one or several requests on one instance of a model.

Rules:
- Conversion to the variant's tensors and back happens on each caller's own thread; only the run itself is shared.
- A lone request goes to the runtime as it is. Several are put into one array along axis 0 and cut apart again.
- A fixed batch is padded by its last row, so that a runtime sees one shape only and never a value that it has not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeopt_agent import tensors
from edgeopt_agent.model import LoadedModel
from edgeopt_wire.errors import RecipeError, RuntimeFailure
from edgeopt_wire.manifest import Manifest, Variant
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]


class Edges:
    """The tensors of a model and of its variant, for any number of rows."""

    def __init__(self, manifest: Manifest, variant: Variant) -> None:
        self._manifest = manifest
        self._variant = variant
        self._at = functools.lru_cache(maxsize=64)(self._make)

    def rows_of(self, inputs: Arrays, max_batch: int) -> int:
        """How many rows a request has.

        Raises:
            RecipeError: Its inputs disagree, or it has more than `max_batch`.
        """
        if max_batch == 1:
            return 1
        rows = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
        found = next(iter(rows), 0)
        if len(rows) != 1 or not 1 <= found <= max_batch:
            raise RecipeError(
                f"every input needs the same first axis, 1 to {max_batch}; found {sorted(rows)}"
            )
        return found

    def to_variant(self, inputs: Arrays, rows: int) -> dict[str, np.ndarray]:
        """Inputs of a request by the signature's names as the variant's."""
        return self._at(rows)[0].given(inputs)

    def from_variant(self, outputs: Arrays, rows: int) -> dict[str, np.ndarray]:
        """The variant's outputs as the signature's."""
        return self._at(rows)[1].found(outputs)

    def _make(self, rows: int) -> tuple[tensors.Conversion, tensors.Conversion]:
        ours, theirs = self._manifest, self._variant
        return (
            tensors.Conversion(scaled(ours.signature_inputs, rows), scaled(theirs.inputs, rows)),
            tensors.Conversion(scaled(theirs.outputs, rows), scaled(ours.signature_outputs, rows)),
        )


def run_batch(
    loaded: LoadedModel, contents: Sequence[tuple[Arrays, int]], padded_to: int = 0
) -> list[Arrays]:
    """Run requests, each (variant's inputs, rows), together; one answer each, in order."""
    import numpy as np

    rows = [count for _, count in contents]
    total = sum(rows)
    if len(contents) == 1 and total >= padded_to:
        return [loaded.session.run(contents[0][0])]
    joined = {}
    for name in contents[0][0]:
        parts = [inputs[name] for inputs, _ in contents]
        if total < padded_to:
            parts.append(np.repeat(parts[-1][-1:], padded_to - total, axis=0))
        joined[name] = np.concatenate(parts)
    found = loaded.session.run(joined)
    for name, array in found.items():
        if array.shape[:1] != (max(total, padded_to),):
            raise RuntimeFailure(
                f"output {name!r} of a batch of {max(total, padded_to)} has the shape {array.shape}"
            )
    ends = np.cumsum(rows).tolist()
    return [
        {name: array[end - n : end] for name, array in found.items()}
        for end, n in zip(ends, rows, strict=True)
    ]


def scaled(specs: Sequence[TensorSpec], rows: int) -> tuple[TensorSpec, ...]:
    """The same tensors with `rows` times as many on the first axis."""
    if rows == 1:
        return tuple(specs)
    return tuple(replace(spec, shape=(rows * spec.shape[0], *spec.shape[1:])) for spec in specs)
