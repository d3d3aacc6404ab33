# SPDX-License-Identifier: Apache-2.0
"""What several passes need of an ONNX model: folding it, and seeing what flows through it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.calibrate import Observe
from edgeopt.fusion import Fused, fuse

if TYPE_CHECKING:
    import numpy as np


OLDEST_OPSET = 13
"""The first in which QuantizeLinear and DequantizeLinear take a scale per channel."""


OURS = (
    "ConvBNFusion",
    "ConvMulFusion",
    "ConvAddFusion",
    "MatMul_BatchNormalization_Fusion",
    "Pad_Fusion",
)
"""ONNX Runtime's rules in whose place stands `edgeopt.fusion`: they do not say what they did, and fold into infinity."""


def fold(program: Any) -> Any:
    """Fold constants, fuse (`edgeopt.fusion`), let ONNX Runtime's basic optimizer finish, then infer shapes.

    A model of an older opset is brought to `OLDEST_OPSET` first.
    """
    return fold_and_tell(program).program


def fold_and_tell(program: Any, *, running_statistics: bool = False) -> Fused:
    """Do what `fold` does and say what was fused."""
    import onnx

    opsets = {entry.domain: entry.version for entry in program.opset_import}
    if opsets.get("", OLDEST_OPSET) < OLDEST_OPSET:
        program = onnx.version_converter.convert_version(program, OLDEST_OPSET)
    fused = fuse(_inferred(_optimized(program)), running_statistics=running_statistics)
    if not fused.counts:
        return fused
    return replace(fused, program=_inferred(_optimized(fused.program)))


def unfused(program: Any) -> Any:
    """Fold constants and infer shapes, and leave batch normalizations where they stand."""
    return _inferred(_optimized(program))


def _optimized(program: Any) -> Any:
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
        folded = Path(folder) / "folded.onnx"
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.log_severity_level = 3
        ort.InferenceSession(
            program.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(OURS),
        )
        return _named(onnx.load(folded))


def _named(program: Any) -> Any:
    """Give nodes without a name that of their first output: what selects or leaves out nodes knows them by name."""
    taken = {node.name for node in program.graph.node}
    for node in program.graph.node:
        if not node.name:
            wanted = f"{node.op_type}_{node.output[0]}"
            node.name = wanted if wanted not in taken else f"{wanted}_{len(taken)}"
            taken.add(node.name)
    return program


def _inferred(program: Any) -> Any:
    import onnx

    return onnx.shape_inference.infer_shapes(program, strict_mode=True, data_prop=True)


def observer(program: Any, names: frozenset[str] | None = None) -> Observe:
    """Run the float model with every float activation as an output, or only those named; inputs are seen too."""
    import onnx
    import onnxruntime as ort

    watched = onnx.ModelProto()
    watched.CopyFrom(program)
    types = {info.name: info.type.tensor_type for info in (*program.graph.value_info, *program.graph.output)}
    known = {output.name for output in program.graph.output}
    for name in (name for node in program.graph.node for name in node.output):
        tensor = types.get(name)
        is_float = tensor is None or tensor.elem_type == onnx.TensorProto.FLOAT
        if name and name not in known and is_float and (names is None or name in names):
            watched.graph.output.append(onnx.ValueInfoProto(name=name))
    # optimized: what is watched keeps its value, and a photo takes half the time
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    def observe(inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        for name, values in (*inputs.items(), *zip(outputs, session.run(outputs, dict(inputs)), strict=True)):
            if values.dtype.kind == "f" and (names is None or name in names):
                yield name, values

    return observe


def ends_observer(program: Any, names: frozenset[str]) -> Observe:
    """Like `observer`, but the runtime itself finds the lowest and the highest value: (name, those two).

    Much faster than to bring the values out, for whoever wants no more of them. Inputs and outputs of the model come
    whole, so that NaN, which a runtime's minimum may pass over, is still seen.
    """
    import numpy as np
    import onnx

    reduced = onnx.ModelProto()
    reduced.CopyFrom(program)
    whole = {entry.name for entry in (*program.graph.input, *program.graph.output)}
    made = [name for node in program.graph.node for name in node.output if name in names - whole]
    for name in made:
        for kind in ("Min", "Max"):
            target = f"{name}/edgeopt.{kind}"
            reduced.graph.node.append(onnx.helper.make_node(f"Reduce{kind}", [name], [target], keepdims=0))
            reduced.graph.output.append(
                onnx.helper.make_tensor_value_info(target, onnx.TensorProto.FLOAT, [])
            )
    ends_of = frozenset(output.name for output in reduced.graph.output) - whole
    observe = observer(reduced, ends_of | (names & whole))

    def ends(inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        found = dict(observe(inputs))
        yield from ((name, values) for name, values in found.items() if name not in ends_of)
        for name in made:
            yield name, np.array([found[f"{name}/edgeopt.{kind}"] for kind in ("Min", "Max")])

    return ends


def channel_extremes(
    observe: Observe, samples: Iterable[Mapping[str, np.ndarray]], on_sample: Callable[[], None]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The smallest and largest value of every channel (axis 1) of what is observed, over all samples."""
    import numpy as np

    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for sample in samples:
        for name, values in observe(sample):
            axes = (0, *range(2, values.ndim))
            low, high = values.min(axis=axes), values.max(axis=axes)
            if name in found:
                low, high = np.minimum(found[name][0], low), np.maximum(found[name][1], high)
            found[name] = (low, high)
        on_sample()
    return found
