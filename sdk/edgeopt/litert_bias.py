# SPDX-License-Identifier: Apache-2.0
"""Take the mean error of layers that make outputs into their biases, which are floats in a file with float ends.

Rounding shifts outputs by amounts that are the same for every input; what a calibration walk sees of that costs nothing
to take away (Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2).
A mean over few samples is uncertain, so it is shrunk by what of its size chance explains (James and Stein 1961).

EfficientNet-Lite2, 125 photos correct and 375 others evaluate: 22.2 dB instead of 21.4, agreement 0.984 instead of 0.979.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt_converters.litert_file import pack, parse
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Samples = Iterable[Mapping[str, np.ndarray]]
    Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]

LEAST_SAMPLES = 8
"""Fewer tell nothing of the mean's uncertainty."""

BIAS = 2
"""Which input of a layer it is."""


def correct(
    floats: bytes, quantized: bytes, layers: Sequence[str], inputs: Sequence[TensorSpec], samples: Samples
) -> tuple[bytes, str]:
    """Return the quantized program with corrected biases, and a sentence for the report (empty where nothing changed).

    Args:
        floats: The float program.
        quantized: What was made of it; takes and gives floats.
        layers: The names of the first outputs of fully connected layers that write floats in both.
        inputs: The inputs of both, in order.
        samples: What they are run with; at least `LEAST_SAMPLES`, or nothing changes.
    """
    model = parse(quantized)
    biased = [name for name in layers if _bias(model, name) is not None]
    if not biased:
        return quantized, ""
    errors = _mean_errors(_runner(floats, biased, inputs), _runner(quantized, biased, inputs), samples)
    for name, error in zip(biased, errors, strict=True):
        _add(model, name, error)
    if not any(error.any() for error in errors):
        return quantized, ""
    return pack(model), f"mean error of {len(biased)} output layers taken into their biases"


def with_biases_of(floats: bytes, quantized: bytes, layers: Iterable[str]) -> bytes:
    """The float program with the corrected biases of layers, so that what is quantized of it has them."""
    model, source = parse(floats), parse(quantized)
    for name in layers:
        bias, corrected = _bias(model, name), _bias(source, name)
        if bias is not None and corrected is not None:
            _add(model, name, corrected - bias)
    return pack(model)


def _mean_errors(exact: Run, found: Run, samples: Samples) -> list[np.ndarray]:
    """What to add to each layer's bias, (outputs,) each."""
    import numpy as np

    rows: list[list[np.ndarray]] = []
    for sample in samples:
        pairs = zip(exact(sample), found(sample), strict=True)
        rows.append([
            (wanted.astype(np.float64) - given).reshape(-1, wanted.shape[-1]).mean(0) for wanted, given in pairs
        ])  # fmt: skip
    errors = []
    for layer in zip(*rows, strict=True):
        values = np.stack(layer)
        mean = values.mean(0)
        by_chance = values.var(0, ddof=1).sum() / len(values) if len(values) >= LEAST_SAMPLES else np.inf
        size = float(np.square(mean).sum())
        errors.append(mean * max(0.0, 1 - by_chance / size) if size else 0 * mean)
    return errors


def _runner(program: bytes, layers: Sequence[str], inputs: Sequence[TensorSpec]) -> Run:
    """Run a program up to some tensors, with the kernels that a device would take."""
    from ai_edge_litert.interpreter import Interpreter

    model = parse(program)
    graph = model.subgraphs[0]
    numbers = {tensor.name.decode(): number for number, tensor in enumerate(graph.tensors)}
    graph.outputs = [numbers[name] for name in layers]
    model.signatureDefs = None
    interpreter = Interpreter(model_content=pack(model), num_threads=1)
    interpreter.allocate_tensors()
    entries, leaves = interpreter.get_input_details(), [numbers[name] for name in layers]

    def run(sample: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        for spec, entry in zip(inputs, entries, strict=True):
            interpreter.set_tensor(entry["index"], sample[spec.name])
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in leaves]

    return run


def _layer(model: Any, name: str) -> Any:
    graph = model.subgraphs[0]
    return next(op for op in graph.operators if graph.tensors[op.outputs[0]].name.decode() == name)


def _bias(model: Any, name: str) -> np.ndarray | None:
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    found = _layer(model, name).inputs
    if len(found) <= BIAS or found[BIAS] < 0:
        return None
    tensor = model.subgraphs[0].tensors[found[BIAS]]
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0 or tensor.type != schema.TensorType.FLOAT32:
        return None
    return np.asarray(data, np.uint8).view(np.float32)


def _add(model: Any, name: str, change: np.ndarray) -> None:
    """Add to a layer's bias, in a tensor of its own: two layers may share one."""
    import copy

    import numpy as np

    layer, graph = _layer(model, name), model.subgraphs[0]
    bias = _bias(model, name)
    assert bias is not None
    tensor = copy.copy(graph.tensors[layer.inputs[BIAS]])
    buffer = copy.copy(model.buffers[tensor.buffer])
    buffer.data = (bias + change).astype(np.float32).view(np.uint8)
    model.buffers.append(buffer)
    tensor.buffer, tensor.name = len(model.buffers) - 1, f"{tensor.name.decode()}_corrected".encode()
    graph.tensors.append(tensor)
    layer.inputs = [int(index) for index in layer.inputs]
    layer.inputs[BIAS] = len(graph.tensors) - 1
