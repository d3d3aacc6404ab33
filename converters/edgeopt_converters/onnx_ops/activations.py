# SPDX-License-Identifier: Apache-2.0
"""Activation functions."""

from __future__ import annotations

from edgeopt_converters.onnx_ops import Call, Function, Tensor


def _relu(call: Call) -> Tensor:
    import torch

    return torch.relu(call.tensor(0))


def _sigmoid(call: Call) -> Tensor:
    import torch

    return torch.sigmoid(call.tensor(0))


def _tanh(call: Call) -> Tensor:
    import torch

    return torch.tanh(call.tensor(0))


def _hard_sigmoid(call: Call) -> Tensor:
    """max(0, min(1, alpha x + beta)); PyTorch's own is this with alpha 1/6."""
    from torch.nn import functional

    x = call.tensor(0)
    alpha, beta = call.get("alpha", 0.2), call.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return functional.hardsigmoid(x)
    return (x * alpha + beta).clamp(0.0, 1.0)


def _hard_swish(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.hardswish(call.tensor(0))


def _gelu(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.gelu(call.tensor(0), approximate=call.get("approximate", "none"))


def _leaky_relu(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.leaky_relu(call.tensor(0), call.get("alpha", 0.01))


def _prelu(call: Call) -> Tensor:
    import torch

    x = call.tensor(0)
    return torch.where(x < 0, x * call.tensor(1), x)


def _elu(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.elu(call.tensor(0), call.get("alpha", 1.0))


def _celu(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.celu(call.tensor(0), call.get("alpha", 1.0))


def _selu(call: Call) -> Tensor:
    """With ONNX's alpha and gamma, which may differ from PyTorch's fixed ones."""
    import torch

    x = call.tensor(0)
    alpha, gamma = call.get("alpha", 1.6732632423543772), call.get("gamma", 1.0507009873554805)
    return gamma * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


def _softplus(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.softplus(call.tensor(0))


def _softsign(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.softsign(call.tensor(0))


def _mish(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.mish(call.tensor(0))


def _swish(call: Call) -> Tensor:
    import torch

    x = call.tensor(0)
    return x * torch.sigmoid(x * call.get("alpha", 1.0))


def _thresholded_relu(call: Call) -> Tensor:
    from torch.nn import functional

    return functional.threshold(call.tensor(0), call.get("alpha", 1.0), 0.0)


def _softmax(call: Call) -> Tensor:
    import torch

    return torch.softmax(call.tensor(0), call.get("axis", -1))


def _log_softmax(call: Call) -> Tensor:
    import torch

    return torch.log_softmax(call.tensor(0), call.get("axis", -1))


OPERATORS: dict[str, Function] = {
    "Relu": _relu,
    "Sigmoid": _sigmoid,
    "Tanh": _tanh,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Gelu": _gelu,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _selu,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Mish": _mish,
    "Swish": _swish,
    "ThresholdedRelu": _thresholded_relu,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
}
