# SPDX-License-Identifier: Apache-2.0
"""ONNX models in bfloat16: written for accelerators that have it, and rounded in float32 where a host has not.

- `to_bfloat16` writes weights and activations as bfloat16 wherever the ONNX operator takes that type; what does not
  stays in float32 between two casts and is named. Inputs and outputs of the model stay float32.
- `rounded` gives the same model for a runtime without bfloat16: float32 arithmetic, every tensor that was bfloat16
  rounded to it (nearest, ties to even) by a pair of casts. Accelerators add in float32 inside a product as well.

ONNX Runtime 1.32's CPU provider only moves bfloat16 (Cast, Reshape, Transpose, Concat, Clip, LayerNormalization by way
of float32 functions): Conv, MatMul, Gemm, Add, Mul, Relu, Sigmoid, Softmax and the pools have no kernel, and it inserts
no casts as it does for float16 (microsoft/onnxruntime#28768, and tried operator by operator).
Sources: Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training"; ONNX, operators of opset 22.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgeopt_wire.errors import UnsupportedError

OPSET = 22
"""The first in which convolutions and pools take bfloat16."""

IR_VERSION = 10  # that opset's

_FIXED = frozenset(
    {"ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"}
)
"""Their type is an attribute; they stay as they are."""


def to_bfloat16(program: Any, keep: Collection[str] = ()) -> tuple[Any, tuple[str, ...]]:
    """Write a float32 program in bfloat16; `keep` names operators that stay in float32.

    Returns the program and the names of the operators that stayed in float32.

    Raises:
        UnsupportedError: The model has branches or loops, or an operator that opset 22 does not have.
    """
    import onnx

    if any(entry.HasField("g") or entry.graphs for node in program.graph.node for entry in node.attribute):
        raise UnsupportedError(
            "bf16: the model has branches or loops (If, Loop, Scan), whose insides this pass does not write in "
            "bfloat16; fix the inputs that decide them in the recipe ([constants]), or ask for fp16"
        )
    try:
        lifted = onnx.version_converter.convert_version(program, OPSET)
        lifted = onnx.shape_inference.infer_shapes(lifted, strict_mode=True, data_prop=True)
    except Exception as error:  # the converter raises RuntimeError and its own types alike
        raise UnsupportedError(f"bf16: the model cannot be brought to ONNX opset {OPSET}: {error}") from error
    lifted.ir_version = IR_VERSION
    writer = _Writer(lifted, frozenset(keep))
    return writer.program(), tuple(writer.left)


def rounded(program: Any) -> Any:
    """The float32 twin of a program in bfloat16: the same roundings, in operators that every runtime has."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    twin = onnx.ModelProto()
    twin.CopyFrom(onnx.shape_inference.infer_shapes(program, strict_mode=True, data_prop=True))
    graph = twin.graph
    infos = (*graph.value_info, *graph.output)
    small = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes = []
    for node in graph.node:
        if node.op_type == "Cast":
            for entry in node.attribute:
                if entry.name == "to" and entry.i == TensorProto.BFLOAT16:
                    entry.i = TensorProto.FLOAT
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in small:
                node.output[place] = f"{name}_exact"
                nodes.append(
                    helper.make_node("Cast", [f"{name}_exact"], [f"{name}_bf16"], to=TensorProto.BFLOAT16)
                )
                nodes.append(helper.make_node("Cast", [f"{name}_bf16"], [name], to=TensorProto.FLOAT))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    del graph.value_info[:]
    return twin


class _Writer:
    """Rewrites node by node; a tensor exists in float32, in bfloat16, or in both with a cast between."""

    def __init__(self, program: Any, keep: frozenset[str]) -> None:
        from onnx import TensorProto

        self._program = program
        graph = program.graph
        infos = (*graph.value_info, *graph.input, *graph.output)
        self._floats = {i.name for i in infos if i.type.tensor_type.elem_type == TensorProto.FLOAT}
        self._weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self._floats |= self._weights.keys()
        self._small: dict[str, str] = {}  # float32 name -> the name of its bfloat16 form
        self._wide = {value.name for value in graph.input} | self._weights.keys()
        self._nodes: list[Any] = []
        self.left: list[str] = []
        for node in graph.node:
            self._write(node, is_kept=bool({node.name, node.op_type} & keep))
        for output in graph.output:
            self._widen(output.name)

    def program(self) -> Any:
        """Put nodes and weights in place."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        graph = self._program.graph
        used = {name for node in self._nodes for name in node.input}
        tensors = [t for t in graph.initializer if t.name in used]
        for name, small in self._small.items():
            if name in self._weights and small in used:
                values = numpy_helper.to_array(self._weights[name])
                data = values.astype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
                tensors.append(numpy_helper.from_array(data, small))
        kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in tensors]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        del graph.node[:]
        graph.node.extend(self._nodes)
        del graph.value_info[:]
        return onnx.shape_inference.infer_shapes(self._program, strict_mode=True, data_prop=True)

    def _write(self, source: Any, *, is_kept: bool) -> None:
        import onnx

        node = onnx.NodeProto()
        node.CopyFrom(source)
        takes, gives = _allowed(node)
        touches = any(name in self._floats for name in (*node.input, *node.output))
        fits = all(gives[place] for place, name in enumerate(node.output) if name in self._floats)
        if is_kept or not fits or node.op_type in _FIXED:
            if touches:
                self.left.append(node.name or node.op_type)
            for name in node.input:
                self._widen(name)
            self._nodes.append(node)
            self._wide.update(name for name in node.output if name in self._floats)
            return
        for place, name in enumerate(node.input):
            if name in self._floats and takes[place]:
                node.input[place] = self._narrow(name)
            else:
                self._widen(name)
        for entry in node.attribute:
            if node.op_type == "Cast" and entry.name == "to" and entry.i == onnx.TensorProto.FLOAT:
                entry.i = onnx.TensorProto.BFLOAT16
        for place, name in enumerate(node.output):
            if name in self._floats:
                self._small[name] = node.output[place] = f"{name}_bf16"
        self._nodes.append(node)

    def _narrow(self, name: str) -> str:
        """The name of the bfloat16 form of a tensor, cast here if nothing has made it yet."""
        from onnx import TensorProto, helper

        if name not in self._small:
            self._small[name] = f"{name}_bf16"
            if name not in self._weights:
                self._nodes.append(
                    helper.make_node(
                        "Cast", [name], [f"{name}_bf16"], f"{name}_cast", to=TensorProto.BFLOAT16
                    )
                )
        return self._small[name]

    def _widen(self, name: str) -> None:
        """Make sure that the float32 form of a tensor exists."""
        from onnx import TensorProto, helper

        if name in self._floats and name not in self._wide:
            self._wide.add(name)
            node = helper.make_node(
                "Cast", [self._small[name]], [name], f"{name}_widen", to=TensorProto.FLOAT
            )
            self._nodes.append(node)


def _allowed(node: Any) -> tuple[Mapping[int, bool], Mapping[int, bool]]:
    """Per input and output whether the operator's definition takes bfloat16 there."""
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    except onnx.defs.SchemaError as error:
        raise UnsupportedError(
            f"bf16: ONNX opset {OPSET} has no operator {node.domain}.{node.op_type}"
        ) from error

    def along(formal: Any, count: int) -> dict[int, bool]:
        # the last parameter of an operator with any number of them stands for the rest
        return {k: "tensor(bfloat16)" in formal[min(k, len(formal) - 1)].types for k in range(count)}

    return along(schema.inputs, len(node.input)), along(schema.outputs, len(node.output))
