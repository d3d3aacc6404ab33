# SPDX-License-Identifier: Apache-2.0
"""Static int8 quantization for ExecuTorch: everything that its XNNPACK delegate computes in integers.

A .pte file cannot be quantized any more, so that this pass starts from the ONNX form, weights rounded where they were,
enters the hub and lowers the result itself. Where integers go follows the delegate (`edgeopt.executorch.places`), in the
representation of PyTorch 2 export quantization; ranges are ours (`edgeopt.calibrate`), weights the integers that every
other format has.

Sources: PyTorch 2 Export Quantization (quantize and dequantize nodes of `quantized_decomposed`); ExecuTorch, "XNNPACK
backend: quantization" (int8 per channel, symmetric weights, asymmetric activations).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeopt.calibrate import Observe, Stream, alarms, find_ranges
from edgeopt.executorch.grids import write_grids
from edgeopt.executorch.hub import enter, lower
from edgeopt.executorch.places import Places, find_places
from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("onnx",)
EXTRA = "executorch"


def apply(model: Model, order: Order) -> Result:
    """Quantize an ONNX model to a .pte program with float32 inputs and outputs.

    Raises:
        RecipeError: No calibration samples, or an excluded operator does not exist.
        UnsupportedError: The scheme asks for types that this pass does not do, or an operator cannot enter the hub.
    """
    _check(order.scheme)
    hub, module = enter(model)
    places = find_places(module, order.exclude)
    if not places.products:
        raise UnsupportedError(
            "quantize_executorch: the model has no convolution or linear layer with stored weights that may be quantized"
        )
    outputs = frozenset(
        places.grid(source)
        for node in module.graph.nodes
        if node.op == "output"
        for source in node.all_input_nodes
        if places.is_on_grid(source)
    )
    names = {entry.name: spec.name for entry, spec in zip(_inputs(module), model.inputs, strict=True)}
    stream = Stream(order.samples, order.checkpoint, order.on_sample)
    ranges = find_ranges(_observer(module, places, names), stream, order.calibration, keep_full=outputs)
    made = lower(module, hub, lambda: write_grids(module, places, ranges))
    said = (
        ("ranges chosen tensor by tensor by their own squared error",)
        if order.calibration.method == "auto"
        else ()
    )
    left = (f"left in float by the recipe: {', '.join(order.exclude)}",) if order.exclude else ()
    learned = ("ranges that training found are not taken here, calibrated ones are",) if order.ranges else ()
    return Result(
        replace(made, inputs=model.inputs, outputs=model.outputs),
        (*left, *learned, *said, *alarms(ranges, outputs)),
    )


def walks(order: Order, available: int) -> int:  # noqa: ARG001 - the same for every pass
    """How many samples `apply` walks over, for progress."""
    return available


def _check(scheme: Scheme | None) -> None:
    if scheme is None:
        raise RecipeError(
            "quantize_executorch needs a scheme; the device's profile names one for each int8 target"
        )
    asked = (scheme.weight_dtype, scheme.activation_dtype, scheme.per_channel, scheme.io)
    if asked != ("int8", "int8", True, "float32") or scheme.symmetric_activations:
        raise UnsupportedError(
            "quantize_executorch makes int8 weights per channel, int8 activations with a zero point and float32 inputs and "
            f"outputs, the scheme asks for {'/'.join(map(str, asked))}, symmetric_activations={scheme.symmetric_activations}"
        )


def _inputs(module: Any) -> list[Any]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _observer(module: Any, places: Places, names: Mapping[str, str]) -> Observe:
    """Run the float graph and give what every grid covers; a grid that several values share is told each of them."""
    import torch
    from torch.fx import Interpreter

    watched = {node: places.grid(node) for node in places.watched}
    seen: list[tuple[str, Any]] = []

    class Watching(Interpreter):  # type: ignore[misc]
        def run_node(self, node: Any) -> Any:
            value = super().run_node(node)
            if node in watched:
                seen.append((watched[node], value))
            return value

    interpreter = Watching(module)
    order = [names[node.name] for node in _inputs(module)]

    def observe(inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        seen.clear()
        with torch.no_grad():
            interpreter.run(*(torch.tensor(inputs[name]) for name in order))
        for name, value in seen:
            yield name, value.detach().contiguous().numpy()

    return observe
