# SPDX-License-Identifier: Apache-2.0
"""The device's life with one model, as a table and a pure function: (State, Event) -> (State, Effects).

The rules are those of `machine`. Modelled after Mender's state machine (save before act) and RAUC's slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from edgeopt_agent.machine import MAX_ATTEMPTS, MAX_SAVES, NEXT, WORK, Effect, Event, Kind, State
from edgeopt_wire.messages import Phase

Outcome = tuple[State, tuple[Effect, ...]]


@dataclass(frozen=True)
class Transition:
    """One row: in these phases, on this event, `when` that holds, go to a phase (None: stay), `change` the rest of the state.

    The first line of what `when` and `change` say of themselves is their text in the table that people read.
    """

    phases: frozenset[Phase]
    kind: Kind
    to: Phase | None
    change: Callable[[State, Event], State]
    when: Callable[[State, Event], bool] | None = None
    effects: tuple[Effect, ...] = (Effect.REPORT,)
    is_counted: bool = True


def step(state: State, event: Event) -> Outcome:
    """Return the next state and the effects to run; the same state and no effect if the event means nothing now."""
    row = find(state, event)
    if row is None:
        return state, ()
    after = row.change(state, event)
    after = replace(after, phase=row.to or state.phase)
    if row.is_counted and after.phase in WORK:
        after = replace(after, saves=after.saves + 1)
    work = (WORK[after.phase],) if after.phase in WORK and row.is_counted else ()
    saved = (Effect.SAVE,) if after != state else ()
    return after, (*saved, *row.effects, *work)


def find(state: State, event: Event) -> Transition | None:
    """The row that counts."""
    for row in TRANSITIONS:
        is_meant = row.kind is event.kind and state.phase in row.phases
        if is_meant and (row.when is None or row.when(state, event)):
            return row
    return None


def _is_nobodys(state: State, event: Event) -> bool:
    """Nobody wants the model any more."""
    return event.desired is None and state.desired is not None


def _is_running(state: State, event: Event) -> bool:
    """The version that is wanted is active."""
    is_news = event.desired != state.desired or state.phase is Phase.FAILED
    active, wanted = state.active, event.desired
    return is_news and active is not None and wanted is not None and active.version == wanted.version


def _is_new(state: State, event: Event) -> bool:
    """Another version is wanted, or another rollout wants it."""
    return event.desired is not None and event.desired != state.desired


def _is_forgotten(state: State, event: Event) -> bool:  # noqa: ARG001 - the signature of a guard
    """A power cut ended its removal."""
    return state.saves > 0 and not (state.desired or state.active or state.candidate)


def _is_spent(state: State, event: Event) -> bool:  # noqa: ARG001
    """The budget of saved states is spent."""
    return state.saves >= MAX_SAVES


def _is_worn(state: State, event: Event) -> bool:
    """Too many attempts, and this start found no more of the package than the last."""
    return state.attempts >= MAX_ATTEMPTS and event.arrived <= state.arrived


def _is_news(state: State, event: Event) -> bool:
    """The reason is another one than before."""
    return event.error != state.error


def _is_other(state: State, event: Event) -> bool:
    """It is about the active package, and says something else than before."""
    found, active = event.installed, state.active
    is_same_package = found and active and found.package_sha256 == active.package_sha256
    return bool(is_same_package) and (found != active or event.error != state.error)


def _forget(state: State, event: Event) -> State:
    """Forget everything about the model."""
    return State(state.model, saves=1, revision=event.revision, extra=state.extra)


def _keep(state: State, event: Event) -> State:
    """End the work in hand."""
    return replace(
        state, desired=event.desired, candidate=None, attempts=0, error="", revision=event.revision
    )


def _begin(state: State, event: Event) -> State:
    """Attempt 1; another rollout forgets what was refused."""
    # an operator who starts another rollout of a refused package has a reason: the device was mended, say
    assert event.desired is not None, "the row is for a wish"
    is_retry = state.desired is None or state.desired.rollout != event.desired.rollout
    return replace(
        state,
        desired=event.desired,
        candidate=None,
        attempts=1,
        error="",
        refused={} if is_retry else state.refused,
        saves=0,
        arrived=0,
        revision=event.revision,
    )


def _same(state: State, event: Event) -> State:  # noqa: ARG001 - the signature of a change
    """Nothing else."""
    return state


def _resume(state: State, event: Event) -> State:
    """Count the attempt; attempt 1 where more of the package is there."""
    is_further = event.arrived > state.arrived
    return replace(
        state,
        attempts=1 if is_further else state.attempts + 1,
        arrived=max(event.arrived, state.arrived),
        saves=0 if is_further else state.saves,
    )


def _take(state: State, event: Event) -> State:
    """Keep what was found."""
    return replace(state, candidate=event.installed or state.candidate, error="")


def _commit(state: State, event: Event) -> State:
    """The candidate is active, what was active is previous."""
    chosen = event.installed or state.candidate
    return replace(state, active=chosen, previous=state.active, candidate=None, attempts=0, error="")


def _note(state: State, event: Event) -> State:
    """Keep the reason."""
    return replace(state, error=event.error)


def _lose(state: State, event: Event) -> State:
    """Count the attempt, keep the reason."""
    return replace(state, attempts=state.attempts + 1, error=event.error)


def _refuse(state: State, event: Event) -> State:
    """Refuse the package by its digest."""
    refused = {**state.refused, event.key: event.error} if event.key else state.refused
    return replace(state, refused=refused, attempts=0, error=event.error)


def _give_up(state: State, event: Event) -> State:
    """Give up, with the reason."""
    starts = f"given up after {state.attempts} starts in phase {state.phase.value}"
    return replace(state, attempts=0, error=event.error or starts)


def _break(state: State, event: Event) -> State:
    """Give up: loop."""
    why = (
        f"loop: {state.saves} states were saved and none was the last; given up in phase {state.phase.value}"
    )
    return replace(state, attempts=0, error=f"{why}: {event.error}" if event.error else why)


def _measure(state: State, event: Event) -> State:
    """Another variant of the active package may serve."""
    return replace(state, active=event.installed, error=event.error)


def _go_back(state: State, event: Event) -> State:
    """The previous package is active again; the other is refused by its digest."""
    refused = {**state.refused, event.key: event.error} if event.key else state.refused
    return replace(state, active=event.installed, previous=None, refused=refused, error=event.error)


def _go_back_first(state: State, event: Event) -> State:
    """The previous package is active again, the other is refused; the candidate is for the slot that is free now."""
    return replace(_go_back(state, event), candidate=None)


def _is_previous(state: State, event: Event) -> bool:
    """It is about the active package, and the previous one is there."""
    found, before, active = event.installed, state.previous, state.active
    is_there = found is not None and before is not None and found.package_sha256 == before.package_sha256
    return is_there and active is not None and active.package_sha256 == event.key


_ANY = frozenset(Phase)
_WORKING = frozenset(WORK)
_BEFORE_TRIAL = frozenset(NEXT)
_TRIAL = frozenset({Phase.TRIAL})
_FETCHING = frozenset({Phase.RESOLVING, Phase.DOWNLOADING, Phase.VERIFYING})
_STORED = frozenset({Phase.STAGED, Phase.PROBING, Phase.TRIAL})
_READING = _STORED | {Phase.VERIFYING}
_TOLD = (Effect.REPORT, Effect.CLEAN)

TRANSITIONS: tuple[Transition, ...] = (
    Transition(_ANY, Kind.DESIRED, Phase.IDLE, _forget, _is_nobodys, (Effect.REMOVE, *_TOLD)),
    Transition(_ANY, Kind.DESIRED, Phase.IDLE, _keep, _is_running, _TOLD),
    Transition(_ANY, Kind.DESIRED, Phase.RESOLVING, _begin, _is_new),
    Transition(_ANY - _WORKING, Kind.STARTED, None, _same, _is_forgotten, (Effect.REMOVE, *_TOLD)),
    Transition(_ANY - _WORKING, Kind.STARTED, None, _same, None, _TOLD),
    Transition(_WORKING, Kind.STARTED, Phase.FAILED, _give_up, _is_worn, _TOLD),
    Transition(_WORKING, Kind.STARTED, Phase.FAILED, _break, _is_spent, _TOLD),
    # chunks that were verified stay on disk, so that going back to the index costs one small message
    Transition(_FETCHING, Kind.STARTED, Phase.RESOLVING, _resume),
    Transition(_STORED, Kind.STARTED, None, _resume),
    Transition(_BEFORE_TRIAL, Kind.DONE, Phase.FAILED, _break, _is_spent, _TOLD),
    *(Transition(frozenset({phase}), Kind.DONE, to, _take) for phase, to in NEXT.items()),
    Transition(_TRIAL, Kind.DONE, Phase.COMMITTED, _commit, None, _TOLD),
    Transition(_READING, Kind.LOST, Phase.FAILED, _give_up, _is_worn, _TOLD),
    Transition(_READING, Kind.LOST, Phase.FAILED, _break, _is_spent, _TOLD),
    Transition(_READING, Kind.LOST, Phase.RESOLVING, _lose),
    Transition(_WORKING, Kind.AWAY, None, _note, _is_news, is_counted=False),
    Transition(_BEFORE_TRIAL, Kind.REFUSED, Phase.FAILED, _refuse, None, _TOLD),
    # the old package never stopped being the active one
    Transition(_TRIAL, Kind.REFUSED, Phase.ROLLED_BACK, _refuse, None, _TOLD),
    Transition(_ANY - _WORKING, Kind.MEASURED, None, _measure, _is_other),
    Transition(_ANY - _WORKING, Kind.WORN, Phase.ROLLED_BACK, _go_back, _is_previous, _TOLD),
    Transition(_ANY - _WORKING, Kind.DEADLY, Phase.ROLLED_BACK, _go_back, _is_previous, _TOLD),
    Transition(_WORKING, Kind.DEADLY, Phase.RESOLVING, _go_back_first, _is_previous),
    # the model does not serve, which is reported beside its state; what is at work may bring one that does
    Transition(_ANY - _WORKING, Kind.DEADLY, None, _note, _is_news),
)
"""Everything that can happen; the first row that fits counts."""
