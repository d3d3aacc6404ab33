# SPDX-License-Identifier: Apache-2.0
"""Int8 fully connected layers of a LiteRT model, with the ranges of activations found at run time.

No calibration: XNNPACK quantizes each row of a layer's input (a token of a transformer) by its own smallest and largest
value, multiplies integers, and writes floats. Weights are int8, symmetric per output channel, scale = max|w| / 127, so
that weights on that grid keep their integers. Source: LiteRT, "Dynamic range quantization".

Rules:
- Attention, norms and activation functions stay in float: on a grid, softmax's small values and a norm's squares lose most.
- Convolutions stay in float: those of transformers are their first layers, and cost 9 dB of a vision transformer's 47.
  Where small files are asked for (`int8-weights`), their weights are int8 in the file and floats when it is loaded.
- Tables that are looked up have a scale per row and turn float after the lookup.
- The file names the version of the layer that knows all this, so that an older runtime refuses it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from edgeopt import litert_levels
from edgeopt.passes import Order, Result
from edgeopt_converters.litert_graph import operators as graph_operators
from edgeopt_converters.model import Model
from edgeopt_wire.errors import UnsupportedError

FORMATS = ("litert",)
EXTRA = "litert"

TABLE, LAYER = "EMBEDDING_LOOKUP", "FULLY_CONNECTED"
CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")


@dataclass(frozen=True)
class Options:
    """`tables` quantizes looked-up tables too; `convolutions` stores the weights of convolutions as int8."""

    tables: bool = True
    convolutions: bool = False


def apply(model: Model, order: Order) -> Result:
    """Quantize every fully connected layer with constant weights, and looked-up tables; edges stay as they are.

    `order.samples` is not looked at.

    Raises:
        RecipeError: An excluded operator does not exist.
        UnsupportedError: The scheme asks for other types, or the model has nothing that this pass quantizes.
    """
    options = order.options if isinstance(order.options, Options) else Options()
    if order.scheme is not None and (order.scheme.weight_dtype != "int8" or order.scheme.io != "float32"):
        raise UnsupportedError(
            "quantize_litert_dynamic makes int8 weights and keeps float32 inputs and outputs; "
            f"the scheme asks for {order.scheme.weight_dtype} weights and {order.scheme.io} inputs and outputs"
        )
    excluded = litert_levels.choose(model.program, order.exclude)
    wanted = {LAYER: litert_levels.DYNAMIC}
    wanted |= {TABLE: litert_levels.DYNAMIC} if options.tables else {}
    wanted |= dict.fromkeys(CONVOLUTIONS, litert_levels.STORED) if options.convolutions else {}
    chosen = [
        entry for entry in litert_levels.with_weights(model.program, wanted) if entry.name not in excluded
    ]
    if not chosen:
        raise UnsupportedError(
            "quantize_litert_dynamic: the model has no weights that may be quantized; use quantize_litert"
        )
    levels = {entry.name: wanted[entry.type] for entry in chosen}
    program = litert_levels.quantize_weights(model.program, levels)
    counts = Counter(entry.type for entry in chosen)
    notes = [
        f"{counts[LAYER]} fully connected layers in int8 with ranges found at run time, {counts[TABLE]} tables in int8"
    ]
    stored = sum(level == litert_levels.STORED for level in levels.values())
    if stored:
        notes.append(f"weights of {stored} convolutions are int8 in the file and floats in memory")
    left = Counter(
        entry.type for entry in graph_operators(model.program) if entry.macs and entry.name not in levels
    )
    if left:
        notes.append("left in float: " + ", ".join(f"{count} {kind}" for kind, count in left.items()))
    return Result(replace(model, program=program), tuple(notes))
