# SPDX-License-Identifier: Apache-2.0
"""What quantizing weights only can be told."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.weights.grid import GROUPS, Grid

METHODS = ("rtn", "mse", "hqq", "gptq", "awq")
SAMPLED = ("gptq", "awq")  # the methods that look at what reaches a layer
ACCURACY_LEVELS = (0, 1, 4)


@dataclass(frozen=True)
class Options:
    """What is quantized and how.

    `bits` and `group` are for matrix products; `embedding_bits` (0: the same) and `embedding_group` for tables, which
    only store. `accuracy_level` is ONNX Runtime's: 4 multiplies in int8, the others unpack to float and are slower than
    float. Products of fewer than `skip_k_below` inputs ran slower in groups than in float (256 x 256, 16 rows: 1.2 times;
    384 x 1536: 0.7). `store_rest` keeps all other weights in fewer bits, unpacked at loading; `smallest` is the number of
    elements below which a weight is not worth it. `samples`, `positions` and `moments_mib` bound what the methods that
    use samples look at.
    """

    bits: int = 4
    group: int = 64
    method: str = "gptq"
    symmetric: bool = True
    accuracy_level: int = 4
    skip_k_below: int = 320
    embedding_bits: int = 0
    embedding_group: int = 64
    store_rest: bool = True
    smallest: int = 1024
    samples: int = 128
    positions: int = 256
    moments_mib: int = 1024

    def __post_init__(self) -> None:
        Grid(self.bits, self.group, self.symmetric)
        Grid(self.embedding_bits or self.bits, self.embedding_group, self.symmetric)
        if self.method not in METHODS:
            raise ValueError(
                f"quantize_weights: method is one of {', '.join(METHODS)}, found {self.method!r}"
            )
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise ValueError(
                f"quantize_weights: accuracy_level is one of {ACCURACY_LEVELS}, found {self.accuracy_level}"
            )
        if min(self.samples, self.positions, self.moments_mib) < 1:
            raise ValueError(
                f"quantize_weights: samples, positions and moments_mib must be positive, found {self}"
            )

    @property
    def grid(self) -> Grid:
        """The grid of matrix products."""
        return Grid(self.bits, self.group, self.symmetric)

    def table_grid(self, width: int) -> Grid | None:
        """The grid of a table's rows, in the largest groups that fill them; None where none does."""
        fitting = [group for group in GROUPS if group <= self.embedding_group and width % group == 0]
        return Grid(self.embedding_bits or self.bits, fitting[-1], self.symmetric) if fitting else None
