# SPDX-License-Identifier: Apache-2.0
"""Integers chosen within the rules are safe, and the native quantizer finds them again."""

import numpy as np
import pytest

from edgeopt.simulate import pairs
from edgeopt.simulate.safe_rounding import GRID, pinned, room_among, row_ranges


def chosen(rows: np.ndarray, partner: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Integers that are up to three steps from the weights, as an optimizer might want them, and their scale."""
    scale = row_ranges(rows, partner) / GRID
    target = rows / scale
    pins = pinned(target, partner)
    integers = np.nan_to_num(pins)
    for column in range(rows.shape[1]):
        low, high = room_among(integers, column, partner)
        wished = np.rint(target[:, column] + rng.uniform(-3, 3, len(rows)))
        free = np.isnan(pins[:, column])
        integers[free, column] = np.clip(wished, low, high)[free]
    return integers, scale


def as_matrix(rows: np.ndarray, channels: int) -> np.ndarray:
    """Rows (outputs, channels * positions) in the order in which they are multiplied: (1, K, outputs)."""
    outputs = len(rows)
    return np.ascontiguousarray(rows.reshape(outputs, channels, -1).transpose(2, 1, 0)).reshape(
        1, -1, outputs
    )


def weights(seed: int, channels: int, positions: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_t(3, (24, channels * positions))
    rows[:8] = np.abs(rows[:8])
    rows[8:12] = -np.abs(rows[8:12])
    rows[12] = 1.0
    return rows


@pytest.mark.parametrize(("channels", "positions"), [(3, 9), (8, 1), (4, 9), (5, 1), (1, 9)])
@pytest.mark.parametrize("seed", range(5))
def test_no_choice_within_the_rules_can_saturate(seed: int, channels: int, positions: int) -> None:
    rows = weights(seed, channels, positions)
    integers, _ = chosen(rows, pairs.partners(channels, positions), np.random.default_rng(seed + 100))
    assert np.abs(integers).max() <= GRID
    assert not pairs.can_saturate(as_matrix(integers, channels))


@pytest.mark.parametrize(("channels", "positions"), [(3, 9), (5, 4), (8, 1), (4, 9), (5, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_no_choice_can_saturate_in_any_runtime(seed: int, channels: int, positions: int) -> None:
    rows = weights(seed, channels, positions)
    everyone = pairs.every_partner(channels, positions)
    integers, scale = chosen(rows, everyone, np.random.default_rng(seed + 100))
    ways = pairs.orders(as_matrix(integers, channels), channels)
    assert len(ways) == len(everyone)
    assert not any(pairs.can_saturate(way) for way in ways)
    stored = (integers * scale).astype(np.float32)
    found = [pairs.safe_ranges(way)[0] for way in pairs.orders(as_matrix(stored, channels), channels)]
    assert np.max(found, axis=0) == pytest.approx(scale[:, 0] * GRID), "the quantizer finds the same scales"


@pytest.mark.parametrize(("channels", "positions"), [(3, 9), (8, 1), (4, 9), (5, 1), (1, 9)])
def test_the_quantizer_finds_the_same_integers_in_the_rounded_weights(channels: int, positions: int) -> None:
    partner = pairs.partners(channels, positions)
    rows = weights(7, channels, positions)
    integers, scale = chosen(rows, partner, np.random.default_rng(8))
    stored = (integers * scale).astype(np.float32)
    ranges = pairs.safe_ranges(as_matrix(stored, channels))[0]
    found = np.rint(stored / (ranges[:, None].astype(np.float32) / np.float32(GRID)))
    assert np.array_equal(found, integers)


def test_ranges_are_those_of_whole_layers() -> None:
    rows = weights(3, 4, 9)
    found = row_ranges(rows, pairs.partners(4, 9))
    assert np.array_equal(found[:, 0], pairs.safe_ranges(as_matrix(rows, 4))[0])


def test_depthwise_weights_are_free_but_for_the_largest() -> None:
    rows = np.array([[0.5, -1.0, 0.9], [0.0, 0.0, 0.0]])
    nobody = np.full(3, -1)
    assert row_ranges(rows, nobody).tolist() == [[1.0], [0.0]]
    pins = pinned(rows * GRID, nobody)
    assert pins[0, 1] == -GRID
    assert np.isnan(np.delete(pins.ravel(), 1)).all()


def test_the_worst_pair_is_pinned_and_nothing_moves_far() -> None:
    partner = pairs.partners(2, 1)
    target = np.array([[50.4, 76.6], [-100.2, -26.8], [127.0, -127.0]])
    assert row_ranges(target, partner)[:, 0] == pytest.approx(GRID)
    pins = pinned(target, partner)
    assert pins[0].tolist() == [50, 77]
    assert pins[1].tolist() == [-100, -27]
    assert np.nanmax(np.abs(pins - target)) <= 0.5
