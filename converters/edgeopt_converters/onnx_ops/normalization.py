# SPDX-License-Identifier: Apache-2.0
"""Normalizations, in inference form."""

from __future__ import annotations

from edgeopt_converters.onnx_ops import Call, Function, Tensor


def _batch(call: Call) -> Tensor:
    from torch.nn import functional

    if call.get("training_mode", 0) or call.outputs > 1:
        raise call.refuse("it is in training mode; export the model in evaluation mode")
    x, scale, bias, mean, variance = (call.tensor(index) for index in range(5))
    return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, call.get("epsilon", 1e-5))


def _instance(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.instance_norm(
        call.tensor(0), weight=call.tensor(1), bias=call.tensor(2), eps=call.get("epsilon", 1e-5)
    )


def _group(call: Call) -> Tensor:
    """Until opset 20 scale and bias are given per group, from opset 21 on per channel."""
    from torch.nn import functional

    x, scale, bias = call.tensor(0), call.tensor(1), call.tensor(2)
    groups = call.get("num_groups", 1)
    if scale.shape[0] != x.shape[1]:
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return functional.group_norm(x, groups, scale, bias, call.get("epsilon", 1e-5))


def _layer(call: Call) -> Tensor | tuple[Tensor, ...]:
    import torch
    from torch.nn import functional

    x, scale, bias = call.tensor(0), call.tensor(1), call.optional(2)
    axes = list(range(call.get("axis", -1) % x.dim(), x.dim()))
    shape = list(x.shape[axes[0] :])
    epsilon = call.get("epsilon", 1e-5)
    if list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        made = functional.layer_norm(x, shape, scale, bias, epsilon)
    else:
        made = functional.layer_norm(x, shape, eps=epsilon) * scale
        made = made if bias is None else made + bias
    if call.outputs == 1:
        return made
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return made, mean, torch.rsqrt(variance + epsilon)


def _rms(call: Call) -> Tensor:
    import torch

    x = call.tensor(0)
    axes = tuple(range(call.get("axis", -1) % x.dim(), x.dim()))
    power = x.float().square().mean(axes, keepdim=True)
    return (x * torch.rsqrt(power + call.get("epsilon", 1e-5))).to(x.dtype) * call.tensor(1)


def _lp(call: Call) -> Tensor:
    import torch

    x = call.tensor(0)
    norm = torch.linalg.vector_norm(x, call.get("p", 2), dim=call.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _local_response(call: Call) -> Tensor:
    """X / (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""
    import torch
    from torch.nn import functional

    x, size = call.tensor(0), call.get("size", 1)
    squares = x.square().flatten(2).unsqueeze(1)
    before = (size - 1) // 2
    padded = functional.pad(squares, (0, 0, before, size - 1 - before))
    total = functional.avg_pool2d(padded, (size, 1), stride=1).squeeze(1).reshape(x.shape)
    return x / torch.pow(call.get("bias", 1.0) + call.get("alpha", 1e-4) * total, call.get("beta", 0.75))


def _mean_variance(call: Call) -> Tensor:
    import torch

    x, axes = call.tensor(0), tuple(call.get("axes", [0, 2, 3]))
    mean = x.mean(axes, keepdim=True)
    deviation = torch.sqrt(x.square().mean(axes, keepdim=True) - mean.square())
    return (x - mean) / (deviation + 1e-9)


OPERATORS: dict[str, Function] = {
    "BatchNormalization": _batch,
    "InstanceNormalization": _instance,
    "GroupNormalization": _group,
    "LayerNormalization": _layer,
    "RMSNormalization": _rms,
    "LpNormalization": _lp,
    "LRN": _local_response,
    "MeanVarianceNormalization": _mean_variance,
}
