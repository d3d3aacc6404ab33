# SPDX-License-Identifier: Apache-2.0
"""Methods of weight rounding: on the grid, and each better than nearest in what it is for."""

from collections.abc import Callable

import numpy as np
import pytest

from edgeopt.weights import awq, gptq, hqq, mse, packing, rtn
from edgeopt.weights.grid import Grid, Grouped
from edgeopt.weights.refine import refined

GRIDS = [
    Grid(bits, group, is_symmetric) for bits in (4, 8) for group in (32, 64) for is_symmetric in (True, False)
]
PLAIN = [rtn.quantize, mse.quantize, hqq.quantize]
INPUTS = 80  # does not fill its last group


def _weight(seed: int = 0) -> np.ndarray:
    """Mostly small, some large: what trained layers look like."""
    return np.random.default_rng(seed).standard_t(4, (24, INPUTS)).astype(np.float32) * np.float32(0.05)


def _moments(seed: int = 1) -> np.ndarray:
    """Correlated inputs, a few of them far more active than the rest."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(400, 20)) @ rng.normal(size=(20, INPUTS)) + rng.normal(size=(400, INPUTS))
    rows[:, ::16] *= 12
    return rows.T @ rows


def _error(weight: np.ndarray, quantized: Grouped) -> float:
    return float(((weight - quantized.floats(INPUTS)) ** 2).sum())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", PLAIN)
def test_values_lie_on_the_grid_within_half_a_step(method: Callable[..., Grouped], grid: Grid) -> None:
    weight = _weight()

    quantized = method(weight, grid)

    assert quantized.integers.dtype == np.uint8
    assert quantized.integers.max() <= grid.highest
    groups = -(-INPUTS // grid.group)
    assert quantized.scale.shape == quantized.zero.shape == (24, groups)
    if method is rtn.quantize:
        steps = np.repeat(np.abs(quantized.scale), grid.group, 1)[:, :INPUTS]
        # A zero point is rounded itself, and a symmetric grid is one step shorter on one side.
        assert (np.abs(weight - quantized.floats(INPUTS)) <= 1.01 * steps).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", PLAIN)
def test_a_dead_weight_stays_zero(method: Callable[..., Grouped], grid: Grid) -> None:
    assert not method(np.zeros((3, INPUTS), np.float32), grid).floats(INPUTS).any()


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_clipping_has_less_squared_error_than_nearest(is_symmetric: bool) -> None:
    grid = Grid(4, 64, is_symmetric)
    assert _error(_weight(), mse.quantize(_weight(), grid)) < 0.95 * _error(
        _weight(), rtn.quantize(_weight(), grid)
    )


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_half_quadratic_has_a_smaller_norm_than_nearest(is_symmetric: bool) -> None:
    grid = Grid(4, 64, is_symmetric)
    norms = [
        (np.abs(_weight() - method(_weight(), grid).floats(INPUTS)) ** hqq.NORM).sum()
        for method in (hqq.quantize, rtn.quantize)
    ]
    assert norms[0] < 0.98 * norms[1]


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_error_feedback_changes_outputs_least(is_symmetric: bool) -> None:
    grid, weight, moments = Grid(4, 32, is_symmetric), _weight(), _moments()

    changes = [
        awq.output_change(weight, quantized.floats(INPUTS), moments)
        for quantized in (gptq.quantize(weight, grid, moments), mse.quantize(weight, grid, np.diag(moments)))
    ]

    assert changes[0] < 0.7 * changes[1]


def test_error_feedback_without_correlation_is_rounding_to_nearest() -> None:
    grid, weight = Grid(4, 32), _weight()
    feedback = gptq.quantize(weight, grid, np.eye(INPUTS))
    np.testing.assert_array_equal(feedback.integers, mse.quantize(weight, grid, np.ones(INPUTS)).integers)


def test_error_feedback_bears_inputs_that_never_fire() -> None:
    moments = _moments()
    moments[5] = moments[:, 5] = 0
    assert np.isfinite(gptq.quantize(_weight(), Grid(), moments).floats(INPUTS)).all()


def test_scaling_active_inputs_changes_outputs_less() -> None:
    grid, weight, moments = Grid(4, 32), _weight(), _moments()

    scale = awq.input_scale([weight], grid, moments)

    changes = [
        awq.output_change(weight, awq.rounded_with(weight, grid, moments, each), moments)
        for each in (scale, np.ones(INPUTS))
    ]
    assert changes[0] < 0.9 * changes[1]
    assert scale[::16].mean() > scale[1::16].mean()  # the active ones are scaled up


def test_the_importance_of_an_input_moves_the_clipping() -> None:
    weight, moments = _weight(), _moments()
    blind, seeing = (mse.quantize(weight, Grid(), importance) for importance in (None, np.diag(moments)))
    weighted = [float((np.diag(moments) * (weight - q.floats(INPUTS)) ** 2).sum()) for q in (blind, seeing)]
    assert weighted[1] < weighted[0]


def test_a_grid_that_no_runtime_has_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be one of"):
        Grid(3)
    with pytest.raises(ValueError, match="group one of"):
        Grid(4, 48)


def test_two_integers_share_a_byte_the_earlier_in_the_lower_half() -> None:
    quantized = Grouped(
        Grid(4, 16, symmetric=False),
        np.arange(16, dtype=np.uint8).reshape(1, 1, 16),
        np.ones((1, 1), np.float32),
        np.array([[7]], np.uint8),
    )
    assert packing.integers(quantized)[0, 0, :3].tolist() == [0x10, 0x32, 0x54]
    zeros = packing.zero_points(quantized)
    assert zeros is not None
    assert zeros.tolist() == [[7]]


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.bits == 4])
def test_going_over_again_makes_no_output_worse_and_all_together_better(grid: Grid) -> None:
    weight, about = _weight(), gptq.damped(_moments())
    start = gptq.quantize(weight, grid, about)
    before, after = (
        np.einsum("oi,ij,oj->o", error, about, error)
        for error in (weight - found.floats(INPUTS) for found in (start, refined(weight, start, about)))
    )
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() < 0.97 * before.sum()
    assert (after < before).mean() > 0.5
