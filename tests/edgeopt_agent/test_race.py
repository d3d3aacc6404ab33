# SPDX-License-Identifier: Apache-2.0
"""The race names the fastest variant when it can be told, says so when it cannot, and gives a crash one more try."""

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from edgeopt_agent.race import MAX_ROUNDS, race
from edgeopt_wire.measurement import Conditions, Measurement, Timing

CONDITIONS = Conditions("null", "1.0", 1, 1, "cpu", "x", "x", "x")


def _measured(variant: str, nanoseconds: float) -> Measurement:
    return Measurement(
        package_sha256="0" * 64,
        model="tiny",
        version="1",
        variant=variant,
        precision="fp32",
        device_id="d1",
        device_class="host",
        agent_version="0",
        measured_at=datetime.now(UTC),
        conditions=CONDITIONS,
        timing=Timing.of([round(nanoseconds)] * 10, warmup=1, load_ns=1, first_inference_ns=1),
        golden_ok=True,
    )


def _failed(variant: str, failure: str) -> Measurement:
    return replace(
        _measured(variant, 1e6), timing=None, golden_ok=False, error=failure, extra={"failure": failure}
    )


class Board:
    """Variants with their true times; each round the board as a whole is slower or faster, each run by noise."""

    def __init__(
        self, times: dict[str, float], *, noise: float = 0.01, drift: float = 0.0, seed: int = 0
    ) -> None:
        self.times, self.noise, self.drift = times, noise, drift
        self.random = random.Random(seed)
        self.ran: list[str] = []

    def probe(self, variant: str) -> Measurement:
        self.ran.append(variant)
        warmth = 1 + self.drift * len(self.ran)
        return _measured(variant, self.times[variant] * warmth * (1 + self.random.gauss(0, self.noise)))


def test_a_clear_winner_needs_one_measurement_of_each() -> None:
    board = Board({"a": 2e6, "b": 1e6, "c": 4e6})
    found = race(list(board.times), board.probe)
    assert found.winner is not None
    assert (found.winner.variant, found.is_certain, board.ran) == ("b", True, ["a", "b", "c"])
    assert "a 2.0" in found.said


def test_close_ones_run_in_turns_until_their_order_is_certain() -> None:
    right = 0
    for seed in range(60):
        board = Board({"a": 1.05e6, "b": 1e6, "slow": 3e6}, noise=0.01, seed=seed)
        found = race(list(board.times), board.probe)
        assert board.ran.count("slow") == 1
        assert found.winner is not None
        right += found.winner.variant == "b" and found.is_certain
    assert right >= 58


def test_a_board_that_warms_does_not_favour_who_came_first() -> None:
    for seed in range(20):
        board = Board({"a": 1.04e6, "b": 1e6}, noise=0.002, drift=0.01, seed=seed)
        winner = race(["a", "b"], board.probe).winner
        assert winner is not None
        assert winner.variant == "b"


def test_what_cannot_be_told_apart_is_said_and_one_is_taken() -> None:
    uncertain = 0
    for seed in range(40):
        board = Board({"a": 1e6, "b": 1e6}, noise=0.02, seed=seed)
        found = race(["a", "b"], board.probe)
        assert found.winner is not None
        assert len(board.ran) <= 2 * MAX_ROUNDS
        uncertain += not found.is_certain
        assert ("cannot be told" in found.said) == (not found.is_certain)
    assert uncertain >= 28, "a difference that is not there was called certain too often"


@pytest.mark.parametrize("failure", ["crash", "timeout", "memory"])
def test_a_failure_of_the_moment_gets_one_more_try(failure: str) -> None:
    left = [failure]

    def probe(variant: str) -> Measurement:
        if variant == "a" and left:
            return _failed(variant, left.pop())
        return _measured(variant, {"a": 1e6, "b": 2e6}[variant])

    winner = race(["a", "b"], probe).winner
    assert winner is not None
    assert winner.variant == "a"


def test_what_fails_on_its_merits_or_twice_is_out() -> None:
    def probe_of(failing: dict[str, str]) -> Callable[[str], Measurement]:
        return lambda variant: (
            _failed(variant, failing[variant]) if variant in failing else _measured(variant, 1e6)
        )

    wrong = replace(_measured("a", 1e5), golden_ok=False)
    found = race(["a", "b"], lambda variant: wrong if variant == "a" else _measured("b", 1e6))
    assert found.winner is not None
    assert found.winner.variant == "b"
    runs = race(["a", "b"], probe_of({"a": "runtime"})).measurements
    assert [entry.variant for entry in runs] == ["a", "b"]
    nothing = race(["a", "b"], probe_of({"a": "crash", "b": "unsupported"}))
    assert (nothing.winner, "no variant runs right" in nothing.said) == (None, True)


def test_one_that_fails_when_it_runs_again_does_not_win() -> None:
    count = {"a": 0, "b": 0}

    def probe(variant: str) -> Measurement:
        count[variant] += 1
        if variant == "a" and count["a"] == 3:
            return _failed("a", "crash")
        return _measured(variant, {"a": 1e6, "b": 1.02e6}[variant] + count[variant])

    winner = race(["a", "b"], probe).winner
    assert winner is not None
    assert winner.variant == "b"
