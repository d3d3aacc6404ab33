# SPDX-License-Identifier: Apache-2.0
"""Static int8 quantization of an ONNX model, in the QDQ form that ONNX Runtime and TensorRT fuse.

The ranges are ours (`edgeopt.calibrate`); where Q and DQ nodes stand is decided by ONNX Runtime's own quantizer,
because its fusions look for exactly that. Batch normalization and constants are folded first by its optimizer.

Sources: ONNX Runtime, "Quantize ONNX models" (QDQ placement, U8S8 on x86); TensorRT, "Working with quantized types"
(symmetric activations, weights per channel). Weights are symmetric per output channel, scale = max|w| / 127
(Jacob et al. 2018, section 2.1; Krishnamoorthi 2018, section 3.1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from edgeopt.calibrate import Judge, Stream, alarms, find_ranges
from edgeopt.channel_scales import channel_scales
from edgeopt.fake_quantize import FakeQuantized, Grid, read_quantized
from edgeopt.onnx_graphs import ends_observer, fold, observer
from edgeopt.onnx_select import select
from edgeopt.passes import Order, Result
from edgeopt.ranges import Range
from edgeopt.simulate.saturation import check_saturation
from edgeopt.training.spans import find_learned
from edgeopt.zero_points import symmetric_tensors
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, RuntimeFailure, UnsupportedError

FORMATS = ("onnx",)
EXTRA = "onnx"

ALSO_QUANTIZED = ("GlobalAveragePool",)
"""Operators that ONNX Runtime has in integers and its quantizer's list for QDQ leaves out."""

_WRITE_FLOATS = ("Gemm", "MatMul")

JUDGED_SAMPLES = 8
"""How many samples the choice of a range is judged on: 8 photos tell methods apart that differ by a tenth."""


def apply(model: Model, order: Order) -> Result:
    """Quantize activations and weights to 8 bits by the order's scheme; inputs and outputs stay float32.

    Raises:
        RecipeError: No calibration samples, or an excluded operator does not exist.
        UnsupportedError: The scheme asks for types that this pass does not do.
    """
    import onnx

    scheme = _checked(order.scheme)
    folded = fold(model.program)
    outputs = frozenset(output.name for output in folded.graph.output)
    needs_ends = order.calibration.method == "minmax" and not order.ranges
    observe = (ends_observer if needs_ends else observer)(
        folded, _places(folded, scheme, order.exclude) | outputs
    )
    ranges = find_ranges(
        observe,
        Stream(order.samples, order.checkpoint, order.on_sample),
        order.calibration,
        keep_full=outputs,
        symmetric=scheme.symmetric_activations,
        judge=_judge(folded, scheme, order),
    )
    learned = find_learned(order.ranges, observe, order.samples)
    ranges |= {name: span for name, span in learned.ranges.items() if name not in outputs}
    quantized = with_ranges(folded, scheme, ranges, order.exclude)
    onnx.checker.check_model(quantized)
    said = filter(None, (*_said(ranges, order), learned.sentence()))
    zero = _symmetric(folded, scheme, ranges, order.exclude)
    notes = (*_notes(folded, order.exclude, zero), *said, *alarms(ranges, outputs))
    result = replace(model, program=quantized)
    return Result(result, (*notes, *_saturation(result, scheme)), order.ranges)


