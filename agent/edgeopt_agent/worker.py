# SPDX-License-Identifier: Apache-2.0
"""What is done: each model's machine is fed, its effects run in their order, and what was put off is tried again.

Rules:
- The state is on the disk before an effect runs.
- A model whose record cannot be read now waits for the disk; one whose record a newer agent wrote serves and is left.
- Loading is counted before it begins: what took some starts along is not loaded at the next (`loads`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from edgeopt_agent import machine
from edgeopt_agent.housekeeping import Housekeeper
from edgeopt_agent.installer import Installer
from edgeopt_agent.loads import Loads
from edgeopt_agent.machine import Effect, Event, Installed, Kind, State
from edgeopt_agent.pauses import Pause
from edgeopt_agent.records import NewerRecordError
from edgeopt_agent.remeasure import CHECK_S
from edgeopt_agent.serve.models import Models
from edgeopt_agent.store import Store
from edgeopt_agent.telling import Teller
from edgeopt_agent.transitions import step
from edgeopt_wire.errors import EdgeoptError, StoreError
from edgeopt_wire.messages import DesiredModel, Phase

_log = logging.getLogger(__name__)


class Worker:
    """The work of one device's models."""

    def __init__(
        self,
        store: Store,
        keeper: Housekeeper,
        models: Models,
        installer: Installer,
        teller: Teller,
        *,
        monotonic: Callable[[], float],
    ) -> None:
        self.states: dict[str, State] = {}
        self._store = store
        self._keeper = keeper
        self._models = models
        self._installer = installer
        self._teller = teller
        self._monotonic = monotonic
        self._work: dict[str, Effect] = {}
        self._pauses: dict[str, Pause] = {}
        self._unstarted: set[str] = set()
        self._unread: set[str] = set()
        self._held: dict[str, str] = {}
        self._loads = Loads(store.folder)
        self.unserved: dict[str, str] = {}
        """Models that are not loaded any more since they took the agent along, and why."""
        self.look_at: Callable[[State], Event | None] = installer.look
        """Looks after a model with nothing else to do."""
        self._looked_at = float("-inf")

    @property
    def is_busy(self) -> bool:
        """Whether some work waits, put off or not."""
        return bool(self._work or self._unstarted)

    @property
    def known(self) -> dict[str, State]:
        """The states that this agent can answer for: not of records that it cannot read, or that are newer than it."""
        odd = self._unread | self._held.keys()
        return {name: state for name, state in self.states.items() if name not in odd}

    def start(self) -> None:
        """Serve what is active, then take up what was interrupted."""
        self._store.recover()
        for name in self._store.models():
            self._open(name)
        for name in sorted(self.states, key=self._danger):
            self._serve(name)
        for name in sorted(self.known):
            self._start(name)

    def online(self) -> None:
        """The other side is there again: try what was put off soon."""
        for pause in self._pauses.values():
            pause.shorten(self._monotonic())

    def want(self, wanted: dict[str, DesiredModel], revision: int) -> None:
        """Follow what is wanted now: every model of it, and none of those that were wanted and are no more.

        Raises:
            StoreError: Not all of it is saved; want it again.
        """
        for name in sorted(self._unread):
            self._open(name)
            self._serve(name)
        for name in sorted({*wanted, *self.states}):
            state = self.states.setdefault(name, State(name))
            if name in self._unread:
                raise StoreError(state.error)
            if name in wanted or state.desired is not None:
                self.feed(name, Event(Kind.DESIRED, desired=wanted.get(name), revision=revision))
                self._try_again(state, wanted.get(name))

    def feed(self, name: str, event: Event) -> None:
        """Take one step of a model's machine and run its effects in their order."""
        if name in self._held:
            _log.warning("%s", self._held[name])
            return
        state, effects = step(self.states[name], event)
        if event.kind is Kind.AWAY:
            self._put_off(name)
        elif effects:
            self._pauses.pop(name, None)
        if state.phase not in machine.WORK:
            self._work.pop(name, None)
        for effect in effects:
            self._run(effect, name, state)
        if state.active != self.states[name].active:
            self.unserved.pop(name, None)
        self.states[name] = state
        if Effect.REMOVE in effects:
            del self.states[name]

    def _run(self, effect: Effect, name: str, state: State) -> None:
        if effect is Effect.SAVE:
            self._store.save_state(state)
        elif effect is Effect.REPORT:
            self._teller.note_phase(state)
        elif effect is Effect.CLEAN:
            self._keeper.clean({**self.known, name: state})
        elif effect is Effect.REMOVE:
            self._models.deactivate(name)
            self._store.remove(name)
        else:
            self._work[name] = effect

    def do_one(self) -> None:
        """Do one piece of work that is due."""
        for name in sorted(self._unstarted):
            if not self._is_paused(name):
                self._start(name)
        for name, effect in list(self._work.items()):
            if self._is_paused(name):
                continue
            _log.info("%s: %s", name, effect.value)
            event = self._installer.work(effect, self.states[name])
            if event.kind is not Kind.AWAY:
                self._work.pop(name, None)
            try:
                self.feed(name, event)
            except StoreError as error:
                # the state is not saved: the effect runs again when the disk allows it
                _log.error("%s: %s", name, error)
                self._work[name] = effect
                self._put_off(name)
            return

    def look(self) -> None:
        """Now and then, with nothing else to do: does what was measured still count?"""
        if self._monotonic() - self._looked_at < CHECK_S:
            return
        self._looked_at = self._monotonic()
        for name, state in list(self.states.items()):
            if name in self.unserved:  # to look is to load
                continue
            try:
                event = self.look_at(state)
                if event is not None:
                    self.feed(name, event)
            except EdgeoptError as error:
                _log.warning("%s is not measured again yet: %s", name, error)

    def _start(self, name: str) -> None:
        try:
            if name in self._unread:
                self._open(name, again=True)
                self._serve(name)
            if name in self.states:
                candidate = self.states[name].candidate
                arrived = self._store.arrived(candidate.package_sha256) if candidate is not None else 0
                self.feed(name, Event(Kind.STARTED, arrived=arrived))
            self._unstarted.discard(name)
        except StoreError as error:
            _log.error("%s: what was interrupted waits for the disk: %s", name, error)
            self._unstarted.add(name)
            self._put_off(name)

    def _open(self, name: str, *, again: bool = False) -> None:
        """Read a model's record; what cannot be read now is tried again.

        Raises:
            StoreError: With `again`: it still cannot be read.
        """
        try:
            self.states[name] = self._store.open_state(name)
            self._unread.discard(name)
        except NewerRecordError as error:
            _log.error("%s", error)
            self._held[name] = str(error)
            self.states[name] = replace(self._store.load_state(name), phase=Phase.FAILED)
            self._unread.discard(name)
        except StoreError as error:
            self._unread.add(name)
            self._unstarted.add(name)
            self.states[name] = State(name, error=str(error))
            if again:
                raise
            self._put_off(name)

    def _serve(self, name: str) -> None:
        """Serve what is active; what took the agent along too often is left, for the previous package where that is whole."""
        state = self.states[name]
        if state.active is not None and self._loads.is_deadly(name, state.active):
            self._leave(state, state.active)
            state = self.states[name]
        if state.active is None or name in self.unserved:
            return
        try:
            with self._loads.counted(name, state.active):
                self._models.activate(name, state.active)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises, the others serve
            _log.error(
                "%s: the active package cannot be served: %s",
                name,
                error,
                exc_info=not isinstance(error, EdgeoptError),
            )
            self.states[name] = replace(state, error=f"cannot be served: {error}")

    def _leave(self, state: State, active: Installed) -> None:
        name, why = state.model, self._loads.why(state.model, active)
        _log.error("%s: %s", name, why)
        try:
            is_whole = state.previous is not None and self._is_here(name, state.previous)
            before = state.previous if is_whole else None
            said = why if is_whole else f"degraded: {why}"
            self.feed(name, Event(Kind.DEADLY, installed=before, error=said, key=active.package_sha256))
        except StoreError as error:
            _log.error("%s: not saved: %s", name, error)
        if self.states[name].active == active:
            self.unserved[name] = why
            self._models.leave(name, active.version, why)

    def _is_here(self, name: str, installed: Installed) -> bool:
        """Whether a package is in its slot, every byte of it; it is put there again where the store has it."""
        slot, digest = installed.slot, installed.package_sha256
        packages = self._store.packages
        if packages.find(digest) is None and self._store.is_whole(name, slot, digest):
            packages.adopt(digest, self._store.slot(name, slot))  # an older agent filled it
        return self._store.place(name, slot, digest)

    def _try_again(self, before: State, wanted: DesiredModel | None) -> None:
        """Another rollout wants a version that is not loaded any more: the device was mended, say."""
        if before.model not in self.unserved or before.active is None or wanted is None:
            return
        is_same = before.desired is not None and before.desired.rollout == wanted.rollout
        if not is_same and wanted.version == before.active.version:
            del self.unserved[before.model]
            self._loads.forget(before.model)
            self._serve(before.model)

    def _danger(self, name: str) -> tuple[int, str]:
        """What took starts along is loaded last: the others serve until then."""
        active = self.states[name].active
        return (self._loads.deaths(name, active) if active is not None else 0, name)

    def _is_paused(self, name: str) -> bool:
        pause = self._pauses.get(name)
        return pause is not None and self._monotonic() < pause.until

    def _put_off(self, name: str) -> None:
        self._pauses.setdefault(name, Pause()).begin(self._monotonic())
