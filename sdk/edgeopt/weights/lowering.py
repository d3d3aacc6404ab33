# SPDX-License-Identifier: Apache-2.0
"""ONNX nodes that compute with weights on a grid: what ONNX Runtime's CPU runs fast and right.

- A matrix product becomes MatMulNBits. With accuracy level 4 its inputs are rounded to int8 block by block and multiplied
  in integers; the other levels unpack to float and are slower than the float product (measured with 1.32 on AVX512-VNNI:
  384 x 1536, one row: 0.55 of the float time at level 4, 1.3 at the others; at 8 bits 0.8 and 8).
- A table of embeddings becomes GatherBlockQuantized, which unpacks only the rows that are asked for.
- An LSTM becomes DynamicQuantizeLSTM, int8 with a scale for each gate of each unit.
- Every other weight may be stored as int8 per output channel, followed by Cast and Mul, which ONNX Runtime computes
  once when it loads the model: a quarter of the file, then float. A product that is too narrow to gain from integers is
  stored in 4 bits in the same way. Why not DequantizeLinear: it is kept and computed anew in each run. Why not Cast from
  UINT4: it asks for opset 21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgeopt.weights import packing
from edgeopt.weights.grid import SMALLEST_SCALE, Grouped
from edgeopt_converters.onnx_subgraphs import graphs

if TYPE_CHECKING:
    import numpy as np

DOMAIN = "com.microsoft"
LARGEST = 127
SMALLEST_HALVED = 1e-3
"""Of the largest value of a constant in half precision, whose smallest steps are 6e-8."""


@dataclass(frozen=True)
class Lowered:
    """The nodes that take the place of one, and the tensors that they read."""

    nodes: tuple[Any, ...]
    tensors: tuple[Any, ...]


def product(node: Any, weight: Grouped, inputs: int, accuracy_level: int) -> Lowered:
    """A MatMul or Gemm (its bias with it) with `weight` (outputs, inputs) in groups."""
    import onnx

    grid = weight.grid
    is_rows = any(entry.name == "transB" and entry.i for entry in node.attribute)
    name = f"{node.input[1]}{'_rows' if is_rows else ''}"  # one weight may be read both ways
    tensors = [_tensor(packing.integers(weight), f"{name}_q"), _tensor(weight.scale, f"{name}_scale")]
    zeros = packing.zero_points(weight)
    if zeros is not None:
        tensors.append(_tensor(zeros, f"{name}_zero"))
    read = [node.input[0], *(tensor.name for tensor in tensors)]
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias:
        read += [""] * (5 - len(read)) + [bias]
    new = onnx.helper.make_node(
        "MatMulNBits", read, list(node.output), node.name, domain=DOMAIN,
        K=inputs, N=len(weight.scale), bits=grid.bits, block_size=grid.group, accuracy_level=accuracy_level,
    )  # fmt: skip
    return Lowered((new,), tuple(tensors))


def table(node: Any, weight: Grouped) -> Lowered:
    """A Gather of rows of a table (rows, width) in groups along the width."""
    import onnx

    grid = weight.grid
    name = f"{node.input[0]}_table"
    rows = packing.integers(weight).reshape(len(weight.scale), -1)
    tensors = [_tensor(rows, f"{name}_q"), _tensor(weight.scale, f"{name}_scale")]
    zeros = packing.zero_points(weight)
    if zeros is not None:
        tensors.append(_tensor(zeros, f"{name}_zero"))
    read = [tensors[0].name, node.input[1], *(tensor.name for tensor in tensors[1:])]
    new = onnx.helper.make_node(
        "GatherBlockQuantized", read, list(node.output), node.name, domain=DOMAIN,
        block_size=grid.group, bits=grid.bits, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    return Lowered((new,), tuple(tensors))


def recurrent(node: Any, weight: np.ndarray, recurrence: np.ndarray) -> Lowered:
    """An LSTM with weights (directions, 4 * units, inputs) and (directions, 4 * units, units)."""
    import numpy as np
    import onnx

    tensors = []
    for name, values in ((node.input[1], weight), (node.input[2], recurrence)):
        integers, scale = per_channel(values, axis=(0, 1))
        scale = scale[..., 0]
        tensors += [
            _tensor(np.ascontiguousarray(integers.transpose(0, 2, 1)), f"{name}_q"),
            _tensor(scale, f"{name}_scale"),
            _tensor(np.zeros(scale.shape, np.int8), f"{name}_zero"),
        ]
    names = [tensor.name for tensor in tensors]
    given = [*node.input, *[""] * (8 - len(node.input))]
    read = [given[0], names[0], names[3], *given[3:8], names[1], names[2], names[4], names[5]]
    new = onnx.helper.make_node("DynamicQuantizeLSTM", read, list(node.output), node.name, domain=DOMAIN)
    new.attribute.extend(entry for entry in node.attribute if entry.name != "layout")
    return Lowered((new,), tuple(tensors))


def stored(name: str, weight: np.ndarray, axis: tuple[int, ...]) -> Lowered:
    """A weight as int8 with a scale for every index of `axis`, unpacked to the float value `name` at loading."""
    import onnx

    integers, scale = per_channel(weight, axis)
    nodes = (
        onnx.helper.make_node(
            "Cast", [f"{name}_q"], [f"{name}_wide"], f"{name}_cast", to=onnx.TensorProto.FLOAT
        ),
        onnx.helper.make_node("Mul", [f"{name}_wide", f"{name}_scale"], [name], f"{name}_unpack"),
    )
    return Lowered(nodes, (_tensor(integers, f"{name}_q"), _tensor(scale, f"{name}_scale")))


def unpacked(name: str, weight: Grouped, *, is_rows: bool) -> Lowered:
    """A 4-bit weight in groups, unpacked to the float value `name` at loading: (outputs, inputs), else transposed.

    A byte holds a value of the first half of its group in its lower bits, and one of the second half above it.
    """
    import numpy as np
    import onnx

    outputs, groups, group = weight.integers.shape
    low, high = weight.integers[..., : group // 2], weight.integers[..., group // 2 :]
    make, last = onnx.helper.make_node, name if is_rows else f"{name}_rows"
    q, zero = f"{name}_q", f"{name}_zero"
    middle = (
        np.float32(weight.grid.middle) if weight.grid.symmetric else weight.zero[..., None].astype(np.float32)
    )
    scale = _halves(weight.scale[..., None])
    nodes = [
        make("Mod", [q, "edgeopt.sixteen"], [f"{q}_low"], f"{q}_low"),
        make("BitShift", [q, "edgeopt.four"], [f"{q}_high"], f"{q}_high", direction="RIGHT"),
        make("Concat", [f"{q}_low", f"{q}_high"], [f"{q}_both"], f"{q}_both", axis=-1),
        make("Cast", [f"{q}_both"], [f"{name}_wide"], f"{name}_cast", to=onnx.TensorProto.FLOAT),
        make("Sub", [f"{name}_wide", zero], [f"{name}_centred"], f"{name}_centre"),
        make("Cast", [f"{name}_scale"], [f"{name}_step"], f"{name}_step", to=onnx.TensorProto.FLOAT),
        make("Mul", [f"{name}_centred", f"{name}_step"], [f"{name}_real"], f"{name}_unpack"),
        make("Reshape", [f"{name}_real", f"{name}_shape"], [last], f"{name}_reshape"),
    ]
    if not is_rows:
        nodes.append(make("Transpose", [last], [name], f"{name}_turn", perm=[1, 0]))
    tensors = (
        _tensor(low | (high << 4), q),
        _tensor(scale, f"{name}_scale"),
        _tensor(np.asarray(middle), zero),
        _tensor(np.array([outputs, groups * group]), f"{name}_shape"),
        _tensor(np.array(16, np.uint8), "edgeopt.sixteen"),
        _tensor(np.array(4, np.uint8), "edgeopt.four"),
    )
    return Lowered(tuple(nodes), tensors)


def with_stored_scales(weight: Grouped) -> Grouped:
    """The weight with the scales that `unpacked` will store, which are rounded too."""
    import numpy as np

    return replace(weight, scale=_halves(weight.scale).astype(np.float32))


def halved(name: str, values: np.ndarray) -> Lowered | None:
    """Any other large constant in half precision, widened to the float value `name` at loading; None if it overflows."""
    import onnx

    half = _halves(values)
    if half.dtype == values.dtype:
        return None
    node = onnx.helper.make_node("Cast", [f"{name}_half"], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT)
    return Lowered((node,), (_tensor(half, f"{name}_half"),))


def _halves(values: np.ndarray) -> np.ndarray:
    """In half precision, 70 dB below what it stands for; as they are where that overflows, or all are tiny."""
    import numpy as np

    largest = float(np.abs(values).max(initial=0.0))
    return values.astype(np.float16) if SMALLEST_HALVED < largest < np.finfo(np.float16).max else values


def per_channel(weight: np.ndarray, axis: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8, nearest, and the scales, with one for every index of `axis` and 1 in the other axes."""
    import numpy as np

    others = tuple(number for number in range(weight.ndim) if number not in axis)
    scale = np.abs(weight).max(others, keepdims=True).astype(np.float32) / LARGEST
    scale = np.maximum(scale, np.float32(SMALLEST_SCALE))
    return np.clip(np.rint(weight / scale), -LARGEST, LARGEST).astype(np.int8), scale


