# SPDX-License-Identifier: Apache-2.0
"""GELU that is written out with erf, as ONNX files have it, spelled as the one operator that runtimes are fast at.

Written out, ExecuTorch computes erf in a scalar kernel of its own, and litert-torch lowers it to 25 operators. No value
changes beyond the rounding of floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

_TOLERANCE = 1e-4
"""Of a written-out constant: exporters write the root of two with few digits, and half floats have three."""


def spell_gelus(module: Any) -> None:
    """Rewrite a graph module of ATen operators in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and not node._erased:  # noqa: SLF001 - torch.fx offers no other way to ask
            _spell(module, node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _spell(module: Any, node: Any) -> None:
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
