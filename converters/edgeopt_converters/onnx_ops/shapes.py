# SPDX-License-Identifier: Apache-2.0
"""Operators that move values without computing: shapes, orders of axes, joins, cuts and padding."""

from __future__ import annotations

from math import prod

from edgeopt_converters.onnx_ops import Call, Function, Tensor

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _identity(call: Call) -> Tensor:
    return call.tensor(0)


def _dropout(call: Call) -> Tensor:
    """Nothing at inference."""
    training = call.constant(2)
    if call.outputs > 1 or (training is not None and bool(training)):
        raise call.refuse("it is in training mode; export the model in evaluation mode")
    return call.tensor(0)


def _reshape(call: Call) -> Tensor:
    """0 keeps an axis (unless `allowzero`), -1 is what remains."""
    x = call.tensor(0)
    wanted = call.integers(1, "shape") or []
    if not call.get("allowzero", 0):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def _transpose(call: Call) -> Tensor:
    x = call.tensor(0)
    return x.permute(tuple(call.get("perm", reversed(range(x.dim())))))


def _squeeze(call: Call) -> Tensor:
    x, axes = call.tensor(0), call.integers(1, "axes")
    if axes is None:
        return x.squeeze()
    return x.squeeze(tuple(axes)) if axes else x


def _unsqueeze(call: Call) -> Tensor:
    x, axes = call.tensor(0), call.integers(1, "axes") or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(call: Call) -> Tensor:
    import torch

    return torch.cat(call.tensors(), call.get("axis", 0))


def _split(call: Call) -> tuple[Tensor, ...]:
    """By sizes, or into equal parts with a smaller last one."""
    import torch

    x, axis = call.tensor(0), call.get("axis", 0)
    sizes = call.integers(1, "split")
    if sizes is None:
        each = -(-x.shape[axis] // call.get("num_outputs", call.outputs))
        sizes = [min(each, x.shape[axis] - start) for start in range(0, x.shape[axis], each)]
    return tuple(torch.split(x, sizes, axis))


def _slice(call: Call) -> Tensor:
    """Negative steps walk backwards; starts and ends are clamped, as in NumPy."""
    import torch

    x = call.tensor(0)
    starts, ends = call.integers(1, "starts") or [], call.integers(2, "ends") or []
    axes = call.integers(3, "axes") or list(range(len(starts)))
    steps = call.integers(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        where = range(
            *slice(start, end if step > 0 or end >= -x.shape[axis] else None, step).indices(x.shape[axis])
        )
        if step > 0:
            index = [slice(None)] * x.dim()
            index[axis] = slice(where.start, max(where.stop, where.start), step)
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.tensor(list(where), dtype=torch.int64))
    return x


def _pad(call: Call) -> Tensor:
    from torch.nn import functional

    x, mode = call.tensor(0), call.get("mode", "constant")
    given = call.integers(1, "pads") or []
    axes = call.integers(3) or list(range(len(given) // 2))
    value = call.constant(2)
    fill = call.get("value", 0.0) if value is None else value.reshape(-1)[0].item()
    pairs = {axis % x.dim(): (given[i], given[i + len(axes)]) for i, axis in enumerate(axes)}
    if mode not in _PAD_MODES:
        raise call.refuse(f"its mode {mode!r} is unknown")
    if mode == "constant":
        order = [size for axis in reversed(range(x.dim())) for size in pairs.get(axis, (0, 0))]
        return functional.pad(x, order, value=fill)
    return _pad_by_index(x, pairs, mode)


def _pad_by_index(x: Tensor, pairs: dict[int, tuple[int, int]], mode: str) -> Tensor:
    """PyTorch pads only some ranks with values of the tensor itself; picking rows by index does all."""
    import torch

    for axis, (before, after) in pairs.items():
        if before == after == 0:
            continue
        size = x.shape[axis]
        rows = torch.arange(-before, size + after)
        if mode == "edge":
            rows = rows.clamp(0, size - 1)
        elif mode == "wrap":
            rows = rows % size
        else:
            period = max(2 * (size - 1), 1)
            rows = rows % period
            rows = torch.where(rows >= size, period - rows, rows)
        x = x.index_select(axis, rows)
    return x


def _expand(call: Call) -> Tensor:
    """Two-way broadcasting: an axis of 1 in the wanted shape keeps the tensor's."""
    import torch

    x = call.tensor(0)
    return x.expand(torch.broadcast_shapes(x.shape, tuple(call.integers(1) or [])))


def _tile(call: Call) -> Tensor:
    return call.tensor(0).repeat(call.integers(1) or [])


def _depth_to_space(call: Call) -> Tensor:
    x, block = call.tensor(0), call.get("blocksize", 1)
    batch, channels, height, width = x.shape
    depth = channels // block**2
    if call.get("mode", "DCR") == "DCR":
        parts = x.reshape(batch, block, block, depth, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(batch, depth, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, depth, height * block, width * block)


def _space_to_depth(call: Call) -> Tensor:
    x, block = call.tensor(0), call.get("blocksize", 1)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // block, block, width // block, block)
    parts = parts.permute((0, 3, 5, 1, 2, 4) if call.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4))
    return parts.reshape(batch, channels * block**2, height // block, width // block)


def _trilu(call: Call) -> Tensor:
    import torch

    diagonal = (call.integers(1) or [0])[0]
    return (torch.triu if call.get("upper", 1) else torch.tril)(call.tensor(0), diagonal)


OPERATORS: dict[str, Function] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _trilu,
}
