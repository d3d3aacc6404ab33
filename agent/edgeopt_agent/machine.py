# SPDX-License-Identifier: Apache-2.0
"""The device's life with one model, as a pure function: (State, Event) -> (State, Effects).

Rules:
- The table `TRANSITIONS` is everything that can happen. An event that it does not list changes nothing.
- The state is saved before its effects run (`Save` is always the first effect), and every effect may run twice: after
  a power cut the same state gives the same effects again (`resume`).
- The active package serves in every state. Only `Switch` changes it, and only after the probe has passed.
- A package that failed on its merits is refused by its digest until another rollout wants it: no loop of attempts.
- Attempts are counted before they are made; too many end in `failed`, not in a loop of restarts.

Modelled after Mender's state machine (save before act) and RAUC's slots.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgeopt_wire.messages import DesiredModel, Phase

MAX_ATTEMPTS = 5
"""Starts of one candidate before it is given up; a transport that is away does not count."""


@dataclass(frozen=True)
class Installed:
    """A package in a slot, the variant of it that serves, and under what conditions that was the fastest."""

    slot: str
    version: str
    package_sha256: str
    variant: str = ""
    measured_under: str = ""


@dataclass(frozen=True)
class State:
    """What is saved for one model. `refused` maps the digest of a target's index or package to the reason."""

    SCHEMA = "edgeopt.state/1"

    model: str
    phase: Phase = Phase.IDLE
    active: Installed | None = None
    previous: Installed | None = None
    candidate: Installed | None = None
    desired: DesiredModel | None = None
    attempts: int = 0
    error: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def free_slot(self) -> str:
        """The slot that a candidate may overwrite."""
        return "B" if self.active is not None and self.active.slot == "A" else "A"


class Effect(enum.Enum):
    """What the loop must do, in this order."""

    SAVE = "save"  # write the state, flushed, before anything else
    REPORT = "report"  # publish the new phase; never waited for
    RESOLVE = "resolve"  # find and verify the index of the desired target, check that it fits this device
    DOWNLOAD = "download"  # pull what is missing of the package
    VERIFY = "verify"  # read the package back, hash it, unpack it into the free slot
    PROBE = "probe"  # measure every variant of the candidate in a child process
    SWITCH = "switch"  # serve from the candidate
    REMOVE = "remove"  # stop serving and forget the model
    CLEAN = "clean"  # remove blobs and slots that nothing names


class Kind(enum.Enum):
    """What can happen."""

    DESIRED = "desired"  # the control plane wants `desired` (None: not this model any more)
    STARTED = "started"  # the agent started, after a power cut perhaps
    DONE = "done"  # the effect in hand succeeded; `installed` says what it found
    LOST = "lost"  # what arrived is damaged on the disk; it is fetched again
    AWAY = "away"  # the transport or the disk is in the way; try again later
    MEASURED = "measured"  # the active package was measured again; `installed` says which variant serves now
    REFUSED = "refused"  # the candidate is bad: it lies, does not fit, or fails its probe


@dataclass(frozen=True)
class Event:
    """Something that happened. `key` names what is refused (a digest)."""

    kind: Kind
    desired: DesiredModel | None = None
    installed: Installed | None = None
    error: str = ""
    key: str = ""


Outcome = tuple[State, tuple[Effect, ...]]

WORK = {
    Phase.RESOLVING: Effect.RESOLVE,
    Phase.DOWNLOADING: Effect.DOWNLOAD,
    Phase.VERIFYING: Effect.VERIFY,
    Phase.PROBING: Effect.PROBE,
    Phase.TRIAL: Effect.SWITCH,
}
"""The effect that a phase waits for."""

NEXT = {
    Phase.RESOLVING: Phase.DOWNLOADING,
    Phase.DOWNLOADING: Phase.VERIFYING,
    Phase.VERIFYING: Phase.PROBING,
    Phase.PROBING: Phase.TRIAL,
}
"""Where success leads."""


def step(state: State, event: Event) -> Outcome:
    """Return the next state and the effects to run; the same state and no effect if the event means nothing now."""
    for phases, kind, act in TRANSITIONS:
        if kind is event.kind and (phases is None or state.phase in phases):
            return act(state, event)
    return state, ()


