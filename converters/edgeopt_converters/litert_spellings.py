# SPDX-License-Identifier: Apache-2.0
"""Spell a PyTorch graph so that litert-torch lowers it to few, fast operators that have integer kernels.

Each changes no value beyond the rounding of floats:
- GELU that is written out with erf becomes one GELU; else it is lowered to a polynomial of 25 operators.
- Max pooling behind what is never negative pads with zeros, which XNNPACK does, not with minus infinity; where LiteRT's
  SAME means the same padding, `litert_layout` leaves it to the pool.
- Average pooling over the whole image becomes a mean, whose int8 kernel has a grid of its own for its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

_TOLERANCE = 1e-4
"""Of a written-out constant: exporters write the root of two with few digits, and half floats have three."""


def respell(module: Any) -> Any:
    """Rewrite a graph module of ATen operators in place, and return it."""
    graph = module.graph
    for rewrite in (_gelus, _pooled_averages, _max_pools):
        for node in list(graph.nodes):
            if node.op == "call_function" and not node._erased:  # noqa: SLF001 - torch.fx offers no other way to ask
                rewrite(module, node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _gelus(module: Any, node: Any) -> None:
    """Find x * (1 + erf(x / sqrt 2)) / 2, with the factors in any order."""
    import torch

    aten = torch.ops.aten
    if node.target is not aten.erf.default:
        return
    inner, factor = _scaled(module, node.args[0])
    if inner is None or not math.isclose(factor, math.sqrt(0.5), rel_tol=_TOLERANCE):
        return
    shifted = _only_user(node, (aten.add.Tensor,))
    if shifted is None or _other(module, shifted, node) != 1.0:
        return
    last, found = shifted, 1.0
    seen = False
    while (product := _only_user(last, (aten.mul.Tensor, aten.div.Tensor, aten.div.Tensor_mode))) is not None:
        source, scale = _factor(module, product, last)
        half = _scaled(module, source) if source is not None else (None, 1.0)
        if source is inner or half[0] is inner:
            if seen or product.target is not aten.mul.Tensor:
                break
            seen, scale = True, 1.0 if source is inner else half[1]
        elif source is not None:
            break
        last, found = product, found * scale
        if seen and math.isclose(found, 0.5, rel_tol=_TOLERANCE):
            with module.graph.inserting_after(last):
                fused = module.graph.call_function(aten.gelu.default, (inner,))
            last.replace_all_uses_with(fused)
            return


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


def _scaled(module: Any, node: Any) -> tuple[Any, float]:
    """What a product or quotient with a constant scales, and the factor; (None, 1) for anything else."""
    import torch

    aten = torch.ops.aten
    if node.op != "call_function" or node.target not in (
        aten.mul.Tensor, aten.div.Tensor, aten.div.Tensor_mode, aten.mul.Scalar, aten.div.Scalar,
    ) or node.kwargs.get("rounding_mode"):  # fmt: skip
        return None, 1.0
    is_quotient = node.target not in (aten.mul.Tensor, aten.mul.Scalar)
    for source, other in (
        (node.args[0], node.args[1]),
        *(() if is_quotient else ((node.args[1], node.args[0]),)),
    ):
        value = _constant(module, other)
        if value and _constant(module, source) is None:
            return source, 1 / value if is_quotient else value
    return None, 1.0


def _factor(module: Any, product: Any, given: Any) -> tuple[Any, float]:
    """The other operand of a product or quotient: a tensor and 1, or nothing and a constant factor."""
    import torch

    value = _other(module, product, given)
    if isinstance(value, float):
        is_quotient = product.target is not torch.ops.aten.mul.Tensor
        return None, (1 / value if is_quotient and product.args[0] is given and value else value)
    return value, 1.0


def _other(module: Any, node: Any, given: Any) -> Any:
    """The operand that is not `given`, as a float where it is a constant of one value."""
    found = node.args[1] if node.args[0] is given else node.args[0]
    value = _constant(module, found)
    return found if value is None else value


def _constant(module: Any, found: Any) -> float | None:
    import torch

    if isinstance(found, int | float):
        return float(found)
    if not isinstance(found, torch.fx.Node) or found.op != "get_attr":
        return None
    value: Any = module
    for part in str(found.target).split("."):
        value = getattr(value, part)
    return float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else None


def _only_user(node: Any, targets: tuple[Callable[..., Any], ...]) -> Any:
    users = list(_users(node))
    return users[0] if len(users) == 1 and users[0].target in targets else None


def _users(node: Any) -> Iterator[Any]:
    return iter(node.users)


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
