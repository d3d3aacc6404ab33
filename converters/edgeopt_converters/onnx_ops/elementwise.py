# SPDX-License-Identifier: Apache-2.0
"""Operators that work element by element, with ONNX's (NumPy's) broadcasting."""

from __future__ import annotations

from functools import partial, reduce

from edgeopt_converters.onnx_ops import Call, Function, Tensor

_UNARY = {
    "Abs": "abs", "Neg": "neg", "Sqrt": "sqrt", "Exp": "exp", "Log": "log", "Reciprocal": "reciprocal",
    "Floor": "floor", "Ceil": "ceil", "Round": "round", "Sign": "sign", "Erf": "erf", "Not": "logical_not",
    "Sin": "sin", "Cos": "cos", "Tan": "tan", "Asin": "asin", "Acos": "acos", "Atan": "atan", "Sinh": "sinh",
    "Cosh": "cosh", "Asinh": "asinh", "Acosh": "acosh", "Atanh": "atanh", "IsNaN": "isnan",
}  # fmt: skip
_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt",
    "GreaterOrEqual": "ge", "And": "logical_and", "Or": "logical_or", "Xor": "logical_xor",
}  # fmt: skip
_VARIADIC = {"Min": "minimum", "Max": "maximum", "Sum": "add"}


def _unary(function: str, call: Call) -> Tensor:
    import torch

    return getattr(torch, function)(call.tensor(0))


def _binary(function: str, call: Call) -> Tensor:
    import torch

    return getattr(torch, function)(call.tensor(0), call.tensor(1))


def _variadic(function: str, call: Call) -> Tensor:
    import torch

    return reduce(getattr(torch, function), call.tensors())


def _mean(call: Call) -> Tensor:
    return _variadic("add", call) / call.inputs


def _div(call: Call) -> Tensor:
    """Integers are divided toward zero, as in C."""
    import torch

    a, b = call.tensor(0), call.tensor(1)
    return torch.div(a, b, rounding_mode=None if a.dtype.is_floating_point else "trunc")


def _mod(call: Call) -> Tensor:
    """`fmod` 1 takes the sign of the dividend (C), 0 that of the divisor (Python)."""
    import torch

    return (torch.fmod if call.get("fmod", 0) else torch.remainder)(call.tensor(0), call.tensor(1))


def _pow(call: Call) -> Tensor:
    import torch

    base = call.tensor(0)
    return torch.pow(base, call.tensor(1)).to(base.dtype)


def _clip(call: Call) -> Tensor:
    """Limits are attributes before opset 11 and inputs after; where they contradict, the upper one wins."""
    import torch

    x = call.tensor(0)
    limits = [call.get("min", None), call.get("max", None)]
    for index in (1, 2):
        if not call.optional_is_missing(index):
            found = call.constants[index]
            limits[index - 1] = call.tensor(index) if found is None else found.reshape(-1)[0].item()
    low, high = limits
    if low is not None:
        x = torch.maximum(x, low) if isinstance(low, torch.Tensor) else torch.clamp(x, min=low)
    if high is not None:
        x = torch.minimum(x, high) if isinstance(high, torch.Tensor) else torch.clamp(x, max=high)
    return x


def _where(call: Call) -> Tensor:
    import torch

    return torch.where(call.tensor(0), call.tensor(1), call.tensor(2))


def _cast(call: Call) -> Tensor:
    import onnx
    import torch

    wanted = onnx.helper.tensor_dtype_to_np_dtype(call.get("to", 0)).name
    target = getattr(torch, wanted, None)
    if not isinstance(target, torch.dtype):
        raise call.refuse(f"PyTorch has no type {wanted}")
    return call.tensor(0).to(target)


def _cast_like(call: Call) -> Tensor:
    return call.tensor(0).to(call.tensor(1).dtype)


def _is_inf(call: Call) -> Tensor:
    import torch

    x = call.tensor(0)
    positive, negative = call.get("detect_positive", 1), call.get("detect_negative", 1)
    return (torch.isposinf(x) & bool(positive)) | (torch.isneginf(x) & bool(negative))


OPERATORS: dict[str, Function] = {
    **{name: partial(_unary, function) for name, function in _UNARY.items()},
    **{name: partial(_binary, function) for name, function in _BINARY.items()},
    **{name: partial(_variadic, function) for name, function in _VARIADIC.items()},
    "Mean": _mean,
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Clip": _clip,
    "Where": _where,
    "Cast": _cast,
    "CastLike": _cast_like,
    "IsInf": _is_inf,
}
