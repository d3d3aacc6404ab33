# SPDX-License-Identifier: Apache-2.0
"""Where a quantized model's error comes from: weights, activations, clipping, a constant shift, the runtime's kernels.

Each part is the error of the outputs with only that part switched on, in one session over the float model
(`edgeopt.fake_quantize`); so parts need not add up to the whole, and mostly nearly do, because rounding errors of
different tensors are independent. All are SQNR in decibels against the float model, over all outputs and samples.

- weights: on their grid, activations in floats. activations: the other way round.
- clipping: activations end where their range ends, and are not rounded.
- shift: the part of the whole error that is the same for every sample (a bias could take it away), as a share.
- kernels: the runtime's own outputs against the simulation with everything on; where both round alike but in other
  order they differ by single steps, which then spread; far above the whole error means nothing was substituted.

Which part dominates decides what can help (`cure`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgeopt.fake_quantize import FakeQuantized, Grid, Quantized, read_quantized
from edgeopt.onnx_graphs import fold
from edgeopt.weights.nearest import nearest
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

SAMPLES = 16
"""Photos that an attribution looks at: SQNR over 16 is within 0.3 dB of SQNR over 375."""

CEILING_DB = 200.0
ENOUGH_DB = 45.0
"""Weights that alone give more than this gain nothing from better rounding: 8-bit activations stay below it."""

WORST = 10


@dataclass(frozen=True)
class TensorError:
    """The error of the outputs with this one tensor (or this one weight) quantized and all else float."""

    name: str
    kind: str  # "activation" or "weight"
    operator: str
    node: str
    sqnr_db: float
    share: float


@dataclass(frozen=True)
class Attribution:
    """The parts in dB, the share of the error that is a constant shift, and the tensors that cost most."""

    SCHEMA = "edgeopt.attribution/1"

    samples: int
    whole_db: float
    weights_db: float
    activations_db: float
    clipping_db: float
    shift_share: float
    kernels_db: float | None = None
    tensors: tuple[TensorError, ...] = ()

    @property
    def dominant(self) -> str:
        """The part with the most error: weights, activations or clipping."""
        if self.clipping_db < self.activations_db + 3.0:  # clipping is a part of what activations cost
            return "clipping" if self.clipping_db < self.weights_db else "weights"
        return "weights" if self.weights_db < self.activations_db else "activations"

    @property
    def weights_share(self) -> float:
        """The weights' part of the noise that weights and activations make, each by itself: 0 to 1."""
        weights, activations = (10 ** (-db / 10) for db in (self.weights_db, self.activations_db))
        return weights / (weights + activations)

    def cure(self) -> str:
        """What helps against the dominant part."""
        return {
            "weights": "round weights by second moments of their inputs; then leave the worst layers to more bits",
            "activations": "bring channels to like ranges, choose ranges by the output's error, then more bits or floats "
            "for the worst tensors, or train with quantization",
            "clipping": "wider ranges: calibration method minmax, mse or auto, or more calibration samples",
        }[self.dominant]

    def sentence(self) -> str:
        """The parts in one line."""
        text = (
            f"weights alone {self.weights_db:.1f} dB, activations alone {self.activations_db:.1f} dB (clipping "
            f"{self.clipping_db:.1f} dB), together {self.whole_db:.1f} dB; a constant shift is "
            f"{100 * self.shift_share:.0f} % of the error"
        )
        if self.kernels_db is not None:
            text += f"; the runtime's kernels are {self.kernels_db:.1f} dB from the simulation"
        return text


