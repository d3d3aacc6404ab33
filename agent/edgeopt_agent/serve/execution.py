# SPDX-License-Identifier: Apache-2.0
"""Running the rows of one or several requests on one instance of a model.

Rules:
- Conversion to the variant's tensors and back happens on each caller's own thread; only the run itself is shared.
- A lone request goes to the runtime as it is. Several are put into one array along axis 0 and cut apart again.
- A batch of fixed sizes is padded by its last row, so that a runtime sees few shapes and never a value that it has not
  seen. A file whose own first axis is N is one of them: it always runs N rows.
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
from edgeopt_wire.serving import Serving
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]


class Edges:
    """The tensors of a model and of its variant, for any number of rows; with a `max_batch` of 1 as they stand."""

    def __init__(self, manifest: Manifest, variant: Variant, serving: Serving) -> None:
        self._manifest = manifest
        self._variant = variant
        self._most = serving.max_batch
        self.sizes = sizes_of(manifest, serving)
        """Numbers of rows that a run may have, ascending; none: any."""
        self._at = functools.lru_cache(maxsize=64)(self._make)

    def rows_of(self, inputs: Arrays) -> int:
        """How many rows a request has.

        Raises:
            RecipeError: Its inputs disagree, or it has more than run together.
        """
        max_batch = self._most
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
        if self._most == 1:
            inputs, outputs = (ours.signature_inputs, theirs.inputs), (theirs.outputs, ours.signature_outputs)
        else:
            inputs = with_rows(ours.signature_inputs, rows), with_rows(theirs.inputs, rows)
            outputs = with_rows(theirs.outputs, rows), with_rows(ours.signature_outputs, rows)
        return tensors.Conversion(*inputs), tensors.Conversion(*outputs)


def run_batch(
    loaded: LoadedModel, contents: Sequence[tuple[Arrays, int]], sizes: Sequence[int] = ()
) -> list[Arrays]:
    """Run requests, each (variant's inputs, rows), together, padded to the next of `sizes`; one answer each, in order."""
    if len(contents) == 1 and (not sizes or contents[0][1] in sizes):
        return [loaded.session.run(contents[0][0])]
    import numpy as np

    rows = [count for _, count in contents]
    total = sum(rows)
    padded_to = next((size for size in sizes if size >= total), total)
    joined = {}
    for name in contents[0][0]:
        parts = [inputs[name] for inputs, _ in contents]
        if total < padded_to:
            parts.append(np.repeat(parts[-1][-1:], padded_to - total, axis=0))
        joined[name] = np.concatenate(parts)
    found = loaded.session.run(joined)
    for name, array in found.items():
        if array.shape[:1] != (padded_to,):
            raise RuntimeFailure(f"output {name!r} of a batch of {padded_to} has the shape {array.shape}")
    ends = np.cumsum(rows).tolist()
    return [
        {name: array[end - n : end] for name, array in found.items()}
        for end, n in zip(ends, rows, strict=True)
    ]


def with_rows(specs: Sequence[TensorSpec], rows: int) -> tuple[TensorSpec, ...]:
    """The same tensors with so many rows on the first axis."""
    return tuple(replace(spec, shape=(rows, *spec.shape[1:])) for spec in specs)


def file_rows(manifest: Manifest) -> int:
    """The first axis of every tensor of a model: 1, or the batch that its files were made for; 0 where they differ."""
    found = {spec.shape[:1] for spec in (*manifest.signature_inputs, *manifest.signature_outputs)}
    return next(iter(found))[0] if len(found) == 1 and () not in found else 0


def sizes_of(manifest: Manifest, serving: Serving) -> tuple[int, ...]:
    """Numbers of rows that a run of a served model may have, ascending; none: any up to `max_batch`."""
    if serving.max_batch == 1:
        return ()
    if serving.fixed_batch or file_rows(manifest) > 1:
        return (serving.max_batch,)
    return serving.batch_sizes
