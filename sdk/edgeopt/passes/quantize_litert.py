# SPDX-License-Identifier: Apache-2.0
"""Static int8 quantization of a LiteRT model: every operator that LiteRT has in integers, or a note that names it.

The ranges are ours (`edgeopt.calibrate`, over all samples); the flatbuffer is rewritten by ai-edge-quantizer, whose
own moving average over samples would clip the outputs. Where the device takes floats, the net's ends write floats and its
norms compute in them (`litert_levels.usual`), and mean errors of output layers go into their biases (`litert_bias`).
Weights are symmetric per channel, activations asymmetric per tensor (LiteRT 8-bit quantization specification).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeopt import litert_levels
from edgeopt.calibrate import Observe, Stream, alarms, find_ranges
from edgeopt.litert_bias import correct
from edgeopt.passes import Order, Result
from edgeopt.training.spans import find_learned
from edgeopt_converters.litert_file import parse
from edgeopt_converters.litert_graph import type_names
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.tensor import Affine, TensorSpec

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("litert",)
EXTRA = "litert"


def apply(model: Model, order: Order) -> Result:
    """Quantize to int8 by the order's scheme, whose `io` says whether inputs and outputs stay float32.

    Samples are in the model's own layout (`model.inputs`).

    Raises:
        RecipeError: No calibration samples, or `order.exclude` means nothing here.
        UnsupportedError: The scheme asks for types that this pass does not do.
    """
    scheme = _checked(order)
    observe = _observer(model)
    outputs = _output_tensors(model.program)
    stream = Stream(order.samples, order.checkpoint, order.on_sample)
    ranges = find_ranges(observe, stream, order.calibration, keep_full=outputs)
    learned = find_learned(order.ranges, observe, order.samples)
    ranges |= {name: span for name, span in learned.ranges.items() if name not in outputs}
    ranges |= {made: ranges[read] for made, read in _endless_pads(model.program).items() if read in ranges}
    left = litert_levels.choose(model.program, order.exclude)
    has_floats = scheme.io == "float32"
    usual = litert_levels.usual(model.program, ranges) if has_floats else {}
    levels = usual | dict.fromkeys(left, "fp32")
    quantized = litert_levels.quantize(model.program, ranges, levels, float_edges=has_floats)
    layers = [name for name, level in levels.items() if level == litert_levels.DYNAMIC]
    quantized, corrected = correct(model.program, quantized, layers, model.inputs, order.samples)
    inputs, outputs_now = _specs(quantized, model)
    said = (
        ("ranges chosen tensor by tensor by their own squared error",)
        if order.calibration.method == "auto"
        else ()
    )
    if left:
        said = (*said, f"left in float by the recipe: {', '.join(order.exclude)}")
    kept = _said_floats(model.program, usual)
    notes = (*said, *filter(None, (kept, corrected, learned.sentence())), *alarms(ranges, outputs))
    return Result(replace(model, program=quantized, inputs=inputs, outputs=outputs_now), notes, order.ranges)


def _said_floats(program: bytes, levels: Mapping[str, str]) -> str:
    """Name what computes in floats on purpose; layers whose ranges are found at run time run in integers all the same."""
    names = {name for name, level in levels.items() if level == litert_levels.FLOATS}
    counts = Counter(entry.type for entry in litert_levels.operators(program) if entry.name in names)
    computing = [f"{number} {kind}" for kind, number in counts.items() if kind not in litert_levels.MOVES]
    return f"in floats, because 8 bits lose most there: {', '.join(computing)}" if computing else ""


def walks(order: Order, available: int) -> int:  # noqa: ARG001 - the same for every pass
    """How many samples `apply` walks over, for progress."""
    return available


def _checked(order: Order) -> Scheme:
    if order.scheme is None:
        raise RecipeError(
            "quantize_litert needs a scheme; the device's profile names one for each int8 target"
        )
    if order.exclude and order.scheme.io != "float32":
        raise RecipeError(
            f"quantize.exclude ({', '.join(order.exclude)}) leaves operators in float, and this device takes nothing but "
            "integers; remove it, or build for another device"
        )
    if (order.scheme.weight_dtype, order.scheme.activation_dtype, order.scheme.per_channel) != (
        "int8",
        "int8",
        True,
    ):
        raise UnsupportedError(
            "quantize_litert makes int8 weights per channel and int8 activations, the scheme asks for "
            f"{order.scheme.weight_dtype}/{order.scheme.activation_dtype}, per_channel={order.scheme.per_channel}"
        )
    return order.scheme


def _observer(model: Model) -> Observe:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it says that keeping tensors is for debugging; one sample's are kept here
        interpreter = Interpreter(
            model_content=model.program,
            num_threads=1,
            experimental_preserve_all_tensors=True,
            # the delegate fuses tensors away; what it cannot show cannot be calibrated
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
    interpreter.allocate_tensors()
    entries = interpreter.get_input_details()
    endless = _endless_pads(model.program)
    watched = [(index, name) for index, name in _activations(model.program) if name not in endless]

    def observe(inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        for spec, entry in zip(model.inputs, entries, strict=True):
            interpreter.set_tensor(entry["index"], inputs[spec.name])
        interpreter.invoke()
        for index, name in watched:
            yield name, interpreter.get_tensor(index)

    return observe


def _activations(program: bytes) -> list[tuple[int, str]]:
    """(index, name) of every float tensor that an operator computes or the model takes."""
    from ai_edge_litert import schema_py_generated as schema

    graph = schema.ModelT.InitFromObj(schema.Model.GetRootAs(program, 0)).subgraphs[0]
    computed = {index for operator in graph.operators for index in operator.outputs} | set(graph.inputs)
    return [
        (index, graph.tensors[index].name.decode())
        for index in sorted(int(index) for index in computed)
        if graph.tensors[index].type == schema.TensorType.FLOAT32
    ]


def _endless_pads(program: bytes) -> dict[str, str]:
    """What pads with minus infinity makes -> what it pads: max pooling of values that may be negative.

    No range covers infinity, and none has to: on the grid of what is padded it becomes the least integer, above which
    every value of a window lies or with which it is equal, so that the maximum is that of the window without padding.
    """
    import numpy as np

    model = parse(program)
    graph = model.subgraphs[0]
    found: dict[str, str] = {}
    for operator, kind in zip(graph.operators, type_names(model), strict=True):
        data = model.buffers[graph.tensors[operator.inputs[2]].buffer].data if kind == "PADV2" else None
        if data is not None and np.isneginf(np.asarray(data, np.uint8).view(np.float32)).all():
            made, read = (graph.tensors[at[0]].name.decode() for at in (operator.outputs, operator.inputs))
            found[made] = found.get(read, read)
    return found


def _output_tensors(program: bytes) -> frozenset[str]:
    """The tensors that leave the model; their names are not those of its signature."""
    from ai_edge_litert import schema_py_generated as schema

    graph = schema.ModelT.InitFromObj(schema.Model.GetRootAs(program, 0)).subgraphs[0]
    return frozenset(graph.tensors[index].name.decode() for index in graph.outputs)


def _specs(program: bytes, model: Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=program, num_threads=1)
    pairs = (
        (model.inputs, interpreter.get_input_details()),
        (model.outputs, interpreter.get_output_details()),
    )
    inputs, outputs = (
        tuple(_spec(spec, detail) for spec, detail in zip(specs, details, strict=True))
        for specs, details in pairs
    )
    return inputs, outputs


def _spec(spec: TensorSpec, detail: Mapping[str, Any]) -> TensorSpec:
    dtype = detail["dtype"].__name__
    if dtype not in ("int8", "uint8"):
        return spec
    scale, zero_point = detail["quantization"]
    return replace(spec, dtype=dtype, affine=Affine(float(scale), int(zero_point)))
