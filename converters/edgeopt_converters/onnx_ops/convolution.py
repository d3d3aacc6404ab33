# SPDX-License-Identifier: Apache-2.0
"""Convolutions in 1, 2 and 3 dimensions, with ONNX's padding rules."""

from __future__ import annotations

from edgeopt_converters.onnx_ops import Call, Function, Tensor
from edgeopt_converters.onnx_ops.pooling import explicit_pads, is_symmetric, pad_spatial


def _conv(call: Call) -> Tensor:
    from torch.nn import functional

    x, weight = call.tensor(0), call.tensor(1)
    rank = weight.dim() - 2
    if rank not in (1, 2, 3):
        raise call.refuse(f"it convolves {rank} axes; 1 to 3 are known")
    strides = list(call.get("strides", [1] * rank))
    dilations = list(call.get("dilations", [1] * rank))
    pads = explicit_pads(call, x.shape[2:], list(weight.shape[2:]), strides, dilations)
    if not is_symmetric(pads):
        x, pads = pad_spatial(x, pads, 0.0), [0] * (2 * rank)
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return function(x, weight, call.optional(2), strides, pads[:rank], dilations, call.get("group", 1))


def _conv_transpose(call: Call) -> Tensor:
    """Pads cut off the output; where both ends differ, the whole output is made and then cut."""
    from torch.nn import functional

    x, weight = call.tensor(0), call.tensor(1)
    rank = weight.dim() - 2
    if rank not in (1, 2, 3):
        raise call.refuse(f"it convolves {rank} axes; 1 to 3 are known")
    strides = list(call.get("strides", [1] * rank))
    dilations = list(call.get("dilations", [1] * rank))
    extra = list(call.get("output_padding", [0] * rank))
    full = [
        stride * (size - 1) + dilation * (kernel - 1) + 1
        for stride, size, dilation, kernel in zip(
            strides, x.shape[2:], dilations, weight.shape[2:], strict=True
        )
    ]
    pads = _cut(call, list(x.shape[2:]), full, strides, extra)
    function = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[
        rank - 1
    ]
    group = call.get("group", 1)
    fits = all(
        value < max(stride, dilation)
        for value, stride, dilation in zip(extra, strides, dilations, strict=True)
    )
    if is_symmetric(pads) and min(pads) >= 0 and fits:
        return function(x, weight, call.optional(2), strides, pads[:rank], extra, group, dilations)
    whole = function(x, weight, call.optional(2), strides, 0, 0, group, dilations)
    if any(extra) and call.optional(2) is not None:
        raise call.refuse("output_padding beyond the last window with a bias")
    ends = [out + pad for out, pad in zip(extra, [-pad for pad in pads[rank:]], strict=True)]
    return pad_spatial(whole, [*(-pad for pad in pads[:rank]), *ends], 0.0)


def _cut(call: Call, sizes: list[int], full: list[int], strides: list[int], extra: list[int]) -> list[int]:
    rank = len(full)
    wanted = call.get("output_shape", None)
    mode = call.get("auto_pad", "NOTSET")
    if wanted is not None:
        wanted = list(wanted)[-rank:]
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    else:
        return list(call.get("pads", [0] * (2 * rank))) if mode == "NOTSET" else [0] * (2 * rank)
    totals = [whole + more - target for whole, more, target in zip(full, extra, wanted, strict=True)]
    # the definition of ConvTranspose puts the odd one at the end for SAME_UPPER only
    small = [total // 2 for total in totals]
    large = [total - half for total, half in zip(totals, small, strict=True)]
    return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]


OPERATORS: dict[str, Function] = {"Conv": _conv, "ConvTranspose": _conv_transpose}
