# SPDX-License-Identifier: Apache-2.0
"""Writing integers into an exported graph: quantize and dequantize nodes as ExecuTorch's partitioner looks for them.

Rules:
- Activations are int8 with a zero point, one scale a tensor; weights are stored as int8, symmetric, one scale an output
  channel, scale = max|w| / 127, so that weights which lie on that grid come out as exactly the integers they are.
- A value is quantized once and dequantized for every reader by itself: the delegate takes each dequantize with the
  operator that it feeds.
- Every product has a bias of its own: one that two products share would be lowered with the scales of the first.
- A channel's scale is never so small that its bias would not fit the 32 bits that it is added in (a channel of zeros).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeopt.executorch.places import Places, Product, bounds_of, source_of, tensor_of
from edgeopt.ranges import Range

LOWEST, HIGHEST = -128, 127
_LARGEST_WEIGHT = 127
_BIAS_ROOM = 2.0**30
"""A bias may take half of its 32 bits; the sums that are added to it need the rest."""
_SMALLEST_SCALE = 2.0**-30


@dataclass(frozen=True)
class Grid:
    """Real value = scale * (integer - zero_point), integers from -128 to 127."""

    scale: float
    zero_point: int

    @classmethod
    def of(cls, span: Range) -> Grid:
        """The grid that covers a range, which holds zero."""
        import numpy as np

        scale = float(np.float32(max((span.high - span.low) / (HIGHEST - LOWEST), _SMALLEST_SCALE)))
        return cls(scale, max(LOWEST, min(HIGHEST, round(LOWEST - span.low / scale))))

    @property
    def low(self) -> float:
        """The smallest value on it."""
        return self.scale * (LOWEST - self.zero_point)

    @property
    def high(self) -> float:
        """The largest value on it."""
        return self.scale * (HIGHEST - self.zero_point)


def write_grids(module: Any, places: Places, ranges: Mapping[str, Range]) -> None:
    """Put quantize and dequantize nodes into a graph module, in place; `ranges` has one for every grid by its name."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - it registers the operators

    grids = {node: Grid.of(ranges[places.grid(node)]) for node in places.on_grid}
    for number, product in enumerate(places.products):
        _store_weights(module, product, grids, places, number)
    clamps = set(places.clamps)
    for node in places.on_grid:
        _quantize(module.graph, node, grids[node], _clamped(module.graph, node, clamps, grids[node]))
    for clamp in reversed(places.clamps):
        module.graph.erase_node(clamp)
    module.graph.lint()
    module.recompile()


def channel_scales(weight: Any, axis: int, bias: Any, source: float, target: float) -> Any:
    """One scale an output channel for float weights of any shape, as a float32 tensor.

    `source` and `target` are the scales of what the product reads and writes, `bias` its float bias or None.
    """
    import torch

    others = [place for place in range(weight.dim()) if place != axis]
    scales = weight.abs().amax(dim=others) / _LARGEST_WEIGHT
    floor = torch.full_like(
        scales, _SMALLEST_SCALE * target / source
    )  # the smallest factor that XNNPACK takes is 2^-32
    if bias is not None:
        floor = torch.maximum(floor, bias.abs() / (source * _BIAS_ROOM))
    return torch.maximum(scales, floor).to(torch.float32)


def per_channel(module: Any, product: Product, scales: Any, number: int) -> Any:
    """Store a product's weights as int8 on these scales, one an output channel; gives the node of their real values."""
    import torch

    weight = tensor_of(module, product.weight)
    shape = [-1 if place == product.axis else 1 for place in range(weight.dim())]
    integers = torch.round(weight / scales.reshape(shape)).clamp(-_LARGEST_WEIGHT, _LARGEST_WEIGHT)
    stored = {
        f"edgeopt_weight_{number}": integers.to(torch.int8),
        f"edgeopt_scales_{number}": scales,
        f"edgeopt_zeros_{number}": torch.zeros_like(scales, dtype=torch.int64),
    }
    for name, tensor in stored.items():
        module.register_buffer(name, tensor)
    with module.graph.inserting_before(product.node):
        nodes = [module.graph.get_attr(name) for name in stored]
        return module.graph.call_function(
            torch.ops.quantized_decomposed.dequantize_per_channel.default,
            (*nodes, product.axis, -_LARGEST_WEIGHT, _LARGEST_WEIGHT, torch.int8),
        )


def _store_weights(
    module: Any, product: Product, grids: Mapping[Any, Grid], places: Places, number: int
) -> None:
    weight = tensor_of(module, product.weight)
    bias = None if product.bias is None else tensor_of(module, product.bias)
    source, target = grids[source_of(product.node)], grids[places.ends[product.node]]
    scales = channel_scales(weight, product.axis, bias, source.scale, target.scale)
    product.node.update_arg(1, per_channel(module, product, scales, number))
    if bias is not None:
        module.register_buffer(f"edgeopt_bias_{number}", bias.clone())
        with module.graph.inserting_before(product.node):
            own = module.graph.get_attr(f"edgeopt_bias_{number}")
        product.node.replace_input_with(product.bias, own)


def _clamped(graph: Any, node: Any, clamps: set[Any], grid: Grid) -> Any:
    """What writes a value once the clamps before it are gone: its operator, where the grid ends at their limits.

    Where it reaches further, because other values share it, one clamp stays, in the form that the delegate fuses.
    """
    import torch

    low, high = float("-inf"), float("inf")
    writer = node
    while writer in clamps:
        bounds = bounds_of(writer)
        low, high = max(low, bounds[0]), min(high, bounds[1])
        writer = writer.args[0]
    slack = grid.scale / 2
    if grid.low >= low - slack and grid.high <= high + slack:
        return writer
    operators = torch.ops.aten
    with graph.inserting_after(node):
        if (low, high) == (0.0, float("inf")):
            return graph.call_function(operators.relu.default, (writer,))
        return graph.call_function(operators.hardtanh.default, (writer, low, high))


def _quantize(graph: Any, node: Any, grid: Grid, writer: Any) -> None:
    import torch

    operators = torch.ops.quantized_decomposed
    readers = [reader for reader in node.users if reader is not writer]
    arguments = (grid.scale, grid.zero_point, LOWEST, HIGHEST, torch.int8)
    with graph.inserting_after(max(node, writer)):
        integers = graph.call_function(operators.quantize_per_tensor.default, (writer, *arguments))
    for reader in readers:
        with graph.inserting_before(reader):
            real = graph.call_function(operators.dequantize_per_tensor.default, (integers, *arguments))
        reader.replace_input_with(node, real)
