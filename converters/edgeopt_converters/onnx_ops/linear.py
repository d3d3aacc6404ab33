# SPDX-License-Identifier: Apache-2.0
"""Matrix products."""

from __future__ import annotations

from edgeopt_converters.onnx_ops import Call, Function, Tensor


def _gemm(call: Call) -> Tensor:
    """Alpha A' B' + beta C; the usual form is a linear layer and stays one."""
    from torch.nn import functional

    a, b, c = call.tensor(0), call.tensor(1), call.optional(2)
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    if call.get("transA", 0):
        a = a.transpose(0, 1)
    weight = b if call.get("transB", 0) else b.transpose(0, 1)
    if alpha == 1.0 and (c is None or (beta == 1.0 and c.dim() == 1 and c.shape[0] == weight.shape[0])):
        return functional.linear(a, weight, c)
    product = functional.linear(a, weight) * alpha
    return product if c is None else product + c * beta


def _matmul(call: Call) -> Tensor:
    import torch

    return torch.matmul(call.tensor(0), call.tensor(1))


def _einsum(call: Call) -> Tensor:
    import torch

    return torch.einsum(call.get("equation", ""), *call.tensors())


OPERATORS: dict[str, Function] = {"Gemm": _gemm, "MatMul": _matmul, "Einsum": _einsum}