def _desire(state: State, event: Event) -> Outcome:
    wanted = event.desired
    if wanted == state.desired and state.phase is not Phase.FAILED:
        return state, ()
    if wanted is None:
        gone = replace(
            state, phase=Phase.IDLE, desired=None, candidate=None, active=None, previous=None, error=""
        )
        return gone, (Effect.SAVE, Effect.REMOVE, Effect.REPORT, Effect.CLEAN)
    if state.active is not None and state.active.version == wanted.version:
        kept = replace(state, phase=Phase.IDLE, desired=wanted, candidate=None, attempts=0, error="")
        return kept, (Effect.SAVE, Effect.REPORT)
    if wanted == state.desired:  # it failed; only another wish starts it again
        return state, ()
    # an operator who starts another rollout of a refused package has a reason: the device was mended, say
    is_retry = state.desired is None or state.desired.rollout != wanted.rollout
    fresh = replace(
        state,
        phase=Phase.RESOLVING,
        desired=wanted,
        candidate=None,
        attempts=1,
        error="",
        refused={} if is_retry else state.refused,
    )
    return fresh, (Effect.SAVE, Effect.REPORT, Effect.RESOLVE)


def _resume(state: State, event: Event) -> Outcome:  # noqa: ARG001 - the signature of a transition
    if state.phase not in WORK:
        return state, (Effect.REPORT, Effect.CLEAN)
    if state.attempts >= MAX_ATTEMPTS:
        return _fail(state, f"given up after {state.attempts} starts in phase {state.phase.value}")
    # chunks that were verified stay on disk, so that going back to the index costs one small message
    phase = Phase.RESOLVING if state.phase in (Phase.DOWNLOADING, Phase.VERIFYING) else state.phase
    again = replace(state, phase=phase, attempts=state.attempts + 1)
    return again, (Effect.SAVE, Effect.REPORT, WORK[phase])


def _advance(state: State, event: Event) -> Outcome:
    phase = NEXT[state.phase]
    moved = replace(state, phase=phase, candidate=event.installed or state.candidate, error="")
    return moved, (Effect.SAVE, Effect.REPORT, WORK[phase])


def _commit(state: State, event: Event) -> Outcome:
    chosen = event.installed or state.candidate
    done = replace(
        state,
        phase=Phase.COMMITTED,
        active=chosen,
        previous=state.active,
        candidate=None,
        attempts=0,
        error="",
    )
    return done, (Effect.SAVE, Effect.REPORT, Effect.CLEAN)


def _wait(state: State, event: Event) -> Outcome:
    waiting = replace(state, error=event.error)
    return waiting, (Effect.SAVE, Effect.REPORT) if waiting != state else ()


def _fetch_again(state: State, event: Event) -> Outcome:
    if state.attempts >= MAX_ATTEMPTS:
        return _fail(state, event.error)
    again = replace(state, phase=Phase.RESOLVING, attempts=state.attempts + 1, error=event.error)
    return again, (Effect.SAVE, Effect.REPORT, Effect.RESOLVE)


def _refuse(state: State, event: Event) -> Outcome:
    refused = dict(state.refused)
    if event.key:
        refused[event.key] = event.error
    return _fail(replace(state, refused=refused), event.error)


def _roll_back(state: State, event: Event) -> Outcome:
    """The switch itself failed: the old package never stopped being the active one."""
    failed, effects = _refuse(state, event)
    return replace(failed, phase=Phase.ROLLED_BACK), effects


def _measured(state: State, event: Event) -> Outcome:
    """Another variant of the active package may serve from now on; another package may not."""
    found, active = event.installed, state.active
    if found is None or active is None or found.package_sha256 != active.package_sha256:
        return state, ()
    fresh = replace(state, active=found, error=event.error)
    return fresh, (Effect.SAVE, Effect.REPORT) if fresh != state else ()


def _fail(state: State, error: str) -> Outcome:
    failed = replace(state, phase=Phase.FAILED, attempts=0, error=error)
    return failed, (Effect.SAVE, Effect.REPORT, Effect.CLEAN)


_BEFORE_TRIAL = frozenset(NEXT)
_WORKING = frozenset(WORK)
_AT_REST = frozenset(Phase) - _WORKING

TRANSITIONS: tuple[tuple[frozenset[Phase] | None, Kind, Callable[[State, Event], Outcome]], ...] = (
    # in these phases (None: any)        on this event   do this
    (None, Kind.DESIRED, _desire),
    (None, Kind.STARTED, _resume),
    (_BEFORE_TRIAL, Kind.DONE, _advance),
    (frozenset({Phase.TRIAL}), Kind.DONE, _commit),
    (frozenset({Phase.VERIFYING, Phase.PROBING}), Kind.LOST, _fetch_again),
    (_WORKING, Kind.AWAY, _wait),
    (_AT_REST, Kind.MEASURED, _measured),
    (_BEFORE_TRIAL, Kind.REFUSED, _refuse),
    (frozenset({Phase.TRIAL}), Kind.REFUSED, _roll_back),
)
