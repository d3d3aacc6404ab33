# SPDX-License-Identifier: Apache-2.0
"""The ranges of a model's tensors from its batch normalizations, by the names of its float ONNX form.

The batch normalizations are read where they still stand: in the ONNX file itself, or in an export of the PyTorch
program that folds none. The float ONNX form of a build has them folded; its tensors are found by what flows through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.calibrate import Stream
from edgeopt.onnx_graphs import fold, observer, unfused
from edgeopt.uncalibrated.noise import Interval
from edgeopt.uncalibrated.promises import MADE_UP, find_promised, fingerprint
from edgeopt.uncalibrated.propagate import Reading, propagate
from edgeopt.uncalibrated.spread import Spread, weights
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

OUTPUTS_REACH = 2.0
"""An output that is a sum of inputs taken as independent gets this many times its range, because a clipped logit changes
the answer: EfficientNet-Lite0's highest logit lay 4 % beyond it."""

SHOWN = 3
"""Layers that a note names before it counts."""


@dataclass(frozen=True)
class Statistics:
    """Ends of tensors (low <= 0 <= high) by name; `norms` batch normalizations stand behind `layers` layers.

    `assumed` names layers that none follows.
    """

    SCHEMA = "edgeopt.statistics/1"

    spans: Mapping[str, tuple[float, float]]
    norms: int
    layers: int
    assumed: tuple[str, ...]

    def notes(self) -> tuple[str, ...]:
        """What a reader of the report must know."""
        said = f"ranges of {len(self.spans)} tensors from {self.norms} batch normalizations"
        if not self.assumed:
            return (said,)
        more = f" and {len(self.assumed) - SHOWN} more" if len(self.assumed) > SHOWN else ""
        assumed = (
            f"{len(self.assumed)} of {self.layers} layers have no batch normalization behind them "
            f"({', '.join(self.assumed[:SHOWN])}{more}): their ranges take their inputs as independent"
        )
        return (said, assumed)


def read_statistics(
    model: Model, base: Any, sample: Mapping[str, np.ndarray], interval: Interval
) -> Statistics:
    """Read the source `model` (torch or ONNX) and name the ranges of the float ONNX program `base`.

    `sample` is noise for the inputs of `base`, whose tensors are found by their values on it.

    Raises:
        RecipeError: No batch normalization is left to read.
    """
    program = unfused(_with_batch_norms(model))
    constants = {tensor.name for tensor in program.graph.initializer}
    names = [edge.name for edge in program.graph.input if edge.name not in constants]
    reading = propagate(program, {name: _anything(name, interval) for name in names})
    if not reading.norms:
        raise RecipeError(
            f"{model.name} holds no batch normalization in evaluation mode: an exporter folds them into the layers before, "
            "and then nothing says what flows. Give --calibration DATA; or export with batch normalizations kept "
            "(torch.onnx.export(..., optimize=False); with the older exporter do_constant_folding=False and "
            "training=TrainingMode.PRESERVE after model.eval()); or build from the PyTorch module (module:factory) or a "
            ".pt2 file"
        )
    feeds = dict(zip(names, sample.values(), strict=True))
    known = fingerprint(_spans(program, reading), observer(program)(feeds))
    found = find_promised(observer(fold(base)), Stream([sample]), known)
    spans = {name: (span.low, span.high) for name, span in found.items() if span.method != MADE_UP}
    return Statistics(spans, reading.norms, reading.layers, reading.assumed)


def _with_batch_norms(model: Model) -> Any:
    if model.format == "onnx":
        return model.program
    from edgeopt_converters.torch_to_onnx import with_batch_norms

    return with_batch_norms(model)


def _anything(name: str, interval: Interval) -> Spread:
    """An input that takes every value of its interval alike often; channels where they are on the second axis."""
    import numpy as np

    low, high = np.array(interval.low), np.array(interval.high)
    share = np.cumsum(weights()) - weights() / 2
    share[0], share[-1] = 0.0, 1.0
    return Spread(name, low + share[:, None] * (high - low))


def _spans(program: Any, reading: Reading) -> dict[str, tuple[float, float]]:
    outputs = {output.name for output in program.graph.output}
    spans = {}
    for name, spread in reading.spreads.items():
        reach = OUTPUTS_REACH if name in outputs and spread.is_assumed else 1.0
        low, high = spread.ends
        spans[name] = (reach * min(low, 0.0), reach * max(high, 0.0))
    return spans
