# SPDX-License-Identifier: Apache-2.0
"""Conv, MatMul and Gemm: sums of products, exact on integers, float32 where an input is not quantized.

`Adjust` is the seam at which another CPU's arithmetic comes in: it sees a layer's raw bytes and exact sums, and gives
the sums that this CPU would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgeopt.simulate import sums
from edgeopt.simulate.layers import Layer, Node
from edgeopt.simulate.values import Accumulated, Quantized, Value, real
from edgeopt_wire.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np

Adjust = Callable[[Layer, "np.ndarray", "np.ndarray", "np.ndarray"], "np.ndarray"]
"""(layer, raw rows (groups, M, K) uint8, exact sums (groups, M, N), their scale (groups, 1, N)) -> sums."""


def conv(node: Node, values: Sequence[Value], layer: Layer | None, adjust: Adjust | None) -> Value:
    """Convolve (batch, channels, *spatial)."""
    x, w = values[0], values[1]
    if not _is_bytes(x) or not _is_bytes(w):
        return _float_conv(node, values)
    weights = _centred(w)
    groups = int(node.attributes.get("group", 1))
    outputs, depth = weights.shape[0], weights[0].size
    bias = _integer_bias(values)
    kind = sums.exact_type(_largest(weights.reshape(outputs, depth)) + _peak(bias))
    window = sums.window_of(node.attributes, weights.shape[2:], x.integers.shape[2:])
    zero_point = int(x.grid.zero_point.reshape(()))
    padded = window.pad(x.integers, zero_point)
    size = (padded.shape[0], outputs, *window.output(x.integers.shape[2:]))
    if weights.shape[1] == 1 and outputs == groups:
        centred = padded.astype(kind) - padded.dtype.type(zero_point).astype(kind)
        total = sums.depthwise(window.views(centred), weights.reshape(outputs, depth).astype(kind))
        if bias is not None:
            total += bias.astype(kind).reshape(1, -1, *(1,) * len(window.kernel))
        return Accumulated(total, _conv_scale(x, w, total.ndim))
    rows = sums.columns(padded, window, groups)
    flat = weights.reshape(groups, outputs // groups, weights.shape[1], -1).transpose(0, 3, 2, 1)
    matrix = flat.reshape(groups, depth, -1).astype(kind)
    found = _sum(
        rows,
        zero_point,
        matrix=matrix,
        bias=bias,
        layer=layer,
        adjust=adjust,
        scale=_conv_scale(x, w, 2),
    )
    batch = size[0]
    found = found.reshape(groups, batch, -1, outputs // groups).transpose(1, 0, 3, 2).reshape(size)
    return Accumulated(found, _conv_scale(x, w, len(size)))


def matmul(_node: Node, values: Sequence[Value], layer: Layer | None, adjust: Adjust | None) -> Value:
    """Multiply matrices (..., M, K) by (..., K, N)."""
    import numpy as np

    x, w = values[0], values[1]
    if (
        not _is_bytes(x)
        or not _is_bytes(w)
        or (w.grid.scale.size != 1 and w.grid.axis % w.integers.ndim == 0)
    ):
        return np.asarray(np.matmul(real(x), real(w)), np.float32)
    scale = np.asarray(x.grid.scale.reshape(()) * _last(w.grid.scale), np.float32)
    weights = _centred(w)
    if layer is None:
        largest = 255.0 * 255.0 * x.integers.shape[-1]
        kind = sums.exact_type(largest)
        return Accumulated(np.matmul(_centred(x).astype(kind), weights.astype(kind)), scale)
    kind = sums.exact_type(_largest(weights.T))
    rows = x.integers.reshape(1, -1, x.integers.shape[-1])
    zero_point = int(x.grid.zero_point.reshape(()))
    found = _sum(
        rows,
        zero_point,
        matrix=weights[None].astype(kind),
        bias=None,
        layer=layer,
        adjust=adjust,
        scale=scale,
    )
    return Accumulated(found.reshape(*x.integers.shape[:-1], -1), scale)


def gemm(node: Node, values: Sequence[Value], layer: Layer | None, adjust: Adjust | None) -> Value:
    """Multiply a matrix by weights and add a bias; alpha and beta other than 1 in float32."""
    import numpy as np

    x, w = values[0], values[1]
    attributes = node.attributes
    is_plain = all(attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta")) and not attributes.get(
        "transA", 0
    )
    if not _is_bytes(x) or not _is_bytes(w) or not is_plain:
        left = real(x).T if attributes.get("transA", 0) else real(x)
        right = real(w).T if attributes.get("transB", 0) else real(w)
        total = attributes.get("alpha", 1.0) * np.matmul(left, right)
        if len(values) > 2 and values[2] is not None:
            total = total + attributes.get("beta", 1.0) * real(values[2])
        return np.asarray(total, np.float32)
    weights = _centred(w).T if attributes.get("transB", 0) else _centred(w)
    bias = _integer_bias(values)
    kind = sums.exact_type(_largest(weights.T) + _peak(bias))
    scale = np.asarray(x.grid.scale.reshape(()) * _last(w.grid.scale), np.float32)
    zero_point = int(x.grid.zero_point.reshape(()))
    found = _sum(
        x.integers[None],
        zero_point,
        matrix=weights[None].astype(kind),
        bias=bias,
        layer=layer,
        adjust=adjust,
        scale=scale,
    )
    result = Accumulated(found[0], scale)
    if bias is None and len(values) > 2 and values[2] is not None:
        return np.asarray(result.real() + real(values[2]), np.float32)
    return result


def matmul_integer(node: Node, values: Sequence[Value], layer: Layer | None, adjust: Adjust | None) -> Value:
    """Multiply integers less their zero points, of which one each is known; the sums are int32."""
    import numpy as np

    x, w = np.asarray(values[0]), np.asarray(values[1])
    x_zero, w_zero = (
        np.asarray(value if value is not None else 0) for value in (*values[2:], None, None)[:2]
    )
    if x_zero.size != 1 or w_zero.ndim > 1:
        raise UnsupportedError(f"simulation: MatMulInteger {node.name!r} has a zero point for each row")
    weights = w.astype(np.int32) - w_zero
    if layer is None or layer.matrix.shape[0] != 1:
        return np.matmul(x.astype(np.int32) - x_zero, weights).astype(np.int32)
    found = _sum(
        x.reshape(1, -1, x.shape[-1]),
        int(x_zero.reshape(())),
        matrix=weights[None].astype(sums.exact_type(_largest(weights.T))),
        bias=None,
        layer=layer,
        adjust=adjust,
        scale=np.ones(1, np.float32),
    )
    return found.reshape(*x.shape[:-1], -1).astype(np.int32)


def _sum(
    rows: np.ndarray,
    zero_point: int,
    *,
    matrix: np.ndarray,
    bias: np.ndarray | None,
    layer: Layer | None,
    adjust: Adjust | None,
    scale: np.ndarray,
) -> np.ndarray:
    """Sums (groups, M, N) of rows (groups, M, K) and a matrix (groups, K, N); bias has groups * N entries."""
    import numpy as np

    centred = rows.astype(matrix.dtype)
    centred -= matrix.dtype.type(zero_point)
    total = np.matmul(centred, matrix)
    groups, _, outputs = total.shape
    if bias is not None:
        total += bias.astype(matrix.dtype).reshape(groups, 1, outputs)
    if layer is None or adjust is None or not layer.is_paired:
        return np.asarray(total)
    raw = rows if layer.raw_offset == 0 else (rows.astype(np.int16) + layer.raw_offset).astype(np.uint8)
    spread = np.broadcast_to(scale.reshape(-1), (groups * outputs,)).reshape(groups, 1, outputs)
    return adjust(layer, raw, total, spread)


def _float_conv(node: Node, values: Sequence[Value]) -> np.ndarray:
    import numpy as np

    x, weights = real(values[0]), real(values[1])
    groups = int(node.attributes.get("group", 1))
    window = sums.window_of(node.attributes, weights.shape[2:], x.shape[2:])
    padded = window.pad(x, 0.0)
    outputs, depth = weights.shape[0], weights[0].size
    if weights.shape[1] == 1 and outputs == groups:
        total = sums.depthwise(window.views(padded), weights.reshape(outputs, depth))
    else:
        rows = sums.columns(padded, window, groups)
        flat = weights.reshape(groups, outputs // groups, weights.shape[1], -1).transpose(0, 3, 2, 1)
        found = np.matmul(rows, flat.reshape(groups, depth, -1))
        found = found.reshape(groups, x.shape[0], -1, outputs // groups).transpose(1, 0, 3, 2)
        total = found.reshape(x.shape[0], outputs, *window.output(x.shape[2:]))
    if len(values) > 2 and values[2] is not None:
        total = total + real(values[2]).reshape(1, -1, *(1,) * len(window.kernel))
    return np.asarray(total, np.float32)


def _is_bytes(value: Value) -> bool:
    return isinstance(value, Quantized) and value.integers.dtype.itemsize == 1


def _centred(value: Quantized) -> np.ndarray:
    import numpy as np

    zero_point = value.grid.spread(value.grid.zero_point, value.integers.ndim)
    return np.asarray(value.integers.astype(np.int32) - zero_point)


def _integer_bias(values: Sequence[Value]) -> np.ndarray | None:
    if len(values) < 3 or values[2] is None:
        return None
    if isinstance(values[2], Quantized) and values[2].integers.dtype.itemsize == 4:
        return values[2].integers.reshape(-1)
    if isinstance(values[2], Quantized):
        raise UnsupportedError(
            f"simulation: a bias must be quantized to int32, found {values[2].integers.dtype} integers"
        )
    return None


def _largest(weights: np.ndarray) -> float:
    """The largest sum that a row of weights (N, K) can give with inputs that differ from zero by up to 255."""
    return 255.0 * float(abs(weights.astype("float64")).sum(axis=1).max(initial=0.0))


def _peak(bias: np.ndarray | None) -> float:
    return 0.0 if bias is None else float(abs(bias.astype("float64")).max(initial=0.0))


def _conv_scale(x: Quantized, w: Quantized, rank: int) -> np.ndarray:
    import numpy as np

    product = np.asarray(x.grid.scale.reshape(()) * w.grid.scale, np.float32)
    return product.reshape(()) if product.size == 1 else product.reshape(1, -1, *(1,) * (rank - 2))


def _last(scale: np.ndarray) -> np.ndarray:
    return scale.reshape(()) if scale.size == 1 else scale.reshape(-1)
