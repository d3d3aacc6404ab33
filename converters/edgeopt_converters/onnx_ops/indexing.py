# SPDX-License-Identifier: Apache-2.0
"""Reading and writing by index; negative indices count from the end."""

from __future__ import annotations

from edgeopt_converters.onnx_ops import Call, Function, Tensor


def _gather(call: Call) -> Tensor:
    """A constant single index stays a plain select, which every runtime does for free; a table stays a table."""
    import torch
    from torch.nn import functional

    x = call.tensor(0)
    axis = call.get("axis", 0) % x.dim()
    known = call.constants[1]
    if known is not None and known.ndim == 0:
        return x.select(axis, int(known))
    indices = _positive(call.tensor(1), x.shape[axis])
    if axis == 0 and x.dim() == 2 and x.is_floating_point() and call.constants[0] is not None:
        return functional.embedding(indices, x)
    picked = torch.index_select(x, axis, indices.reshape(-1))
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(call: Call) -> Tensor:
    import torch

    x, axis = call.tensor(0), call.get("axis", 0)
    return torch.gather(x, axis, _positive(call.tensor(1), x.shape[axis]))


def _gather_nd(call: Call) -> Tensor:
    x, indices = call.tensor(0), call.tensor(1)
    if call.get("batch_dims", 0):
        raise call.refuse("batch_dims is not 0")
    return x[tuple(_positive(indices[..., axis], x.shape[axis]) for axis in range(indices.shape[-1]))]


def _scatter_elements(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.get("axis", 0)
    indices, updates = _positive(call.tensor(1), x.shape[axis]), call.tensor(2)
    how = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}.get(call.get("reduction", "none"))
    if how is None:
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, how)


def _scatter_nd(call: Call) -> Tensor:
    x, indices, updates = call.tensor(0), call.tensor(1), call.tensor(2)
    reduction = call.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise call.refuse(f"its reduction is {reduction!r}")
    where = tuple(_positive(indices[..., axis], x.shape[axis]) for axis in range(indices.shape[-1]))
    return x.index_put(where, updates, accumulate=reduction == "add")


def _one_hot(call: Call) -> Tensor:
    """An index beyond the depth gives a row without a one."""
    import torch

    depth = (call.integers(1) or [0])[0]
    values = call.tensor(2)
    hot = _positive(call.tensor(0), depth).unsqueeze(-1) == torch.arange(depth)
    return torch.where(hot.movedim(-1, call.get("axis", -1)), values[1], values[0])


def _positive(indices: Tensor, size: int) -> Tensor:
    import torch

    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


OPERATORS: dict[str, Function] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "OneHot": _one_hot,
}
