# SPDX-License-Identifier: Apache-2.0
"""Pooling, and the padding rules that it shares with convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from edgeopt_converters.onnx_ops import Call, Function, Tensor


def explicit_pads(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """ONNX's pads, all begins and then all ends, with `auto_pad` worked out."""
    mode = call.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(call.get("pads", [0] * (2 * len(kernel))))
    if mode == "VALID":
        return [0] * (2 * len(kernel))
    totals = [
        max(0, (-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size)
        for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    small = [total // 2 for total in totals]
    large = [total - half for total, half in zip(totals, small, strict=True)]
    return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]


def is_symmetric(pads: Sequence[int]) -> bool:
    """Whether both ends of every axis get the same."""
    return list(pads[: len(pads) // 2]) == list(pads[len(pads) // 2 :])


def pad_spatial(x: Tensor, pads: Sequence[int], value: float) -> Tensor:
    """Pad (or cut, where negative) the last axes; `pads` as in ONNX: all begins and then all ends."""
    from torch.nn import functional

    rank = len(pads) // 2
    order = [pads[axis + end * rank] for axis in reversed(range(rank)) for end in (0, 1)]
    return functional.pad(x, order, value=value)


def _max_pool(call: Call) -> Tensor:
    from torch.nn import functional

    if call.outputs > 1:
        raise call.refuse("the indices of the maxima are asked for; PyTorch counts them otherwise")
    x, kernel, strides, dilations, pads = _window(call)
    rank = len(kernel)
    if not is_symmetric(pads) or any(2 * pad > width for pad, width in zip(pads, kernel, strict=False)):
        x, pads = pad_spatial(x, pads, float("-inf")), [0] * (2 * rank)
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    return function(x, kernel, strides, pads[:rank], dilations, bool(call.get("ceil_mode", 0)))


def _average_pool(call: Call) -> Tensor:
    """Where padding does not count, the sum is divided by the number of real values under the window."""
    import torch
    from torch.nn import functional

    x, kernel, strides, dilations, pads = _window(call)
    rank = len(kernel)
    if any(dilation != 1 for dilation in dilations):
        raise call.refuse("dilated average pooling does not exist in PyTorch")
    counts_pads, ceil = bool(call.get("count_include_pad", 0)), bool(call.get("ceil_mode", 0))
    function = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]
    if is_symmetric(pads) and all(2 * pad <= width for pad, width in zip(pads, kernel, strict=False)):
        return function(x, kernel, strides, pads[:rank], ceil, counts_pads)
    padded = pad_spatial(x, pads, 0.0)
    if counts_pads:
        return function(padded, kernel, strides, 0, ceil, True)
    real = pad_spatial(torch.ones_like(x[:1, :1]), pads, 0.0)
    return function(padded, kernel, strides, 0, ceil) / function(real, kernel, strides, 0, ceil)


def _window(call: Call) -> tuple[Tensor, list[int], list[int], list[int], list[int]]:
    x = call.tensor(0)
    kernel = list(call.get("kernel_shape", []))
    if len(kernel) not in (1, 2, 3):
        raise call.refuse(f"it pools {len(kernel)} axes; 1 to 3 are known")
    strides = list(call.get("strides", [1] * len(kernel)))
    dilations = list(call.get("dilations", [1] * len(kernel)))
    return x, kernel, strides, dilations, explicit_pads(call, x.shape[2:], kernel, strides, dilations)


def _global_pool(function: str, call: Call) -> Tensor:
    import torch

    x = call.tensor(0)
    return getattr(torch, function)(x, dim=tuple(range(2, x.dim())), keepdim=True)


def _lp_pool(call: Call) -> Tensor:
    import torch

    x = call.tensor(0)
    return torch.linalg.vector_norm(x, call.get("p", 2), dim=tuple(range(2, x.dim())), keepdim=True)


OPERATORS: dict[str, Function] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": partial(_global_pool, "mean"),
    "GlobalMaxPool": partial(_global_pool, "amax"),
    "GlobalLpPool": _lp_pool,
}
