# SPDX-License-Identifier: Apache-2.0
"""The device's life as a table: every phase meets every event, and the active package always survives."""

from dataclasses import replace

import pytest

from edgeopt_agent.machine import (
    MAX_ATTEMPTS,
    NEXT,
    WORK,
    Effect,
    Event,
    Installed,
    Kind,
    State,
)
from edgeopt_agent.transitions import step
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.messages import DesiredModel, Phase

OLD = Installed("A", "1", "1" * 64, "fp32")
NEW = Installed("B", "2", "2" * 64)
WANTED = DesiredModel("tiny", "2", "models/tiny/2/host.json", rollout="first")


def in_phase(phase: Phase) -> State:
    return State("tiny", phase, active=OLD, candidate=NEW, desired=WANTED, attempts=1)


def events() -> list[Event]:
    return [
        Event(Kind.DESIRED, desired=WANTED),
        Event(Kind.STARTED),
        Event(Kind.DONE, installed=NEW),
        Event(Kind.LOST, error="damaged"),
        Event(Kind.AWAY, error="no network"),
        Event(Kind.REFUSED, error="wrong outputs", key=NEW.package_sha256),
    ]


def test_happy_path_goes_through_every_phase_in_order() -> None:
    state, effects = step(State("tiny", active=OLD), Event(Kind.DESIRED, desired=WANTED))
    seen = [state.phase]
    while state.phase in WORK:
        assert effects[0] is Effect.SAVE
        assert effects[-1] is WORK[state.phase]
        state, effects = step(state, Event(Kind.DONE, installed=NEW))
        seen.append(state.phase)
    assert seen == [
        Phase.RESOLVING,
        Phase.DOWNLOADING,
        Phase.VERIFYING,
        Phase.STAGED,
        Phase.PROBING,
        Phase.TRIAL,
        Phase.COMMITTED,
    ]
    assert (state.active, state.previous, state.candidate, state.attempts) == (NEW, OLD, None, 0)


@pytest.mark.parametrize("event", events(), ids=lambda event: event.kind.value)
@pytest.mark.parametrize("phase", Phase)
def test_only_a_finished_trial_changes_what_serves(phase: Phase, event: Event) -> None:
    after, _ = step(in_phase(phase), event)
    is_commit = phase is Phase.TRIAL and event.kind is Kind.DONE
    assert after.active == (NEW if is_commit else OLD)


@pytest.mark.parametrize("event", events(), ids=lambda event: event.kind.value)
@pytest.mark.parametrize("phase", Phase)
def test_whatever_changes_is_saved_before_anything_else(phase: Phase, event: Event) -> None:
    before = in_phase(phase)
    after, effects = step(before, event)
    if after != before:
        assert effects[0] is Effect.SAVE


@pytest.mark.parametrize("phase", list(WORK))
def test_start_in_a_working_phase_takes_the_work_up_again(phase: Phase) -> None:
    after, effects = step(in_phase(phase), Event(Kind.STARTED))
    assert after.attempts == 2
    assert effects[-1] is WORK[after.phase]
    assert after.phase is phase or after.phase is Phase.RESOLVING


@pytest.mark.parametrize("phase", list(WORK))
def test_too_many_starts_give_up_and_the_old_model_stays(phase: Phase) -> None:
    state = in_phase(phase)
    for _ in range(2 * MAX_ATTEMPTS):
        state, _ = step(state, Event(Kind.STARTED))
    assert state.phase is Phase.FAILED
    assert state.active == OLD
    assert "given up" in state.error


def test_transport_that_is_away_never_uses_up_the_attempts() -> None:
    state = in_phase(Phase.DOWNLOADING)
    for _ in range(10 * MAX_ATTEMPTS):
        state, _ = step(state, Event(Kind.AWAY, error="no network"))
    assert (state.phase, state.attempts) == (Phase.DOWNLOADING, 1)


def test_same_wait_twice_writes_to_the_disk_once() -> None:
    waiting, first = step(in_phase(Phase.DOWNLOADING), Event(Kind.AWAY, error="no network"))
    _, second = step(waiting, Event(Kind.AWAY, error="no network"))
    assert Effect.SAVE in first
    assert second == ()


def test_package_that_is_damaged_again_and_again_is_given_up() -> None:
    state = in_phase(Phase.VERIFYING)
    for _ in range(2 * MAX_ATTEMPTS):
        state, _ = step(replace(state, phase=Phase.VERIFYING), Event(Kind.LOST, error="damaged"))
        if state.phase is Phase.FAILED:
            break
    assert (state.phase, state.error) == (Phase.FAILED, "damaged")


@pytest.mark.parametrize("phase", [*NEXT, Phase.TRIAL])
def test_refused_package_is_remembered_with_its_reason(phase: Phase) -> None:
    after, _ = step(in_phase(phase), Event(Kind.REFUSED, error="wrong outputs", key="2" * 64))
    assert after.phase is (Phase.ROLLED_BACK if phase is Phase.TRIAL else Phase.FAILED)
    assert after.refused == {"2" * 64: "wrong outputs"}


def test_same_wish_does_not_start_a_failed_package_again() -> None:
    failed, _ = step(in_phase(Phase.PROBING), Event(Kind.REFUSED, error="wrong", key="2" * 64))
    assert step(failed, Event(Kind.DESIRED, desired=WANTED)) == (failed, ())


def test_another_rollout_of_a_refused_package_is_tried() -> None:
    failed, _ = step(in_phase(Phase.PROBING), Event(Kind.REFUSED, error="wrong", key="2" * 64))
    again, effects = step(failed, Event(Kind.DESIRED, desired=replace(WANTED, rollout="second")))
    assert (again.phase, again.refused, effects[-1]) == (Phase.RESOLVING, {}, Effect.RESOLVE)


def test_wish_for_what_runs_ends_the_work_in_hand() -> None:
    back = DesiredModel("tiny", "1", "models/tiny/1/host.json", rollout="back")
    after, effects = step(in_phase(Phase.DOWNLOADING), Event(Kind.DESIRED, desired=back))
    assert (after.phase, after.active, after.candidate) == (Phase.IDLE, OLD, None)
    assert Effect.RESOLVE not in effects


def test_model_that_nobody_wants_is_removed() -> None:
    after, effects = step(in_phase(Phase.COMMITTED), Event(Kind.DESIRED))
    assert after.active is None
    assert Effect.REMOVE in effects


@pytest.mark.parametrize("active", [None, OLD, replace(OLD, slot="B")])
def test_candidate_never_takes_the_slot_that_serves(active: Installed | None) -> None:
    state = State("tiny", active=active)
    assert active is None or state.free_slot != active.slot


@pytest.mark.parametrize("phase", Phase)
def test_state_survives_its_bytes(phase: Phase) -> None:
    state = in_phase(phase)
    assert from_bytes(State, to_bytes(state)) == state
