# SPDX-License-Identifier: Apache-2.0
"""Fuse what belongs to a layer into it: batch normalization, constant factors and shifts, pads, spelled-out activations.

Every pass over ONNX models folds its input in the same way (`edgeopt.onnx_graphs.fold`, rules in `edgeopt.fusion`); this
one says in its notes what was fused and what could not be, so it comes first in a build.

Sources: Jacob et al. 2018, section 3.2 (batch normalization folding); Krishnamoorthi 2018, "Quantizing deep
convolutional networks for efficient inference: A whitepaper", section 3.2.2; ONNX operators (padding, bounds).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgeopt.onnx_graphs import fold_and_tell
from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model

FORMATS = ("onnx",)
EXTRA = "onnx"


@dataclass(frozen=True)
class Options:
    """`running_statistics`: take batch normalization and dropout exported in training mode as in evaluation mode."""

    running_statistics: bool = False


def apply(model: Model, order: Order) -> Result:
    """Fuse an ONNX model; inputs, outputs and what it computes stay the same."""
    options = order.options if isinstance(order.options, Options) else Options()
    fused = fold_and_tell(model.program, running_statistics=options.running_statistics)
    said = (f"fused: {fused.sentence()}",) if fused.counts else ()
    return Result(replace(model, program=fused.program), (*said, *fused.kept))
