# SPDX-License-Identifier: Apache-2.0
"""What is proven of a model before it serves: that it runs, and that a batch of it says what single requests say.

Rules:
- Every model runs once before it serves: what a runtime puts off until its first run, no client waits for, and a model
  that fails then never replaces one that works.
- With batching its golden samples run together and alone, and must agree to `MIN_SQNR_DB`: a net whose rows see each
  other (ranges found at run time over the whole batch, a fixed number of rows in a Reshape) gives other answers under
  load than alone, and is refused instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt_agent import golden
from edgeopt_agent.model import LoadedModel
from edgeopt_agent.serve.execution import Edges
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
    """Run the golden samples as one full batch and compare; this also reserves the memory of a full batch now.

    Raises:
        UnsupportedError: The file does not take that many rows, or its rows are not independent.
        StoreError: The package's golden samples cannot be read.
    """
    import numpy as np

    manifest = loaded.manifest
    where = f"{manifest.title}, variant {loaded.variant.id}: serving.max_batch is {max_batch}"
    for spec in (*manifest.signature_inputs, *manifest.signature_outputs):
        if spec.shape[:1] != (1,):
            raise UnsupportedError(f"{where}, but {spec.name!r} is {spec.shape}, with no batch axis of 1")
    samples = golden.load_inputs(folder, manifest)
    if len(samples) < 2:
        raise StoreError(
            f"{where}; two golden samples or more are needed to prove a batch, found {len(samples)}"
        )
    chosen = [samples[number % len(samples)] for number in range(max_batch)]
    together = {name: np.concatenate([sample[name] for sample in chosen]) for name in chosen[0]}
    try:
        found = edges.from_variant(loaded.session.run(edges.to_variant(together, max_batch)), max_batch)
    except EdgeoptError as error:
        raise UnsupportedError(
            f"{where}, but the file does not take that many rows; export it with a free batch axis, "
            f"or set max_batch to 1 ({error})"
        ) from error
    distinct = range(min(len(samples), max_batch))
    alone = [_alone(loaded, edges, samples[row]) for row in distinct]
    rows = [{name: array[row : row + 1] for name, array in found.items()} for row in distinct]
    seen = golden.compare(_real(alone), _real(rows), min_sqnr_db=MIN_SQNR_DB)
    if not seen.is_ok:
        raise UnsupportedError(
            f"{where}, but its rows are not independent: together they answer otherwise than alone ({seen.reason}); "
            "set max_batch to 1"
        )


def _alone(loaded: LoadedModel, edges: Edges, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return edges.from_variant(loaded.session.run(edges.to_variant(sample, 1)), 1)


def _real(outputs: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    return [{name: array.astype("float32") for name, array in sample.items()} for sample in outputs]
