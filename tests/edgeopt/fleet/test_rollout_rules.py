# SPDX-License-Identifier: Apache-2.0
from datetime import UTC, datetime, timedelta

import pytest

from edgeopt.fleet.rules import FAILURES, FINAL, Part, Step, assign_waves, next_step, status_of
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.messages import Phase, Reported, ReportedModel

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
DEADLINE = timedelta(minutes=10)


def part(device: str, wave: int, status: str, minutes_ago: float | None = None) -> Part:
    if minutes_ago is None and status != "pending":
        minutes_ago = 1
    return Part(device, wave, status, None if minutes_ago is None else NOON - timedelta(minutes=minutes_ago))


def step(*parts: Part, max_failures: int = 0) -> Step:
    return next_step(parts, now=NOON, deadline=DEADLINE, max_failures=max_failures)


def report(phase: Phase, version: str = "", candidate: str = "", error: str = "") -> Reported:
    model = ReportedModel("tiny", phase, version=version, candidate_version=candidate, error=error)
    return Reported("d1", "host", "s", 1, "0", (ReportedModel("other", Phase.COMMITTED, version="2"), model))


@pytest.mark.parametrize(
    ("phase", "version", "candidate", "expected"),
    [
        (Phase.IDLE, "1", "", ""),
        (Phase.RESOLVING, "1", "2", "accepted"),
        (Phase.DOWNLOADING, "1", "2", "downloading"),
        (Phase.VERIFYING, "1", "2", "downloading"),
        (Phase.STAGED, "1", "2", "staged"),
        (Phase.PROBING, "1", "2", "probing"),
        (Phase.TRIAL, "1", "2", "trial"),
        (Phase.COMMITTED, "2", "", "succeeded"),
        (Phase.COMMITTED, "2", "2", "succeeded"),
        (Phase.IDLE, "2", "", "succeeded"),
        (Phase.DOWNLOADING, "2", "3", ""),
        (Phase.ROLLED_BACK, "1", "2", "rolled_back"),
        (Phase.FAILED, "1", "2", "failed"),
        (Phase.FAILED, "1", "9", ""),
    ],
)
def test_only_the_word_on_this_version_counts(
    phase: Phase, version: str, candidate: str, expected: str
) -> None:
    assert status_of(report(phase, version, candidate), model="tiny", version="2", rollout="7")[0] == expected


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_of_a_candidate_has_a_status(phase: Phase) -> None:
    assert status_of(report(phase, "1", "2"), model="tiny", version="2", rollout="7")[0]


@pytest.mark.parametrize(("named", "expected"), [("7", "failed"), ("", "failed"), ("6", ""), ("77", "")])
def test_word_on_another_rollout_of_the_same_version_does_not_count(named: str, expected: str) -> None:
    model = ReportedModel("tiny", Phase.FAILED, version="1", candidate_version="2", rollout=named)
    said = Reported("d1", "host", "s", 1, "0", (model,))
    assert status_of(said, model="tiny", version="2", rollout="7")[0] == expected


def test_failure_keeps_its_reason() -> None:
    assert status_of(
        report(Phase.FAILED, "1", "2", "golden 3.1 dB"), model="tiny", version="2", rollout="7"
    ) == (
        "failed",
        "golden 3.1 dB",
    )


def test_first_wave_is_offered_and_the_second_waits() -> None:
    assert step(part("a", 0, "pending"), part("b", 1, "pending")) == Step(offer=("a",))


@pytest.mark.parametrize("status", ["offered", "downloading", "probing", "trial"])
def test_second_wave_waits_while_the_first_works(status: str) -> None:
    assert step(part("a", 0, status), part("b", 1, "pending")) == Step()


def test_second_wave_opens_when_the_first_has_committed() -> None:
    assert step(part("a", 0, "succeeded"), part("b", 1, "pending"), part("c", 1, "pending")).offer == (
        "b",
        "c",
    )


@pytest.mark.parametrize("status", FAILURES)
def test_any_failure_beyond_those_allowed_halts_and_names_the_device(status: str) -> None:
    found = step(part("a", 0, status), part("b", 1, "pending"))
    assert (found.status, found.offer) == ("halted", ())
    assert "a" in found.reason
    assert "0 are allowed" in found.reason


def test_allowed_failure_does_not_stop_the_next_wave() -> None:
    found = step(part("a", 0, "failed"), part("b", 0, "succeeded"), part("c", 1, "pending"), max_failures=1)
    assert (found.status, found.offer) == ("running", ("c",))


def test_silence_until_the_deadline_is_a_failure() -> None:
    found = step(part("a", 0, "downloading", minutes_ago=10.1), part("b", 1, "pending"))
    assert found.timed_out == ("a",)
    assert found.status == "halted"


def test_deadline_itself_is_not_late() -> None:
    assert step(part("a", 0, "downloading", minutes_ago=10)) == Step()


def test_device_that_was_not_offered_anything_is_never_late() -> None:
    assert step(part("a", 0, "offered", minutes_ago=1), part("b", 1, "pending")).timed_out == ()


def test_finished_device_is_never_late() -> None:
    assert step(part("a", 0, "succeeded", minutes_ago=99), part("b", 0, "trial")).timed_out == ()


@pytest.mark.parametrize("status", FINAL)
def test_rollout_ends_when_nothing_is_open(status: str) -> None:
    expected = "superseded" if status == "superseded" else "succeeded"
    assert step(part("a", 0, status), max_failures=1).status == expected


def test_waves_take_their_percent_of_each_class() -> None:
    devices = [(f"p{i}", "pi") for i in range(10)] + [(f"j{i}", "jetson") for i in range(5)]
    waves = assign_waves(devices, [20, 60, 100])
    assert [sum(waves[f"p{i}"] == wave for i in range(10)) for wave in range(3)] == [2, 4, 4]
    assert [sum(waves[f"j{i}"] == wave for i in range(5)) for wave in range(3)] == [1, 2, 2]


def test_small_percent_still_tries_one_device_first() -> None:
    assert sorted(assign_waves([("a", "pi"), ("b", "pi"), ("c", "pi")], [1, 100]).values()) == [0, 1, 1]


def test_order_of_devices_changes_nothing() -> None:
    devices = [(f"d{i}", "pi") for i in range(7)]
    assert assign_waves(devices, [30, 100]) == assign_waves(devices[::-1], [30, 100])


@pytest.mark.parametrize("percents", [[], [50], [100, 50], [0, 100], [50, 50, 100], [20, 120]])
def test_odd_waves_are_refused(percents: list[int]) -> None:
    with pytest.raises(RecipeError, match="end with 100"):
        assign_waves([("a", "pi")], percents)