def with_ranges(
    folded: Any, scheme: Scheme, ranges: Mapping[str, Range], exclude: tuple[str, ...] = ()
) -> Any:
    """Quantize a folded float program with ranges that are known; what `exclude` selects stays in float."""
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry

    left = set(_excluded(folded, exclude))
    layers = [node.name for node in folded.graph.node if node.name not in left]
    overrides = (
        channel_scales(folded, layers, pair_safe=scheme.pair_safe)
        if scheme.per_channel or scheme.pair_safe
        else {}
    )
    overrides |= {
        name: [{"quant_type": QuantType.QInt8, "symmetric": True}]
        for name in _symmetric(folded, scheme, ranges, exclude)
    }
    unused = dict.fromkeys(
        _tensors(folded), Range(-1.0, 1.0)
    )  # the quantizer looks at what it then fuses away
    data = {
        name: TensorData(lowest=_f32(span.low), highest=_f32(span.high))
        for name, span in (unused | dict(ranges)).items()
    }
    program = onnx.ModelProto()
    program.CopyFrom(folded)
    quantizer = QDQQuantizer(
        program,
        per_channel=scheme.per_channel,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType={"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}[scheme.activation_dtype],
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=_excluded(folded, exclude),
        op_types_to_quantize=[*QDQRegistry, *ALSO_QUANTIZED],
        extra_options={
            "ActivationSymmetric": scheme.symmetric_activations,
            "WeightSymmetric": True,
            "TensorQuantOverrides": overrides,
            # TensorRT wants both inputs of a residual addition and every Q and DQ of its own
            "DedicatedQDQPair": scheme.symmetric_activations,
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized = quantizer.model.model
    unknown = read_quantized(quantized).grids.keys() - ranges.keys()
    if unknown:
        raise RuntimeFailure(
            f"quantize_static: tensor {min(unknown)!r} is quantized and nothing gave its range"
        )
    _free_outputs(quantized, folded)
    quantized.producer_name, quantized.producer_version = "edgeopt", ""
    return quantized


def _symmetric(
    folded: Any, scheme: Scheme, ranges: Mapping[str, Range], exclude: tuple[str, ...]
) -> tuple[str, ...]:
    """Activations whose zero point must be 0, where not all are symmetric anyway."""
    if not scheme.zero_products or scheme.symmetric_activations:
        return ()
    return symmetric_tensors(folded, ranges, _excluded(folded, exclude))


def _saturation(model: Model, scheme: Scheme) -> tuple[str, ...]:
    """Prove from the weights alone that no pair of products can overflow, or say that it could not be proven."""
    if not scheme.pair_safe:
        return ()
    try:
        found = check_saturation(model, [])
    except (UnsupportedError, RecipeError) as error:
        return (f"not proven safe on x86 without VNNI: {error}",)
    return (found.sentence(),)


def _places(folded: Any, scheme: Scheme, exclude: tuple[str, ...]) -> frozenset[str]:
    """The tensors that get integers, read off a trial: what a runtime fuses away needs no range."""
    quick = replace(scheme, per_channel=False, pair_safe=False)  # scales of weights move no activation
    trial = with_ranges(folded, quick, dict.fromkeys(_tensors(folded), Range(-1.0, 1.0)), exclude)
    return frozenset(read_quantized(trial).grids)


def _tensors(folded: Any) -> list[str]:
    """Every tensor that flows, in order."""
    edges = [edge.name for edge in folded.graph.input]
    return [*edges, *(name for node in folded.graph.node for name in node.output if name)]


def _judge(folded: Any, scheme: Scheme, order: Order) -> Judge:
    """Choose ranges by the error of the model's outputs with one tensor on its grid and all else float."""

    def judge(candidates: Mapping[str, Sequence[Range]]) -> dict[str, Range]:
        import numpy as np

        first = {name: spans[0] for name, spans in candidates.items()}
        outputs = {output.name: Range(-1.0, 1.0) for output in folded.graph.output}
        places = read_quantized(with_ranges(folded, scheme, first | outputs, order.exclude)).grids
        lab = FakeQuantized(folded, places)
        samples = list(islice(order.samples, JUDGED_SAMPLES))
        exact = [lab.run(sample) for sample in samples]

        def error(name: str, span: Range) -> float:
            grids = {name: Grid.of_range(span.low, span.high, symmetric=scheme.symmetric_activations)}
            runs = zip(samples, exact, strict=True)
            return sum(
                float(np.square(values.astype(np.float64) - wanted[output]).sum())
                for sample, wanted in runs
                for output, values in lab.run(sample, grids).items()
            )

        return {
            name: min(spans, key=lambda span: error(name, span))
            if name in places and len(spans) > 1
            else spans[0]
            for name, spans in candidates.items()
        }

    return judge


def _said(ranges: Mapping[str, Range], order: Order) -> tuple[str, ...]:
    if order.calibration.method != "auto":
        return ()
    counts = Counter(span.method for span in ranges.values())
    return (
        "ranges chosen by the output's error: " + ", ".join(f"{n} by {m}" for m, n in counts.most_common()),
    )


def walks(order: Order, available: int) -> int:  # noqa: ARG001 - the same for every pass
    """How many samples `apply` walks over, for progress."""
    return available


def _checked(scheme: Scheme | None) -> Scheme:
    if scheme is None:
        raise RecipeError(
            "quantize_static needs a scheme; the device's profile names one for each int8 target"
        )
    if (
        scheme.weight_dtype != "int8"
        or scheme.activation_dtype not in ("uint8", "int8")
        or scheme.io != "float32"
    ):
        raise UnsupportedError(
            f"quantize_static makes int8 weights with uint8 or int8 activations and float32 inputs and outputs; "
            f"the scheme asks for {scheme.weight_dtype}/{scheme.activation_dtype}/{scheme.io}"
        )
    return scheme


def _free_outputs(program: Any, folded: Any) -> None:
    """Let a matrix product that makes an output of the model write floats, which the runtimes' integer kernels can.

    Eight bits for the logits were a fifth of all the error of EfficientNet-Lite0's activations, and an output that is
    not on a grid cannot be clipped. Where a Relu or Clip of `folded` makes the output, the grid stays: it clips for them.
    """
    writers = {name: node for node in program.graph.node for name in node.output}
    readers = [name for node in program.graph.node for name in node.input]
    makers = {name: node.op_type for node in folded.graph.node for name in node.output}
    outputs = [entry for entry in program.graph.output if makers.get(entry.name) in _WRITE_FLOATS]
    for output in outputs:
        dequantize = writers.get(output.name)
        quantize = writers.get(dequantize.input[0]) if dequantize is not None else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or quantize is None:
            continue
        source = writers.get(quantize.input[0])
        is_alone = readers.count(quantize.input[0]) == readers.count(quantize.output[0]) == 1
        if source is None or source.op_type not in _WRITE_FLOATS or not is_alone or output.name in readers:
            continue
        source.output[0] = output.name
        program.graph.node.remove(quantize)
        program.graph.node.remove(dequantize)
        unused = set(quantize.input[1:]) - {name for node in program.graph.node for name in node.input}
        for tensor in [tensor for tensor in program.graph.initializer if tensor.name in unused]:
            program.graph.initializer.remove(tensor)


def _excluded(program: Any, exclude: tuple[str, ...]) -> list[str]:
    return sorted(select(program, exclude))


def _notes(program: Any, exclude: tuple[str, ...], zero: tuple[str, ...]) -> tuple[str, ...]:
    left = f"left in float by the recipe: {', '.join(_excluded(program, exclude))}" if exclude else ""
    symmetric = f"int8 with zero point 0, as the runtime multiplies them: {', '.join(zero)}" if zero else ""
    return tuple(filter(None, (left, symmetric)))


def _f32(value: float) -> Any:
    import numpy as np

    return np.float32(value)
