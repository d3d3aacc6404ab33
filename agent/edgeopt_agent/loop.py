# SPDX-License-Identifier: Apache-2.0
"""The agent's loop: takes messages, runs effects, feeds events back. The only place with a clock and a while.

Rules:
- The state is on the disk before an effect runs; reports and events are queued, never waited for.
- What is put off is tried again with full jitter up to `MAX_PAUSE_S`; a message or a reconnect ends the pause.
- `desired` counts only with the director's signature, for this device, and not older than the newest that was seen.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from edgeopt_agent import machine
from edgeopt_agent.config import AgentConfig
from edgeopt_agent.installer import Installer
from edgeopt_agent.machine import Effect, Event, Kind, State
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.probe import ProbeRequest
from edgeopt_agent.remeasure import CHECK_S
from edgeopt_agent.serve.models import Models
from edgeopt_agent.store import DeviceRecord, Store
from edgeopt_agent.telling import Teller, reported_model
from edgeopt_agent.transports import Acknowledged, Inbox, Online, Transport, Wanted
from edgeopt_agent.trust import Trust
from edgeopt_wire import __version__
from edgeopt_wire.document import format_moment, parse_moment
from edgeopt_wire.errors import EdgeoptError, ForgedError, StoreError, TransportError
from edgeopt_wire.measurement import Measurement
from edgeopt_wire.messages import Desired, Reported

_log = logging.getLogger(__name__)

TICK_S = 0.5
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
FAULT_PAUSE_S = 5.0


@dataclass
class _Pause:
    """How long to wait before work that was put off is tried again."""

    until: float = 0.0
    seconds: float = FIRST_PAUSE_S


class Agent:
    """One device. `now` gives trusted UTC moments, `monotonic` seconds that only go forward.

    `progress` is called whenever the loop got somewhere, long work included: who hears nothing knows that it hangs.
    """

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        transport: Transport,
        inbox: Inbox,
        *,
        trust: Trust,
        outbox: Outbox,
        models: Models,
        probe: Callable[[ProbeRequest], Measurement],
        now: Callable[[], datetime],
        session: str,
        monotonic: Callable[[], float] = time.monotonic,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.store = store
        self.transport = transport
        self.trust = trust
        self.outbox = outbox
        self.models = models
        self.states: dict[str, State] = {}
        self._inbox = inbox
        self._now = now
        self._session = session
        self._monotonic = monotonic
        self._progress = progress
        self._stop = threading.Event()
        self._work: dict[str, Effect] = {}
        self._pauses: dict[str, _Pause] = {}
        self._unstarted: set[str] = set()
        self._unread: bytes | None = None
        self._unread_pause = _Pause()
        self.unread_because = ""
        """Why the newest desired document cannot be followed yet, empty if it is."""
        self._looked_at = float("-inf")
        self._time_due = False
        self._record = store.load_device()
        self.teller = Teller(transport, outbox, now, self._seconds, self.reported)
        self.installer = Installer(
            config,
            store,
            transport,
            trust,
            models,
            probe,
            self.teller.keep,
            is_stopping=self._is_stopping,
            alarm=self.teller.alarm,
        )

    def stop(self) -> None:
        """End after the effect in hand."""
        self._stop.set()

    def start(self) -> None:
        """Serve what is active, then take up what was interrupted, then connect."""
        for name in self.store.models():
            state = self.store.load_state(name)
            self.states[name] = state
            if state.active is not None:
                self._serve(state)
        for name in list(self.states):
            try:
                self.feed(name, Event(Kind.STARTED))
            except StoreError as error:
                _log.error("%s: what was interrupted waits for the disk: %s", name, error)
                self._unstarted.add(name)
                self._put_off(self._pauses.setdefault(name, _Pause()))
        self.transport.start()

    def run(self) -> None:
        """Run until `stop`."""
        self.start()
        while not self._stop.is_set():
            try:
                self.tick(TICK_S)
            except Exception:  # noqa: BLE001 - the outermost loop: the device serves on and says what happened
                _log.exception("unexpected; the agent goes on in %.0f s", FAULT_PAUSE_S)
                self._stop.wait(FAULT_PAUSE_S)
        self.transport.close()

    def tick(self, wait_s: float = 0.0) -> None:
        """Take the messages that are there (waiting at most `wait_s` for one), then do one piece of work."""
        try:
            message = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                self._take(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass
        self._progress()
        if self._time_due:
            self._ask_time()
        if self._unread is not None and self._monotonic() >= self._unread_pause.until:
            self._read_desired(self._unread)
        self._do_one()
        self._look()
        self.teller.tell_service(self.models.service)
        self.teller.send()

    def _is_stopping(self) -> bool:
        """Asked by long work between its pieces, which is progress."""
        self._progress()
        return self._stop.is_set()

    @property
    def is_busy(self) -> bool:
        """Whether some work waits, put off or not."""
        return bool(self._work or self._unstarted) or self._unread is not None

    def _take(self, message: Wanted | Acknowledged | Online) -> None:
        if isinstance(message, Acknowledged):
            self.teller.acknowledge(message.ack)
        elif isinstance(message, Wanted):
            self._unread_pause = _Pause()
            self._read_desired(message.envelope)
        else:
            self.teller.is_due(events=True)
            self._time_due = True
            for pause in (*self._pauses.values(), self._unread_pause):
                pause.until = min(pause.until, self._monotonic() + random.uniform(0, 1))

    def _read_desired(self, envelope: bytes) -> None:
        try:
            desired = self.trust.open_desired(envelope, self.config.device)
            self._accept(desired, hashlib.sha256(envelope).hexdigest())
        except ForgedError as error:
            # the document may be right and the metadata before it forged: only another answer can tell
            self._unread = envelope
            self._put_off(self._unread_pause)
            self.unread_because = str(error)
            self.teller.alarm("", str(error))
            return
        except (TransportError, StoreError) as error:
            self._unread = envelope
            self.unread_because = str(error)
            self._put_off(self._unread_pause)
            _log.warning("a desired document cannot be checked or kept yet: %s", error)
            return
        except EdgeoptError as error:
            self.teller.alarm("", f"a desired document is refused: {error}")
        self._unread = None
        self.unread_because = ""

    def _accept(self, desired: Desired, digest: str) -> None:
        record = self._since(self._record, self.trust.director_keys)
        if desired.revision < record.revision:
            _log.warning("desired revision %d is older than %d; ignored", desired.revision, record.revision)
            return
        content = hashlib.sha256(repr(desired.models).encode()).hexdigest()
        if desired.revision == record.revision and content != record.desired_sha256:
            _log.error(
                "desired revision %d came twice with other content; ignored (%s)",
                desired.revision,
                digest[:12],
            )
            return
        newest = max(
            desired.issued_at,
            parse_moment(record.newest_moment) if record.newest_moment else desired.issued_at,
        )
        fresh = replace(
            record, revision=desired.revision, desired_sha256=content, newest_moment=format_moment(newest)
        )
        self._save_record(fresh)
        wanted = {model.name: model for model in desired.models}
        for name in {*wanted, *self.states}:
            self.states.setdefault(name, State(name))
            if name in wanted or self.states[name].desired is not None:
                self.feed(name, Event(Kind.DESIRED, desired=wanted.get(name)))
        self.teller.is_due()

    def _since(self, record: DeviceRecord, director: frozenset[str]) -> DeviceRecord:
        """The record as far as this director goes: another one's revisions start again.

        A thief who signed a revision far ahead would otherwise be obeyed for ever (fast-forward).
        """
        same = not record.director or bool(set(record.director) & director)
        fresh = record if same else replace(record, revision=0, desired_sha256="")
        return replace(fresh, director=tuple(sorted(director)))

    def _save_record(self, record: DeviceRecord) -> None:
        if record != self._record:
            self.store.save_device(record)
            self._record = record

    def _ask_time(self) -> None:
        """Once a connection: learn the time from the director, and keep it as the floor of later starts."""
        self._time_due = False
        try:
            moment = self.trust.ask_time()
            if moment is not None:
                before = self._record.newest_moment
                newest = max(moment, parse_moment(before) if before else moment)
                self._save_record(replace(self._record, newest_moment=format_moment(newest)))
        except (TransportError, StoreError) as error:
            _log.warning("the time is not known yet: %s", error)
        except EdgeoptError as error:
            self.teller.alarm("", str(error))

    def feed(self, name: str, event: Event) -> None:
        """Take one step of a model's machine and run its effects in their order."""
        state, effects = machine.step(self.states[name], event)
        if event.kind is Kind.AWAY:
            self._put_off(self._pauses.setdefault(name, _Pause()))
        elif effects:
            self._pauses.pop(name, None)
        if state.phase not in machine.WORK:
            self._work.pop(name, None)
        for effect in effects:
            if effect is Effect.SAVE:
                self.store.save_state(state)
            elif effect is Effect.REPORT:
                self.teller.note_phase(state)
            elif effect is Effect.CLEAN:
                self.store.clean({**self.states, name: state})
            elif effect is Effect.REMOVE:
                self.models.deactivate(name)
                self.store.remove(name)
            else:
                self._work[name] = effect
        self.states[name] = state
        if Effect.REMOVE in effects:
            del self.states[name]

    def _do_one(self) -> None:
        for name in sorted(self._unstarted):
            if not self._is_paused(name):
                self._start_again(name)
        for name, effect in list(self._work.items()):
            if self._is_paused(name):
                continue
            _log.info("%s: %s", name, effect.value)
            event = self.installer.work(effect, self.states[name])
            if event.kind is not Kind.AWAY:
                self._work.pop(name, None)
            try:
                self.feed(name, event)
            except (
                StoreError
            ) as error:  # the state is not saved: the effect runs again when the disk allows it
                _log.error("%s: %s", name, error)
                self._work[name] = effect
                self._put_off(self._pauses.setdefault(name, _Pause()))
            return

    def _is_paused(self, name: str) -> bool:
        pause = self._pauses.get(name)
        return pause is not None and self._monotonic() < pause.until

    def _start_again(self, name: str) -> None:
        try:
            if name in self.states:
                self.feed(name, Event(Kind.STARTED))
            self._unstarted.discard(name)
        except StoreError as error:
            _log.error("%s: what was interrupted waits for the disk: %s", name, error)
            self._put_off(self._pauses.setdefault(name, _Pause()))

    def _serve(self, state: State) -> None:
        assert state.active is not None, "called for what is active"
        try:
            self.models.activate(state.model, state.active)
        except EdgeoptError as error:
            _log.error("%s: the active package cannot be served: %s", state.model, error)
            self.states[state.model] = replace(state, error=f"cannot be served: {error}")

    def _look(self) -> None:
        """Now and then, with nothing else to do: does what was measured still count?"""
        if self.is_busy or self._monotonic() - self._looked_at < CHECK_S:
            return
        self._looked_at = self._monotonic()
        for name, state in list(self.states.items()):
            try:
                event = self.installer.look(state)
                if event is not None:
                    self.feed(name, event)
            except EdgeoptError as error:
                _log.warning("%s is not measured again yet: %s", name, error)

    def reported(self) -> Reported:
        """What this device says of itself now."""
        return Reported(
            device=self.config.device,
            device_class=self.config.device_class,
            session=self._session,
            desired_revision=self._record.revision,
            agent_version=__version__,
            models=tuple(reported_model(self.states[name]) for name in sorted(self.states)),
            disk_free_bytes=self.store.free_bytes(),
            stand_in=self.config.stand_in,
        )

    def _seconds(self) -> float:
        return self._monotonic()

    def _put_off(self, pause: _Pause) -> None:
        pause.until = self._monotonic() + random.uniform(0, pause.seconds)
        pause.seconds = min(MAX_PAUSE_S, 2 * pause.seconds)
