# SPDX-License-Identifier: Apache-2.0
"""The whole table, walked: from every phase with every event, as far as anything new comes, and what always holds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt_agent.machine import MAX_ATTEMPTS, MAX_SAVES, WORK, Effect, Event, Installed, Kind, State
from edgeopt_agent.machine_picture import write_into
from edgeopt_agent.transitions import TRANSITIONS, Transition, find, step
from edgeopt_wire.messages import DesiredModel, Phase

PAGE = Path(__file__).resolve().parents[2] / "docs" / "device-states.md"
OLD = Installed("A", "1", "1" * 64, "fp32")
NEW = Installed("B", "2", "2" * 64)
WISHES = (
    None,
    DesiredModel("tiny", "1", "t/1", rollout="back"),
    DesiredModel("tiny", "2", "t/2", rollout="first"),
    DesiredModel("tiny", "2", "t/2", rollout="second"),
)


def events(state: State) -> Iterator[Event]:
    for wish in WISHES:
        yield Event(Kind.DESIRED, desired=wish, revision=7)
    for arrived in (0, 1):
        yield Event(Kind.STARTED, arrived=arrived)
    version = state.desired.version if state.desired is not None else "2"
    yield Event(Kind.DONE, installed=Installed(state.free_slot, version, version * 64))
    yield Event(Kind.LOST, error="damaged")
    yield Event(Kind.AWAY, error="no network")
    yield Event(Kind.REFUSED, error="wrong outputs", key=NEW.package_sha256)
    if state.active is not None:
        yield Event(Kind.MEASURED, installed=replace(state.active, variant="int8"))
        digest = state.active.package_sha256
        yield Event(Kind.WORN, installed=state.previous, error="wrong outputs", key=digest)
        for before in (state.previous, None):
            yield Event(Kind.DEADLY, installed=before, error="starts died", key=digest)


@pytest.fixture(scope="module")
def walked() -> tuple[list[tuple[State, Event, State, tuple[Effect, ...]]], set[int]]:
    """Every state that events lead to from a fresh and from a serving device, and the rows that were taken.

    Counters are walked at their ends only, reasons as there or not.
    """
    begin = [State("tiny"), State("tiny", Phase.COMMITTED, active=OLD, desired=WISHES[1])]
    seen, left = set(map(repr, begin)), list(begin)
    steps, rows = [], set()
    while left:
        state = left.pop()
        for event in events(state):
            row = find(state, event)
            rows |= {TRANSITIONS.index(row)} if row is not None else set()
            after, effects = step(state, event)
            steps.append((state, event, after, effects))
            for attempts in (
                {min(after.attempts, 2), MAX_ATTEMPTS} if after.phase in WORK else {after.attempts}
            ):
                for saves in {min(after.saves, 2), MAX_SAVES} if after.phase in WORK else {after.saves}:
                    error, refused = "why" * bool(after.error), dict.fromkeys(after.refused, "why")
                    further = replace(after, attempts=attempts, saves=saves, error=error, refused=refused)
                    if repr(further) not in seen:
                        seen.add(repr(further))
                        left.append(further)
    return steps, rows


def test_every_row_is_reached_and_every_phase_but_one(walked: tuple) -> None:  # type: ignore[type-arg]
    steps, rows = walked
    assert rows == set(range(len(TRANSITIONS)))
    assert {after.phase for _, _, after, _ in steps} == set(Phase) - {Phase.ROLLING_BACK}


def test_what_changes_is_saved_first_and_what_serves_changes_only_with_a_trial(walked: tuple) -> None:  # type: ignore[type-arg]
    for state, event, after, effects in walked[0]:
        assert (after == state) == (Effect.SAVE not in effects)
        assert Effect.SAVE not in effects[1:]
        is_forgotten = event.kind is Kind.DESIRED and event.desired is None
        is_trial = state.phase is Phase.TRIAL and event.kind is Kind.DONE
        if after.active != state.active:
            assert is_forgotten or is_trial or event.kind in (Kind.MEASURED, Kind.WORN, Kind.DEADLY)
        if after.candidate is not None and after.phase in WORK and after.active is not None:
            assert after.candidate.slot != after.active.slot
        if after.phase in WORK and event.kind is not Kind.AWAY and effects:
            assert effects[-1] is WORK[after.phase]


def test_what_changes_before_it_is_saved_is_done_again_after_a_power_cut(walked: tuple) -> None:  # type: ignore[type-arg]
    for state, _, _, _ in walked[0]:
        first, effects = step(state, Event(Kind.STARTED))
        if first.phase in WORK:
            assert effects[-1] is WORK[first.phase]
        else:
            assert Effect.CLEAN in effects


def _always_lost(state: State) -> Event:
    return Event(Kind.LOST if state.phase is Phase.PROBING else Kind.DONE, installed=NEW, error="damaged")


def test_no_deployment_goes_on_for_ever_whatever_happens_in_it() -> None:
    state, _ = step(State("tiny", active=OLD), Event(Kind.DESIRED, desired=WISHES[2]))
    count = 0
    while state.phase in WORK and count < 200:
        count += 1
        state, _ = step(replace(state, attempts=1), _always_lost(state))
    assert (state.phase, state.active) == (Phase.FAILED, OLD)
    assert state.error.startswith("loop: 32 states were saved")
    assert count <= MAX_SAVES


def test_without_a_fault_a_deployment_takes_seven_saved_states() -> None:
    state, effects = step(State("tiny", active=OLD), Event(Kind.DESIRED, desired=WISHES[2]))
    saved = effects.count(Effect.SAVE)
    while state.phase in WORK:
        state, effects = step(state, Event(Kind.DONE, installed=NEW))
        saved += effects.count(Effect.SAVE)
    assert (state.phase, saved) == (Phase.COMMITTED, 7)


def test_board_that_is_switched_off_every_evening_downloads_for_weeks() -> None:
    state = State("tiny", Phase.DOWNLOADING, active=OLD, candidate=NEW, desired=WISHES[2], attempts=1)
    for day in range(1, 60):
        state, _ = step(state, Event(Kind.STARTED, arrived=10 * day))
        assert state.phase is Phase.RESOLVING
        state, _ = step(state, Event(Kind.DONE, installed=NEW))
    for _ in range(MAX_ATTEMPTS):
        state, _ = step(state, Event(Kind.STARTED, arrived=590))
    assert state.phase is Phase.FAILED, "and a start that finds nothing new counts"


def test_rows_hide_no_other_row() -> None:
    def hides(first: Transition, second: Transition) -> bool:
        return first.when is None and first.kind is second.kind and second.phases <= first.phases

    for number, row in enumerate(TRANSITIONS):
        assert not any(hides(before, row) for before in TRANSITIONS[:number])


def test_the_page_in_the_docs_says_what_the_table_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert write_into(text) == text, f"python -m edgeopt_agent.machine_picture {PAGE}"
