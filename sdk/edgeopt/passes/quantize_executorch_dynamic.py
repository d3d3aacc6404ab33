# SPDX-License-Identifier: Apache-2.0
"""Int8 linear layers of an ExecuTorch program, with the ranges of activations found at run time: for transformers.

No calibration: XNNPACK quantizes each row of a layer's input (a token) by its own smallest and largest value, multiplies
integers, and writes floats. Source: ExecuTorch, "XNNPACK backend", quantization (8-bit dynamic activations, 8-bit weights
per channel).

Rules:
- Attention, norms, activation functions and convolutions stay in float: on a grid, softmax's small values and a norm's
  squares lose most, and convolutions of transformers are their first layers.
- Tables that are looked up are int8 in the file with a scale a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgeopt.executorch.dynamic import write_layers, write_tables
from edgeopt.executorch.hub import enter, lower
from edgeopt.executorch.places import excluded, find_places, kind_of
from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model
from edgeopt_wire.errors import UnsupportedError

FORMATS = ("onnx",)
EXTRA = "executorch"


@dataclass(frozen=True)
class Options:
    """`tables` quantizes looked-up tables too."""

    tables: bool = True


def apply(model: Model, order: Order) -> Result:
    """Quantize every linear layer with stored weights of an ONNX model, and looked-up tables, and lower it to .pte.

    `order.samples` is not looked at.

    Raises:
        RecipeError: An excluded operator does not exist.
        UnsupportedError: The scheme asks for other types, the model has no linear layer, or an operator cannot enter
            the hub.
    """
    options = order.options if isinstance(order.options, Options) else Options()
    if order.scheme is not None and (order.scheme.weight_dtype != "int8" or order.scheme.io != "float32"):
        raise UnsupportedError(
            "quantize_executorch_dynamic makes int8 weights and keeps float32 inputs and outputs; "
            f"the scheme asks for {order.scheme.weight_dtype} weights and {order.scheme.io} inputs and outputs"
        )
    hub, module = enter(model)
    products = find_places(module, order.exclude).products
    layers = [product for product in products if kind_of(product.node) == "linear.default"]
    if not layers:
        raise UnsupportedError(
            "quantize_executorch_dynamic: the model has no linear layer that may be quantized; use quantize_executorch"
        )
    tables = 0

    def write() -> None:
        nonlocal tables
        write_layers(module, layers)
        tables = write_tables(module, excluded(module, order.exclude)) if options.tables else 0

    made = lower(module, hub, write)
    notes = [f"{len(layers)} linear layers in int8 with ranges found at run time, {tables} tables in int8"]
    left = len(products) - len(layers)
    if left:
        notes.append(f"left in float: {left} convolutions")
    return Result(replace(made, inputs=model.inputs, outputs=model.outputs), tuple(notes))


def walks(order: Order, available: int) -> int:  # noqa: ARG001 - the same for every pass
    """How many samples `apply` walks over, for progress."""
    return 0
