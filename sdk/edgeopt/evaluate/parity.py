# SPDX-License-Identifier: Apache-2.0
"""Do two models say the same on the same samples? One row an output: absolute differences, also in steps (LSB).

Rules:
- Neither is the better one: differences are absolute; SQNR takes the first as the signal.
- Outputs are matched by name where both have the same names, else by place; shapes must be the same.
- A step is the scale of the second's output where it is quantized, else of the first's; two float outputs have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.evaluate.fidelity import sqnr
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs

STEP_SLACK = 1e-3
"""Differences of dequantized float32 values are not exact multiples of a step; up to 16 bits they are within this."""


@dataclass(frozen=True)
class Difference:
    """One output of both. `*_abs` are over the values of all samples that are numbers in both.

    `not_finite` counts the others, unless both say the same NaN or infinity; SQNR is then the lowest. `step` is one LSB; `max_steps` and `p999_steps` are in it and `within_one_step` is the share of values at most one
    apart, all None without a step. `equal` is the share of exactly equal values; `agreement` the share of samples with
    the same arg-max, where the output looks like classes.
    """

    name: str
    other_name: str
    max_abs: float
    mean_abs: float
    p999_abs: float
    equal: float
    sqnr_db: float
    not_finite: int = 0
    step: float | None = None
    max_steps: float | None = None
    p999_steps: float | None = None
    within_one_step: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Parity:
    """All outputs of two models; `matched_by` is "name" or "place"."""

    samples: int
    matched_by: str
    differences: tuple[Difference, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every value of every output is exactly the same."""
        return all(difference.equal == 1 for difference in self.differences)


def compare_models(
    first: Outputs,
    second: Outputs,
    first_specs: tuple[TensorSpec, ...] = (),
    second_specs: tuple[TensorSpec, ...] = (),
) -> Parity:
    """Tell how far two models' outputs are apart; the specs, in each one's own order, tell which are quantized.

    Raises:
        RecipeError: They have other numbers of samples or outputs, or outputs of other shapes.
    """
    if len(first) != len(second) or len(first.arrays) != len(second.arrays):
        raise RecipeError(
            f"expected both models on the same samples with as many outputs, found {len(first)} samples of "
            f"{', '.join(first.arrays)} and {len(second)} samples of {', '.join(second.arrays)}"
        )
    by_name = set(first.arrays) == set(second.arrays)
    others = list(first.arrays) if by_name else list(second.arrays)
    found = []
    for name, other in zip(first.arrays, others, strict=True):
        one, two = first.arrays[name], second.arrays[other]
        if one.shape != two.shape:
            raise RecipeError(
                f"output {name!r} has the shape {one.shape}, {other!r} of the other model {two.shape}; "
                "compare models with the same outputs"
            )
        step = _step(second, second_specs, other) or _step(first, first_specs, name)
        found.append(_difference(name, other, one, two, step))
    return Parity(len(first), "name" if by_name else "place", tuple(found))


def _step(outputs: Outputs, specs: tuple[TensorSpec, ...], name: str) -> float | None:
    place = list(outputs.arrays).index(name)
    affine = specs[place].affine if place < len(specs) else None
    return affine.scale if affine else None


def _difference(name: str, other: str, one: np.ndarray, two: np.ndarray, step: float | None) -> Difference:
    import numpy as np

    equal = (one == two) | (np.isnan(one) & np.isnan(two))
    told = np.isfinite(one) & np.isfinite(two)
    not_finite = int((~told & ~equal).sum())
    apart = np.abs(one[told].astype(np.float64) - two[told].astype(np.float64))
    if apart.size == 0:
        apart = np.zeros(1)
    signal = float((one[told].astype(np.float64) ** 2).sum())
    noise = math.inf if not_finite else float((apart**2).sum())
    p999 = float(np.quantile(apart, 0.999, method="higher"))
    classes = one.ndim == 2 and one.shape[1] >= 2
    in_steps: tuple[float | None, float | None, float | None] = (None, None, None)
    if step is not None:
        in_steps = (float(apart.max()) / step, p999 / step, float((apart <= step * (1 + STEP_SLACK)).mean()))
    return Difference(
        name,
        other,
        max_abs=float(apart.max()),
        mean_abs=float(apart.mean()),
        p999_abs=p999,
        equal=float(equal.mean()),
        sqnr_db=sqnr(signal, noise),
        not_finite=not_finite,
        step=step,
        max_steps=in_steps[0],
        p999_steps=in_steps[1],
        within_one_step=in_steps[2],
        agreement=float((one.argmax(1) == two.argmax(1)).mean()) if classes else None,
    )
