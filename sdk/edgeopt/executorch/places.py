# SPDX-License-Identifier: Apache-2.0
"""Where int8 goes in an exported graph, by what ExecuTorch's XNNPACK delegate computes in integers.

Rules (executorch 1.5, backends/xnnpack/partition/config; the tests ask the installed one again):
- Convolutions and linear layers with stored weights always compute in integers; sums, products, concatenations and means
  do where what they read is integers already, so that what is float stays float without conversions.
- A clamp that only a convolution, linear layer, sum or product feeds vanishes: the integers behind it end where it cuts.
- What moves or selects values (reshapes, max pooling, slices) and a clamp that stands alone share the grid of what they
  read; so do all inputs and the output of a concatenation, as XNNPACK demands.
- Zeros around the input of a convolution belong to the convolution: they are padded in integers.
- All else (sigmoid, softmax, average pooling, matrix products of two activations) computes in floats between
  conversions, and `edgeopt.coverage` says so.

Why not XNNPACKQuantizer? It leaves a clamp, which is what a ReLU6 exports as, behind the integers of its convolution
instead of in them, makes a padded convolution convert to float and back, and gives a mean the range of its input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeopt.onnx_select import Operator, choose

_CONVOLUTIONS = ("conv1d.default", "conv2d.default")
_TRANSPOSED = "conv_transpose2d.input"
_LINEAR = "linear.default"
_SUMS = ("add.Tensor", "sub.Tensor", "mul.Tensor")
_MEANS = ("mean.dim", "adaptive_avg_pool2d.default")
_CONCATENATION = "cat.default"
_MAXIMUM_CONCATENATED = 5
_CLAMPS = ("relu.default", "relu_.default", "clamp.default", "clamp_.default", "hardtanh.default", "hardtanh_.default", "relu6.default")  # fmt: skip
_MOVES = (
    "reshape.default", "view.default", "flatten.using_ints", "permute.default", "transpose.int", "unsqueeze.default",
    "squeeze.dim", "squeeze.dims", "slice.Tensor", "max_pool2d.default", "contiguous.default",
)  # fmt: skip
_PADS = ("pad.default", "constant_pad_nd.default")

_ONNX_TYPES = {
    "conv1d": "Conv", "conv2d": "Conv", "conv_transpose2d": "ConvTranspose", "linear": "Gemm", "add": "Add", "sub": "Sub",
    "mul": "Mul", "cat": "Concat", "embedding": "Gather", "mean": "GlobalAveragePool", "adaptive_avg_pool2d": "GlobalAveragePool",
}  # fmt: skip


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer: `axis` is that of its weights' output channels."""

    node: Any
    weight: Any
    bias: Any
    axis: int


@dataclass
class Places:
    """Nodes of a graph: what computes in integers, and which values are on a grid.

    `grids` maps a node to the name of its grid; `ends` maps an operator to the node whose value its integers hold, which
    lies behind clamps that vanish (`clamps`). `watched` are the nodes whose values make the range of their grid.
    """

    products: list[Product] = field(default_factory=list)
    ends: dict[Any, Any] = field(default_factory=dict)
    clamps: list[Any] = field(default_factory=list)
    watched: list[Any] = field(default_factory=list)
    _parents: dict[Any, Any] = field(default_factory=dict)

    @property
    def on_grid(self) -> tuple[Any, ...]:
        """Every node whose value is integers, in the order in which they were found."""
        return tuple(self._parents)

    def is_on_grid(self, node: Any) -> bool:
        """Whether a node's value is integers."""
        return node in self._parents

    def grid(self, node: Any) -> str:
        """The name of a node's grid: that of one node on it."""
        return str(self._root(node).name)

    def put(self, node: Any, *, with_grid_of: Any = None) -> None:
        """Give a node's value a grid of its own, or that of another node."""
        self._parents.setdefault(node, node)
        if with_grid_of is not None:
            self._parents.setdefault(with_grid_of, with_grid_of)
            self._parents[self._root(node)] = self._root(with_grid_of)

    def _root(self, node: Any) -> Any:
        while self._parents[node] is not node:
            node = self._parents[node]
        return node


def find_places(module: Any, exclude: Sequence[str] = ()) -> Places:
    """Decide for a graph module of the ATen dialect; `exclude` are selectors (`edgeopt.onnx_select`) of what stays float.

    Raises:
        RecipeError: A selector means nothing in this model.
    """
    nodes = list(module.graph.nodes)
    left = excluded(module, exclude)
    places = Places()
    for node in nodes:
        if node.op != "call_function" or node.name in left or not _is_float(node):
            continue
        product = _product(node)
        if product is not None:
            places.products.append(product)
            _compute(places, node, [source_of(node)])
        elif _computes(places, node):
            _compute(places, node, list(_activations(node)))
        elif _moves(places, node):
            places.put(node, with_grid_of=node.args[0])
    places.watched = [
        node
        for node in places.on_grid
        if node.op != "call_function" or kind_of(node) not in _MOVES or not places.is_on_grid(node.args[0])
    ]
    return places


def excluded(module: Any, exclude: Sequence[str]) -> frozenset[str]:
    """The names of the nodes that these selectors (`edgeopt.onnx_select`) choose.

    Raises:
        RecipeError: A selector means nothing in this model.
    """
    return choose(list(_operators(list(module.graph.nodes))), exclude) if exclude else frozenset()


def kind_of(node: Any) -> str:
    """The ATen operator of a node with its overload, "conv2d.default"; empty where it is none."""
    name = str(node.target)
    is_operator = node.op == "call_function" and name.startswith("aten.")
    return name.removeprefix("aten.") if is_operator else ""


