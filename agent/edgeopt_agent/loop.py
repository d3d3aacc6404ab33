# SPDX-License-Identifier: Apache-2.0
"""The agent's loop: what arrives (`wishes`), what is done (`worker`), what is told (`telling`). The only while.

Rules:
- The state is on the disk before an effect runs; reports and events are queued, never waited for.
- What is put off is tried again with full jitter; a message or a reconnect ends the pause.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.housekeeping import Housekeeper
from edgeopt_agent.installer import Installer
from edgeopt_agent.machine import Event, State
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.pauses import Pause
from edgeopt_agent.probe import ProbeRequest
from edgeopt_agent.serve.models import Models
from edgeopt_agent.spending import Spending
from edgeopt_agent.store import Store
from edgeopt_agent.telling import Teller, reported_model
from edgeopt_agent.transports import Acknowledged, Happened, Inbox, Message, Transport, Trouble, Wanted
from edgeopt_agent.trust import Trust
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_agent.wishes import Wishes
from edgeopt_agent.worker import Worker
from edgeopt_wire import __version__
from edgeopt_wire.measurement import Measurement
from edgeopt_wire.messages import Reported

_log = logging.getLogger(__name__)

TICK_S = 0.5
FAULT_PAUSE_S = 5.0
MEANWHILE_S = 0.2
"""So often long work is interrupted to tell what is due."""
MOST_ASIDE = 100
"""Messages that wait for the end of long work; of more the oldest are dropped, and come again."""


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
        spending: Spending | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.transport = transport
        self.trust = trust
        self.outbox = outbox
        self.models = models
        self._inbox = inbox
        self._session = session
        self._monotonic = monotonic
        self._progress = progress
        self._stop = threading.Event()
        self._aside: deque[Message] = deque(maxlen=MOST_ASIDE)
        self._told_at = float("-inf")
        self.spending = spending or Spending(None, TrustedClock(now))
        self.teller = Teller(transport, outbox, now, self.seconds, self.reported, spending=self.spending)
        keeper = Housekeeper(store, config.disk_quota)
        self.installer = Installer(
            config,
            store,
            keeper,
            transport,
            trust,
            models,
            probe,
            self.teller.keep,
            is_stopping=self._is_stopping,
            alarm=self.teller.alarm,
            spending=self.spending,
            states=lambda: self.worker.known,
        )
        self.worker = Worker(store, keeper, models, self.installer, self.teller, monotonic=self.seconds)
        self.facts: Callable[[], dict[str, Any]] = dict
        """What else is reported of this device."""
        self.wishes = Wishes(
            config.device, store, trust, self.teller, self.worker.want, monotonic=self.seconds
        )

    @property
    def states(self) -> dict[str, State]:
        """The state of each model that this device has or is to have."""
        return self.worker.states

    @property
    def unread_because(self) -> str:
        """Why the newest desired document cannot be followed yet, empty if it is."""
        return self.wishes.unread_because

    @property
    def is_busy(self) -> bool:
        """Whether some work waits, put off or not."""
        return self.worker.is_busy or self.wishes.is_waiting

    @property
    def _unread_pause(self) -> Pause:
        return self.wishes.pause

    def feed(self, name: str, event: Event) -> None:
        """Take one step of a model's machine and run its effects in their order."""
        self.worker.feed(name, event)

    def stop(self) -> None:
        """End after the effect in hand."""
        self._stop.set()

    def start(self) -> None:
        """Serve what is active, then take up what was interrupted, then connect."""
        self.models.is_starting = True
        self.worker.start()
        self.models.is_starting = False
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
        self.close()

    def close(self) -> None:
        """Say good-bye, and note what is known only here."""
        self.transport.close()
        self.spending.close()

    def tick(self, wait_s: float = 0.0) -> None:
        """Take the messages that are there (waiting at most `wait_s` for one), then do one piece of work."""
        while self._aside:
            self._take(self._aside.popleft())
        try:
            message = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                self._take(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass
        self._progress()
        while self.store.complaints:
            self.teller.alarm("", self.store.complaints.pop())
        if (news := self.spending.news()) is not None:
            self.teller.tell("transfer", news)
        self.wishes.again()
        self.worker.do_one()
        if not self.is_busy:
            self.worker.look()
        self.teller.tell_service(self.models.service)
        self.teller.send()

    def reported(self) -> Reported:
        """What this device says of itself now."""
        return Reported(
            device=self.config.device,
            device_class=self.config.device_class,
            session=self._session,
            desired_revision=self.wishes.revision,
            agent_version=__version__,
            models=tuple(reported_model(self.states[name]) for name in sorted(self.states)),
            disk_free_bytes=self.store.free_bytes(),
            stand_in=self.config.stand_in,
            facts=self.facts(),
        )

    def _take(self, message: Message) -> None:
        if isinstance(message, Acknowledged):
            self.teller.acknowledge(message.ack)
        elif isinstance(message, Wanted):
            self.wishes.came(message.envelope)
        elif isinstance(message, Trouble):
            self.teller.alarm("", message.error)
        elif isinstance(message, Happened):
            self.teller.note(message.kind, message.body)
        else:
            self.teller.is_due(events=True)
            self.wishes.online()
            self.worker.online()

    def _is_stopping(self) -> bool:
        """Asked by long work between its pieces, which is progress."""
        self._progress()
        self._meanwhile()
        return self._stop.is_set()

    def _meanwhile(self) -> None:
        """Tell, and hear what telling needs; whatever else arrives waits for the end of the long work."""
        if self._monotonic() - self._told_at < MEANWHILE_S:
            return
        self._told_at = self._monotonic()
        while not self._inbox.empty():
            message = self._inbox.get_nowait()
            if isinstance(message, Acknowledged):
                self.teller.acknowledge(message.ack)
            else:
                self._aside.append(message)
        self.teller.tell_service(self.models.service)
        self.teller.send()

    def seconds(self) -> float:
        """Seconds that only go forward."""
        return self._monotonic()
