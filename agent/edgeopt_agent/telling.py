# SPDX-License-Identifier: Apache-2.0
"""What a device says of itself: its state whenever that changes, and events until somebody acknowledges them.

Rules:
- Telling is never waited for, and a disk that keeps no event stops nothing else.
- Events go lane by lane (`urgency`): while a lane's batch waits for its acknowledgement, what is less urgent waits too, and
  what is more urgent goes at once.
- Who is back after a time away sends a summary of it before the rest; all but what is urgent keeps to the transport's rate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from edgeopt_agent import machine
from edgeopt_agent.machine import State
from edgeopt_agent.outbox import BATCH_BYTES, Outbox
from edgeopt_agent.service import Service
from edgeopt_agent.spending import Spending
from edgeopt_agent.summaries import summarize
from edgeopt_agent.transports import Transport
from edgeopt_agent.urgency import Lane
from edgeopt_wire.document import to_bytes, to_json
from edgeopt_wire.errors import StoreError
from edgeopt_wire.measurement import Measurement
from edgeopt_wire.messages import Ack, EventBatch, Phase, Reported, ReportedModel

_log = logging.getLogger(__name__)

ALARM_AGAIN_S = 3600.0
RESEND_EVENTS_S, RESEND_AT_MOST_S = 20.0, 300.0
"""Events that were sent and not acknowledged are sent again after this long; all but urgent ones twice as long each time,
until the latter."""


class Teller:
    """Queues and sends. `reported` gives the device's state now."""

    def __init__(
        self,
        transport: Transport,
        outbox: Outbox,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
        reported: Callable[[], Reported],
        *,
        spending: Spending | None = None,
    ) -> None:
        self._spending = spending
        self._transport = transport
        self._outbox = outbox
        self._now = now
        self._monotonic = monotonic
        self._reported = reported
        self._again_at: dict[Lane, float] = {}
        self._pauses: dict[Lane, float] = {}
        self._quiet_until = float("-inf")  # for the rate's sake
        self._is_back = True
        self._report_due = True
        self._alarms: dict[str, tuple[str, float]] = {}

    def is_due(self, *, events: bool = False) -> None:
        """The state changed; with `events`, somebody listens again."""
        self._report_due = True
        if events:
            self._again_at.clear()
            self._pauses.clear()
            self._is_back = True

    def acknowledge(self, ack: Ack) -> None:
        """The control plane has stored events; the next of their lane go at once."""
        lane = self._outbox.acknowledge(ack.outbox, ack.sequence)
        if lane is not None:
            soon = self._monotonic() + RESEND_EVENTS_S  # somebody listens
            self._again_at = {
                other: min(at, soon) for other, at in self._again_at.items() if other is not lane
            }
            self._pauses.clear()

    def keep(self, model: str, measurement: Measurement) -> None:
        """Queue a measurement, and send it if that is possible."""
        try:
            self._outbox.add("measurement", self._now(), to_json(measurement))
        except StoreError as error:  # a measurement is not worth an installation
            _log.error("a measurement of %s is not kept: %s", model, error)
        self.send()

    def tell(self, kind: str, body: Mapping[str, Any]) -> None:
        """Queue an event, and the state with it."""
        self._report_due = True
        self.note(kind, body)

    def alarm(self, model: str, error: str) -> None:
        """Say that somebody lied: once while the lie stays the same, and again after an hour."""
        _log.error("%s%s", f"{model}: " if model else "", error)
        told = self._alarms.get(model)
        if told is not None and told[0] == error and self._monotonic() - told[1] < ALARM_AGAIN_S:
            return
        self._alarms[model] = (error, self._monotonic())
        try:
            self._outbox.add("trust", self._now(), {"model": model, "error": error})
        except StoreError as refused:
            _log.error("an alarm is not kept: %s", refused)

    def note(self, kind: str, body: Mapping[str, Any]) -> None:
        """Queue an event of another kind."""
        try:
            self._outbox.add(kind, self._now(), body)
        except StoreError as error:
            _log.error("an event of kind %s is not kept: %s", kind, error)

    def tell_service(self, service: Service | None) -> None:
        """Queue what was served; acknowledged events mean that somebody listens."""
        for body in service.flush(lambda: len(self._outbox) == 0) if service is not None else ():
            try:
                self._outbox.add("service", self._now(), body)
            except StoreError as error:
                _log.error("what %s served is not kept: %s", body["model"], error)
        for body in service.drift.take() if service is not None and service.drift is not None else ():
            self._report_due = True
            try:
                self._outbox.add("drift", self._now(), body)
            except StoreError as error:
                _log.error("what %s sees is not kept: %s", body["model"], error)

    def note_phase(self, state: State) -> None:
        """The state is due, and an event where a phase ends something."""
        self._report_due = True
        if state.phase in (Phase.COMMITTED, Phase.FAILED, Phase.ROLLED_BACK):
            version = (state.active if state.phase is Phase.COMMITTED else state.candidate) or state.active
            body = {
                "model": state.model,
                "phase": state.phase.value,
                "version": version.version if version else "",
                "error": state.error,
            }
            try:
                self._outbox.add("phase", self._now(), body)
            except StoreError as error:
                _log.error("an event of %s is not kept: %s", state.model, error)

    def send(self) -> None:
        """Send what is due."""
        if self._report_due:
            self._report_due = False
            reported = self._reported()
            self._transport.report(reported)
            if self._is_online:
                self._count(reported)
        if not self._is_online:
            return
        if self._is_back:
            self._is_back = False
            if summarize(self._outbox, self._now()):
                _log.info("what was served while nobody listened goes as a summary first")
        self._send_events()

    @property
    def _is_online(self) -> bool:
        return bool(getattr(self._transport, "is_online", True))

    def _count(self, document: Reported | EventBatch) -> None:
        if self._spending is not None:
            self._spending.count(len(to_bytes(document)))

    def _is_held(self, now: float) -> bool:
        """Whether what is bulky waits: for the rate's sake, or a budget's or window's."""
        return now < self._quiet_until or (
            self._spending is not None and bool(self._spending.refusal(BATCH_BYTES))
        )

    def _send_events(self) -> None:
        now = self._monotonic()
        for lane in Lane:
            if now < self._again_at.get(lane, now):
                return
            if lane is not Lane.URGENT and self._is_held(now):
                return
            batch = self._outbox.batch(lane)
            if batch is None:
                continue
            if self._transport.send(batch):
                self._sent(lane, batch, now)
            return

    def _sent(self, lane: Lane, batch: EventBatch, now: float) -> None:
        self._count(batch)
        pause = self._pauses.get(lane, RESEND_EVENTS_S)
        self._again_at[lane] = now + pause
        if lane is not Lane.URGENT:
            self._pauses[lane] = min(2 * pause, RESEND_AT_MOST_S)
        rate = int(getattr(self._transport, "tell_bytes_s", 0))
        if rate and lane is not Lane.URGENT:
            self._quiet_until = now + len(to_bytes(batch)) / rate


def reported_model(state: State) -> ReportedModel:
    """What is said of one model."""
    active = state.active
    failed = state.phase in (Phase.FAILED, Phase.ROLLED_BACK)
    wanted = state.desired.version if state.desired else ""
    candidate = wanted if state.phase in machine.WORK or failed else ""
    return ReportedModel(
        name=state.model,
        phase=state.phase,
        version=active.version if active else "",
        package_sha256=active.package_sha256 if active else "",
        variant=active.variant if active else "",
        candidate_version=candidate,
        rollout=state.desired.rollout if state.desired else "",
        error=state.error,
    )