def key(node: Any) -> str:
    """Return the first output that a node has: the name under which `swap` looks for it."""
    return next((str(name) for name in node.output if name), "")


def swap(program: Any, lowered: Mapping[str, Lowered]) -> None:
    """Put lowered nodes where the float ones stood, unpack stored weights first, drop tensors that nothing reads.

    `lowered` is by `key` of a node, or by the name of a stored weight. `program` is changed.
    """
    import onnx

    graph = program.graph
    nodes = [
        node for tensor in graph.initializer if tensor.name in lowered for node in lowered[tensor.name].nodes
    ]
    unpacked = {name for node in nodes for name in node.output}
    for inner in reversed(list(graphs(program))):  # an outer graph copies its nodes, inner graphs and all
        new = [] if inner is not graph else nodes
        for node in inner.node:
            new += lowered[key(node)].nodes if key(node) in lowered else (node,)
        new = [onnx.NodeProto.FromString(node.SerializeToString()) for node in new]
        del inner.node[:]
        inner.node.extend(new)
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in unpacked}
    tensors |= {tensor.name: tensor for found in lowered.values() for tensor in found.tensors}
    read = {name for inner in graphs(program) for node in inner.node for name in node.input}
    read |= {entry.name for inner in graphs(program) for entry in inner.output}
    kept = [
        onnx.TensorProto.FromString(tensor.SerializeToString())
        for tensor in tensors.values()
        if tensor.name in read
    ]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    if not any(entry.domain == DOMAIN for entry in program.opset_import):
        program.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _tensor(values: np.ndarray, name: str) -> Any:
    import onnx

    return onnx.numpy_helper.from_array(values, name)
