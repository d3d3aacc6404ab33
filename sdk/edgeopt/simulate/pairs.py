# SPDX-License-Identifier: Apache-2.0
"""Products in saturating pairs: what x86 without VNNI does to a u8s8 layer, bit by bit, and which weights prevent it.

AVX2 and AVX-512BW multiply 8-bit integers with `vpmaddubsw`: an unsigned byte times a signed byte, twice, and the sum
of the two in int16, *clipped* to -32768 .. 32767 (Intel, "Intrinsics Guide", _mm256_maddubs_epi16). Two full products
reach 2 * 255 * 127 = 64770. Everything after it is exact: `vpmaddwd` with ones widens to int32, zero points are
subtracted from exact row and column sums.

Who does that in ONNX Runtime 1.32 (MLAS, `onnxruntime/core/mlas/lib/`), read in the sources, and compared bit by bit
with the real kernels (`tests/edgeopt/simulate/record_avx2.py`: AVX2 on an emulated Haswell, AVX-512BW in a copy of the
library that does not look for VNNI; both give the same file):
- `QgemmU8X8KernelAvx2.S`, `QgemmU8S8KernelAvx512Core.S` (static and dynamic MatMul, Gemm, convolutions with groups or
  odd channels) and `ConvSymKernelAvx2.S`, `ConvSymKernelAvx512Core.S` (other convolutions) use it on the bytes as they
  are stored, zero point included. K goes in fours, so a pair is (2i, 2i+1) of K in the order of
  `edgeopt.simulate.sums`; an odd K ends with a zero.
- Depthwise kernels are exact: they widen to 32 bits (`ConvSymKernelAvx2.S`) or 16 (`qdwconv_avx2.cpp`), or pair each
  product with a zero (`ConvSymKernelAvx512Core.S`: at most 255 * 128 = 32640). So are u8u8 products (vpmaddwd).
- Activations of int8 become uint8 on x86, plus 128 (`qdq_s8_to_u8.cc`): s8s8 models saturate like u8s8 ones.
- Read only: the matrix-vector kernel (`QgemvU8S8KernelAvx2.S`) has the same pairs; constant weights never reach it.
- Exact by definition: AVX-VNNI, AVX512-VNNI and AMX (`vpdpbusd` adds four products in int32), and any CPU if the
  session option `session.x64quantprecision` is "1" (`avx2_weight_s8_to_u8.cc`: weights become u8 where one is beyond
  -64 .. 64), which makes every layer slower, on CPUs with VNNI too.

OpenVINO 2026.4 (oneDNN's kernels, AVX2 and AVX-512BW alike) pairs input channels (2i, 2i+1) of one kernel position; where
channels are odd, the last one goes alone, so that its pairs differ from ONNX Runtime's in first layers of 3 channels.
Depthwise kernels are exact, int8 activations become uint8. Asked of the kernels themselves with one pair of large
weights at a time and `ONEDNN_MAX_CPU_ISA` (`tests/edgeopt/simulate/test_pairs_openvino.py`). A file must be safe in both.

The cure is in the weights: where no pair of a column has positive parts, or negative parts, that add up to more than
128, no byte can overflow it (128 * 255 = 32640). Seven bits (-64 .. 64) are enough for that, and more than is needed:
only channels that have such a pair need a wider scale, and only by as much as their worst pair asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

INT16_MIN, INT16_MAX = -32768, 32767
BYTE_MAX = 255
SAFE_SUM = 128
"""The largest sum of two weights of one sign that no two bytes overflow: 128 * 255 <= 32767 < 129 * 255."""


@dataclass(frozen=True)
class Excess:
    """What saturation takes away: exact minus saturated sums (groups, M, N), and how many pair sums were clipped."""

    sums: np.ndarray
    clipped: int


def as_pairs(matrix: np.ndarray) -> np.ndarray:
    """Lay weights (groups, K, N) out as (groups, pairs, 2, N); an odd K gets a zero at its end."""
    import numpy as np

    groups, depth, outputs = matrix.shape
    if depth % 2:
        matrix = np.concatenate([matrix, np.zeros((groups, 1, outputs), matrix.dtype)], axis=1)
    return matrix.reshape(groups, -1, 2, outputs)


def one_sided(matrix: np.ndarray) -> np.ndarray:
    """For each pair of weights (groups, pairs, N), its positive parts added, or its negative ones if they are larger."""
    import numpy as np

    wide = np.float64 if matrix.dtype.kind == "f" else np.int32
    pairs = as_pairs(matrix).astype(wide)
    return np.asarray(np.maximum(pairs.clip(min=0).sum(axis=2), -pairs.clip(max=0).sum(axis=2)))


def worst_sum(matrix: np.ndarray) -> int:
    """The largest pair sum, without sign, that weights (groups, K, N) can give with any bytes."""
    return BYTE_MAX * int(one_sided(matrix).max(initial=0))


def can_saturate(matrix: np.ndarray) -> bool:
    """Whether any input at all makes a pair of these weights leave int16."""
    return bool(one_sided(matrix).max(initial=0) > SAFE_SUM)


def excess(rows: np.ndarray, matrix: np.ndarray) -> Excess:
    """Compare exact with saturated arithmetic: rows (groups, M, K) of uint8, weights (groups, K, N) of int8.

    Only pairs that these rows can overflow are computed, so layers that hardly saturate cost hardly anything.
    """
    import numpy as np

    groups, count, depth = rows.shape
    weights = as_pairs(matrix).astype(np.float32)
    if depth % 2:
        rows = np.concatenate([rows, np.zeros((groups, count, 1), rows.dtype)], axis=2)
    peaks = rows.max(axis=1, initial=0).reshape(groups, -1, 2, 1).astype(np.float32)
    above = (weights.clip(min=0) * peaks).sum(axis=2) > INT16_MAX
    below = (weights.clip(max=0) * peaks).sum(axis=2) < INT16_MIN
    at_risk = above | below  # groups, pairs, N
    total = np.zeros((groups, count, matrix.shape[2]), np.float64)
    clipped = 0
    for group, pair in np.argwhere(at_risk.any(axis=2)):
        columns = np.flatnonzero(at_risk[group, pair])
        pair_sums = (
            rows[group, :, 2 * pair : 2 * pair + 2].astype(np.float32) @ weights[group, pair][:, columns]
        )
        over = pair_sums - pair_sums.clip(INT16_MIN, INT16_MAX)
        clipped += int(np.count_nonzero(over))
        total[group][:, columns] += over
    return Excess(total, clipped)


def safe_ranges(matrix: np.ndarray) -> np.ndarray:
    """For float weights (groups, K, N), the magnitude that each output must be able to hold to never saturate.

    Quantized symmetrically with scale = range / 127 and rounded to nearest, no pair of the integers adds up to more
    than 127 + 2 * 0.5 = `SAFE_SUM` on one side. An output without such a pair keeps its own largest weight, which is
    the range it has anyway. Shape (groups, N).
    """
    import numpy as np

    wide = matrix.astype(np.float64)
    return np.asarray(np.maximum(abs(wide).max(axis=1), one_sided(wide).max(axis=1)))


def orders(matrix: np.ndarray, channels: int) -> tuple[np.ndarray, ...]:
    """Lay weights (groups, K, N), K of `channels` a position, out as each runtime pairs them: ONNX Runtime, oneDNN.

    One of the two where both pair alike: channels are even, or there is one position.
    """
    import numpy as np

    groups, depth, outputs = matrix.shape
    if channels % 2 == 0 or channels == depth:
        return (matrix,)
    by_position = matrix.reshape(groups, depth // channels, channels, outputs)
    padded = np.pad(by_position, ((0, 0), (0, 0), (0, 1), (0, 0)))
    return matrix, padded.reshape(groups, -1, outputs)


def every_partner(channels: int, positions: int) -> np.ndarray:
    """The partners of each weight in every runtime: `partners`, and with odd channels oneDNN's, as (orders, K)."""
    import numpy as np

    found = partners(channels, positions)
    if channels % 2 == 0 or positions == 1:
        return found[None]
    channel, position = np.divmod(np.arange(channels * positions), positions)
    other = channel ^ 1
    return np.stack([found, np.where(other < channels, other * positions + position, -1)])


def partners(channels: int, positions: int) -> np.ndarray:
    """For weights flattened as ONNX has them (channel, position), the index of each one's partner, -1 for none.

    For a pass that chooses integers one by one and must keep pairs safe in ONNX Runtime. A matrix product has 1 position.
    """
    import numpy as np

    depth = channels * positions
    ordered = np.arange(depth)  # position, channel: the order in which they are multiplied
    flat = (ordered % channels) * positions + ordered // channels
    other = ordered ^ 1
    found = np.empty(depth, np.int64)
    found[flat] = np.where(other < depth, flat[np.minimum(other, depth - 1)], -1)
    return found