def tensor_of(module: Any, node: Any) -> Any:
    """The tensor that a `get_attr` node of a graph module reads."""
    found = module
    for part in node.target.split("."):
        found = getattr(found, part)
    return found.detach()


def source_of(node: Any) -> Any:
    """The value that a convolution or linear layer reads, before zeros are padded around it."""
    source = node.args[0]
    return source.args[0] if _is_own_pad(source) else source


def bounds_of(node: Any) -> tuple[float, float]:
    """What a clamp cuts at."""
    name = kind_of(node).partition(".")[0].rstrip("_")
    if name == "relu":
        return 0.0, float("inf")
    if name == "relu6":
        return 0.0, 6.0
    low, high = (*node.args[1:], None, None)[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    if name == "hardtanh":
        low, high = node.kwargs.get("min_val", low), node.kwargs.get("max_val", high)
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    return (float("-inf") if low is None else float(low)), (float("inf") if high is None else float(high))


def _compute(places: Places, node: Any, sources: list[Any]) -> None:
    end = node
    while (clamp := _only_clamp(end)) is not None and kind_of(node) not in (*_MEANS, _CONCATENATION):
        places.clamps.append(clamp)
        end = clamp
    places.ends[node] = end
    for source in sources:
        places.put(source)
    places.put(end)
    if kind_of(node) == _CONCATENATION:
        for source in sources:
            places.put(source, with_grid_of=end)


def _only_clamp(node: Any) -> Any:
    """The one reader of a node if it is a clamp whose limits hold zero, as every grid does."""
    users = list(node.users)
    if len(users) != 1 or kind_of(users[0]) not in _CLAMPS:
        return None
    low, high = bounds_of(users[0])
    return users[0] if low <= 0 <= high else None


def _product(node: Any) -> Product | None:
    kind = kind_of(node)
    if kind not in (*_CONVOLUTIONS, _TRANSPOSED, _LINEAR):
        return None
    weight = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    is_stored = weight.op == "get_attr" and (bias is None or bias.op == "get_attr")
    if not is_stored:
        return None
    if kind == _TRANSPOSED:  # groups stand behind stride, padding and output padding
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        return Product(node, weight, bias, 1) if groups == 1 else None
    return Product(node, weight, bias, 0)


def _computes(places: Places, node: Any) -> bool:
    """Whether an operator that has weights of no kind computes in integers here."""
    kind = kind_of(node)
    sources = list(_activations(node))
    if kind in _SUMS:
        is_pair = len(node.args) == 2 and len(sources) == 2 and sources[0] is not sources[1]
        is_plain = node.kwargs.get("alpha", 1) == 1
        fits = is_pair and is_plain and all(_is_float(source) for source in sources)
    elif kind == _CONCATENATION:
        is_few = 2 <= len(set(sources)) == len(sources) <= _MAXIMUM_CONCATENATED
        fits = is_few and all(_is_float(source) and source.op == "call_function" for source in sources)
    elif kind in _MEANS:
        fits = _is_pooling(node)
    else:
        return False
    return fits and any(places.is_on_grid(source) for source in sources)


def _is_pooling(node: Any) -> bool:
    """Whether a mean is one over height and width that keeps them as axes of length one."""
    rank = len(_shape(node.args[0]))
    if kind_of(node) == "adaptive_avg_pool2d.default":
        return rank == 4 and list(_shape(node)[2:]) == [1, 1]
    axes = sorted(axis % rank for axis in node.args[1]) if rank == 4 else []
    return axes == [2, 3] and len(node.args) > 2 and bool(node.args[2]) and "dtype" not in node.kwargs


def _moves(places: Places, node: Any) -> bool:
    if kind_of(node) not in (*_MOVES, *_CLAMPS) or node in places.clamps:
        return False
    return places.is_on_grid(node.args[0])


def _is_own_pad(node: Any) -> bool:
    """Whether a node pads zeros around height and width for one reader alone."""
    if kind_of(node) not in _PADS or len(node.users) != 1:
        return False
    amounts = list(node.args[1])
    rest = [value for value in node.args[2:] if value is not None]
    mode = next((value for value in rest if isinstance(value, str)), "constant")
    value = next((value for value in rest if not isinstance(value, str)), node.kwargs.get("value") or 0.0)
    spatial = 2 * (len(_shape(node)) - 2)
    is_zero = mode == "constant" and float(value) == 0.0 and "mode" not in node.kwargs
    return is_zero and min(amounts) >= 0 and not any(amounts[spatial:])


def _activations(node: Any) -> Iterator[Any]:
    from torch.fx import Node

    listed = node.args[0] if kind_of(node) == _CONCATENATION else node.args
    return (argument for argument in listed if isinstance(argument, Node))


def _operators(nodes: Sequence[Any]) -> Iterator[Operator]:
    """The graph as selectors see it: by ONNX's types, and by PyTorch's."""
    outputs = {source for node in nodes if node.op == "output" for source in node.all_input_nodes}
    for node in nodes:
        if node.op != "call_function":
            continue
        name = kind_of(node).partition(".")[0]
        weight = _shape(node.args[1]) if name.startswith("conv") else ()
        groups = 1
        if name in ("conv1d", "conv2d"):
            groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        yield Operator(node.name, (_ONNX_TYPES.get(name, name), name), weight, groups, node in outputs)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(axis) for axis in node.meta["val"].shape) if "val" in node.meta else ()


def _is_float(node: Any) -> bool:
    import torch

    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