@dataclass
class Laboratory:
    """A float model, its quantized form, and what the float model says of a few samples."""

    session: FakeQuantized
    quantized: Quantized
    operators: Mapping[str, tuple[str, str]]
    samples: Sequence[Mapping[str, np.ndarray]]
    exact: np.ndarray

    @classmethod
    def open(
        cls, program: Any, quantized: Any, samples: Iterable[Mapping[str, np.ndarray]], count: int = SAMPLES
    ) -> Laboratory:
        """Set up over the float `program` and its QDQ form.

        Raises:
            RecipeError: There is no sample.
            RuntimeFailure: The quantized program is none of this float one.
        """
        import numpy as np

        found = read_quantized(quantized)
        folded = fold(program)
        known = {tensor.name for tensor in folded.graph.initializer}
        weights = {name: values for name, values in found.weights.items() if name in known}
        operators = {name: (node.op_type, node.name) for node in folded.graph.node for name in node.output}
        operators |= {
            name: (node.op_type, node.name)
            for node in folded.graph.node
            for name in node.input
            if name in weights
        }
        chosen = list(islice(samples, count))
        if not chosen:
            raise RecipeError("an attribution needs samples; give --calibration or --evaluation DATA")
        session = FakeQuantized(folded, found.grids, weights)
        laboratory = cls(session, Quantized(found.grids, weights), operators, chosen, np.zeros(0))
        laboratory.exact = laboratory.run()
        return laboratory

    def run(
        self, grids: Mapping[str, Grid] | None = None, weights: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """All outputs of all samples, flat: (samples, values) in float64."""
        import numpy as np

        rows = [self.session.run(sample, grids, weights) for sample in self.samples]
        return np.stack(
            [
                np.concatenate([np.asarray(values, np.float64).reshape(-1) for values in row.values()])
                for row in rows
            ]
        )

    def sqnr_db(self, found: np.ndarray) -> float:
        """Against the float model."""
        return _db(self.exact, found)


def attribute(
    laboratory: Laboratory,
    runtime: np.ndarray | None = None,
    on_step: Callable[[], None] = lambda: None,
    *,
    tensors: bool = True,
) -> Attribution:
    """Measure the parts; `runtime` is what the runtime itself said of the same samples, (samples, values).

    `tensors` also measures every tensor by itself, which takes as many runs as there are tensors.
    """
    grids, weights = laboratory.quantized.grids, laboratory.quantized.weights
    both = laboratory.run(grids, weights)
    clipped = laboratory.run({name: grid.clip_only for name, grid in grids.items()})
    return Attribution(
        samples=len(laboratory.samples),
        whole_db=round(laboratory.sqnr_db(both), 2),
        weights_db=round(laboratory.sqnr_db(laboratory.run(weights=weights)), 2),
        activations_db=round(laboratory.sqnr_db(laboratory.run(grids)), 2),
        clipping_db=round(laboratory.sqnr_db(clipped), 2),
        shift_share=round(_shift_share(laboratory.exact, both), 4),
        kernels_db=None if runtime is None else round(_db(both, runtime), 2),
        tensors=sensitivity(laboratory, on_step)[:WORST] if tensors else (),
    )


def weights_alone_db(
    program: Any, samples: Iterable[Mapping[str, np.ndarray]], count: int = SAMPLES
) -> float:
    """SQNR with weights on the int8 grid by nearest rounding and everything else float: is rounding worth its time?

    Only constants of convolutions and matrix products are rounded, per output channel and symmetric.
    """
    import numpy as np

    folded = fold(program)
    rounded = nearest(folded)
    session = FakeQuantized(folded, (), rounded)
    chosen = list(islice(samples, count))

    def run(weights: Mapping[str, np.ndarray]) -> np.ndarray:
        rows = [session.run(sample, None, weights).values() for sample in chosen]
        return np.stack(
            [np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in row]) for row in rows]
        )

    return _db(run({}), run(rounded))


def steps(laboratory: Laboratory) -> int:
    """How many steps `attribute` with tensors reports."""
    return len(laboratory.quantized.grids) + len(laboratory.quantized.weights)


def sensitivity(
    laboratory: Laboratory, on_step: Callable[[], None] = lambda: None
) -> tuple[TensorError, ...]:
    """The error of every tensor and weight by itself, the worst first; shares are of the sum of all."""
    import numpy as np

    errors: list[tuple[float, str, str]] = []
    for name, grid in laboratory.quantized.grids.items():
        found = laboratory.run({name: grid})
        errors.append((float(np.square(found - laboratory.exact).sum()), name, "activation"))
        on_step()
    for name, values in laboratory.quantized.weights.items():
        found = laboratory.run(weights={name: values})
        errors.append((float(np.square(found - laboratory.exact).sum()), name, "weight"))
        on_step()
    total = sum(error for error, _, _ in errors) or 1.0
    signal = float(np.square(laboratory.exact).sum())
    errors.sort(key=lambda entry: (-entry[0], entry[1]))
    return tuple(
        TensorError(
            name,
            kind,
            *laboratory.operators.get(name, ("input", "")),
            round(_ratio_db(signal, error), 2),
            round(error / total, 4),
        )
        for error, name, kind in errors
    )


def _db(exact: np.ndarray, found: np.ndarray) -> float:
    import numpy as np

    return _ratio_db(float(np.square(exact).sum()), float(np.square(found - exact).sum()))


def _ratio_db(signal: float, noise: float) -> float:
    if noise <= 0:
        return CEILING_DB
    if signal <= 0 or not math.isfinite(noise):
        return -CEILING_DB
    return max(-CEILING_DB, min(CEILING_DB, 10 * math.log10(signal / noise)))


def _shift_share(exact: np.ndarray, found: np.ndarray) -> float:
    """The squared mean error over the mean squared error, corrected for the few samples (unbiased)."""
    import numpy as np

    error = found - exact
    count = len(error)
    whole = float(np.square(error).sum()) / count
    if count < 2 or whole == 0:
        return 0.0
    squared_mean = float(np.square(error.mean(0)).sum()) - float(error.var(0, ddof=1).sum()) / count
    return min(max(squared_mean / whole, 0.0), 1.0)
