# SPDX-License-Identifier: Apache-2.0
"""Reductions over axes, arg-reductions, running sums and the largest values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from edgeopt_converters.onnx_ops import Call, Function, Tensor

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduce(reduction: Reduction, call: Call) -> Tensor:
    """Axes are an attribute before opset 18 (ReduceSum: 13) and an input after; none means all, or nothing to do."""
    x = call.tensor(0)
    axes = call.integers(1, "axes")
    if not axes:
        if call.get("noop_with_empty_axes", 0):
            return reduction(
                x.unsqueeze(0), (0,), False
            )  # over nothing: only what is done to each value remains
        axes = list(range(x.dim()))
    return reduction(x, tuple(axes), bool(call.get("keepdims", 1)))


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.mean(axes, keepdim=keep) if axes else x


def _max(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.amax(axes, keepdim=keep) if axes else x


def _min(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.amin(axes, keepdim=keep) if axes else x


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.square(), axes, keep).sqrt()


def _sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.square(), axes, keep)


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x, axes, keep).log()


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.logsumexp(axes, keepdim=keep)


def _arg(function: str, call: Call) -> Tensor:
    import torch

    x, axis = call.tensor(0), call.get("axis", 0)
    keep = bool(call.get("keepdims", 1))
    if not call.get("select_last_index", 0):
        return getattr(torch, function)(x, axis, keepdim=keep)
    return x.shape[axis] - 1 - getattr(torch, function)(x.flip(axis), axis, keepdim=keep)


def _top_k(call: Call) -> tuple[Tensor, Tensor]:
    """Equal values: the lower index comes first, which PyTorch promises of its stable sort only."""
    import torch

    counts = call.integers(1, "k") or []
    axis = call.get("axis", -1)
    values, indices = torch.sort(
        call.tensor(0), dim=axis, descending=bool(call.get("largest", 1)), stable=True
    )
    return values.narrow(axis, 0, counts[0]), indices.narrow(axis, 0, counts[0])


def _cumulative_sum(call: Call) -> Tensor:
    import torch

    x, axis = call.tensor(0), (call.integers(1) or [0])[0]
    is_reverse = bool(call.get("reverse", 0))
    if is_reverse:
        x = x.flip(axis)
    found = torch.cumsum(x, axis, dtype=x.dtype)
    if call.get("exclusive", 0):
        found = found - x
    return found.flip(axis) if is_reverse else found


OPERATORS: dict[str, Function] = {
    "ReduceSum": partial(_reduce, _sum),
    "ReduceMean": partial(_reduce, _mean),
    "ReduceMax": partial(_reduce, _max),
    "ReduceMin": partial(_reduce, _min),
    "ReduceProd": partial(_reduce, _prod),
    "ReduceL1": partial(_reduce, _l1),
    "ReduceL2": partial(_reduce, _l2),
    "ReduceSumSquare": partial(_reduce, _sum_square),
    "ReduceLogSum": partial(_reduce, _log_sum),
    "ReduceLogSumExp": partial(_reduce, _log_sum_exp),
    "ArgMax": partial(_arg, "argmax"),
    "ArgMin": partial(_arg, "argmin"),
    "TopK": _top_k,
    "CumSum": _cumulative_sum,
}
