# SPDX-License-Identifier: Apache-2.0
"""What is proven of a model before it serves: that it runs, and that a batch of it says what single requests say.

Rules:
- Every model runs once before it serves: what a runtime puts off until its first run, no client waits for, and a model
  that fails then never replaces one that works.
- With batching its golden samples run together and alone, and must agree to `MIN_SQNR_DB`: a net whose rows see each
  other (ranges found at run time over the whole batch, a fixed number of rows in a Reshape) gives other answers under
  load than alone, and is refused instead. Every size that a run may have is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt_agent import golden
from edgeopt_agent.model import LoadedModel
from edgeopt_agent.serve.execution import Edges, file_rows, run_batch
from edgeopt_wire.errors import EdgeoptError, StoreError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

MIN_SQNR_DB = 40.0
"""Sums in another order cost less in every precision that we ship; what a neighbour's range changes costs more."""


def run_once(loaded: LoadedModel, edges: Edges) -> None:
    """Run zeros once.

    Raises:
        RuntimeFailure: The model fails.
    """
    import numpy as np

    zeros = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in loaded.manifest.signature_inputs}
    edges.from_variant(loaded.session.run(edges.to_variant(zeros, 1)), 1)


def prove_batch(loaded: LoadedModel, edges: Edges, folder: Path, max_batch: int) -> None:
    """Run rows of the golden samples as one full batch and compare; this also reserves the memory of a full batch now.

    Raises:
        UnsupportedError: The file does not take that many rows, or its rows are not independent.
        StoreError: The package's golden samples cannot be read.
    """
    import numpy as np

    manifest = loaded.manifest
    where = f"{manifest.title}, variant {loaded.variant.id}: serving.max_batch is {max_batch}"
    held = file_rows(manifest)
    if held not in (1, max_batch):
        spec = manifest.signature_inputs[0]
        raise UnsupportedError(
            f"{where}, but {spec.name!r} is {list(spec.shape)}: set max_batch to "
            + (
                f"{held}, the rows of its file, or to 1"
                if held
                else "1, its tensors have no common batch axis"
            )
        )
    samples = [
        {name: array[row : row + 1] for name, array in sample.items()}
        for sample in golden.load_inputs(folder, manifest)
        for row in range(held)
    ]
    if len(samples) < 2:
        raise StoreError(
            f"{where}; two golden samples or more are needed to prove a batch, found {len(samples)}"
        )
    chosen = [samples[number % len(samples)] for number in range(max_batch)]
    together = {name: np.concatenate([sample[name] for sample in chosen]) for name in chosen[0]}
    try:
        for rows in edges.sizes[:-1]:
            _run(loaded, edges, {name: array[:rows] for name, array in together.items()}, rows)
        found = _run(loaded, edges, together, max_batch)
        distinct = range(min(len(samples), max_batch))
        alone = [_run(loaded, edges, samples[row], 1) for row in distinct]
    except EdgeoptError as error:
        raise UnsupportedError(
            f"{where}, but the file does not take that many rows; export it with a free batch axis, "
            f"or set max_batch to 1 ({error})"
        ) from error
    rows_together = [{name: array[row : row + 1] for name, array in found.items()} for row in distinct]
    seen = golden.compare(_real(alone), _real(rows_together), min_sqnr_db=MIN_SQNR_DB)
    if not seen.is_ok:
        raise UnsupportedError(
            f"{where}, but its rows are not independent: together they answer otherwise than alone ({seen.reason}); "
            "set max_batch to 1"
        )


def _run(
    loaded: LoadedModel, edges: Edges, inputs: dict[str, np.ndarray], rows: int
) -> dict[str, np.ndarray]:
    (found,) = run_batch(loaded, [(edges.to_variant(inputs, rows), rows)], edges.sizes)
    return edges.from_variant(found, rows)


def _real(outputs: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    return [{name: array.astype("float32") for name, array in sample.items()} for sample in outputs]
