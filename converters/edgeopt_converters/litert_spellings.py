# SPDX-License-Identifier: Apache-2.0
"""Spell a PyTorch graph so that litert-torch lowers it to few, fast operators that have integer kernels.

Each changes no value beyond the rounding of floats:
- GELU that is written out with erf becomes one (`torch_spellings`); else it is lowered to a polynomial of 25 operators.
- Max pooling behind what is never negative pads with zeros, which XNNPACK does, not with minus infinity; where LiteRT's
  SAME means the same padding, `litert_layout` leaves it to the pool.
- Average pooling over the whole image becomes a mean, whose int8 kernel has a grid of its own for its output.
"""

from __future__ import annotations

import math
from typing import Any

from edgeopt_converters.torch_spellings import spell_gelus


def respell(module: Any) -> Any:
    """Rewrite a graph module of ATen operators in place, and return it."""
    graph = module.graph
    spell_gelus(module)
    for rewrite in (_pooled_averages, _max_pools):
        for node in list(graph.nodes):
            if node.op == "call_function":
                rewrite(module, node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _pooled_averages(module: Any, node: Any) -> None:
    import torch

    aten = torch.ops.aten
    if node.target is not aten.avg_pool2d.default:
        return
    source, kernel = node.args[0], node.args[1]
    shape = _shape(source)
    pads = node.args[3] if len(node.args) > 3 else (0, 0)
    if len(shape) != 4 or tuple(shape[2:]) != _pair(kernel) or any(_pair(pads)) or len(node.args) > 6:
        return
    with module.graph.inserting_before(node):
        mean = module.graph.call_function(aten.mean.dim, (source, [2, 3], True))
    mean.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(mean)


def _max_pools(module: Any, node: Any) -> None:
    """Make padding behind what is never negative a padding with zeros."""
    import torch

    aten = torch.ops.aten
    if (
        node.target is aten.pad.default
        and node.args[3:4] == (-math.inf,)
        and _is_never_negative(node.args[0])
    ):
        if all(user.target is aten.max_pool2d.default for user in node.users):
            node.args = (*node.args[:3], 0.0)
        return
    if node.target is not aten.max_pool2d.default or not any(_pair(_argument(node, 3, 0))):
        return
    source = node.args[0]
    if len(_shape(source)) != 4 or not _is_never_negative(source) or _argument(node, 5, False):
        return
    if _is_same(node):
        return
    high, wide = _pair(node.args[3])
    with module.graph.inserting_before(node):
        padded = module.graph.call_function(
            aten.pad.default, (source, [wide, wide, high, high], "constant", 0.0)
        )
    batch, channels, *size = _shape(source)
    padded.meta["val"] = torch.empty((batch, channels, size[0] + 2 * high, size[1] + 2 * wide), device="meta")
    node.args = (padded, *node.args[1:3], [0, 0], *node.args[4:])


def _is_same(pool: Any) -> bool:
    """Whether a pool's padding is what SAME means: as many rows as the last window lacks, half on each side."""
    windows, pads = _pair(pool.args[1]), _pair(pool.args[3])
    strides = _pair(_argument(pool, 2, ()) or pool.args[1])
    lacking = [
        (-(-size // stride) - 1) * stride + window - size
        for size, window, stride in zip(_shape(pool.args[0])[2:], windows, strides, strict=True)
    ]
    return _pair(_argument(pool, 4, 1)) == (1, 1) and lacking == [2 * pad for pad in pads]


def _is_never_negative(node: Any) -> bool:
    import torch

    aten = torch.ops.aten
    if node.target in (aten.max_pool2d.default, aten.dropout.default, aten.clone.default):
        return _is_never_negative(node.args[0])
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        low = _argument(node, 1, None)
        return isinstance(low, int | float) and low >= 0
    return node.target in (
        aten.relu.default, aten.relu_.default, aten.relu6.default, aten.sigmoid.default, aten.hardsigmoid.default,
        aten.softmax.int, aten.abs.default,
    )  # fmt: skip


def _argument(node: Any, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _shape(node: Any) -> tuple[int, ...]:
    value = getattr(node, "meta", {}).get("val")
    shape: Any = getattr(value, "shape", ())
    return tuple(shape)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1]) if len(value) else (0, 0)
