# SPDX-License-Identifier: Apache-2.0
"""The control plane's deeds, each one transaction: enrol, create a rollout, take a device's word, step rollouts.

Nothing here knows MQTT or HTTP. What must be sent afterwards (`desired` documents, acknowledgements) is returned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from edgeopt.fleet import rules
from edgeopt.fleet.catalog import Catalog, Entry
from edgeopt.fleet.certificates import is_shut_out
from edgeopt.fleet.database import Device, EventRow, MeasurementRow, Member, OutboxRow, Rollout
from edgeopt_wire import topics
from edgeopt_wire.document import from_json, to_bytes, to_json
from edgeopt_wire.errors import DocumentError, RecipeError
from edgeopt_wire.index import PackageIndex, deltas_of
from edgeopt_wire.measurement import Measurement
from edgeopt_wire.messages import (
    DESIRED_TYPE,
    TIME_TYPE,
    Ack,
    Desired,
    DesiredModel,
    EventBatch,
    Presence,
    Reported,
    SignedTime,
)

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

_log = logging.getLogger(__name__)

DESIRED_LIFETIME = timedelta(days=7)
RENEW_BEFORE = timedelta(days=2)


class Control:
    """Devices, rollouts and the ledger. `clock` gives aware UTC moments with whole seconds."""

    def __init__(
        self,
        sessions: sessionmaker[Session],
        catalog: Catalog,
        director: Signer,
        clock: Callable[[], datetime],
    ) -> None:
        self._sessions = sessions
        self.catalog = catalog
        self._director = director
        self._clock = clock

    def enrol(self, device_id: str, device_class: str, *, stand_in: bool) -> None:
        """Let a device in.

        Raises:
            RecipeError: The id may not stand in a topic, or is enrolled with another class.
        """
        try:
            topics.check_part(device_id, "device")
        except DocumentError as error:
            raise RecipeError(str(error)) from error
        with self._sessions.begin() as session:
            known = session.get(Device, device_id)
            if known is not None and known.device_class != device_class:
                raise RecipeError(
                    f"{device_id} is enrolled as {known.device_class}; give the new device another id"
                )
            if known is None:
                now = self._clock()
                device = Device(id=device_id, device_class=device_class, stand_in=stand_in, enrolled_at=now)
                session.add(device)

    def create_rollout(
        self,
        *,
        model: str,
        version: str,
        classes: Sequence[str],
        devices: Sequence[str],
        waves: Sequence[int],
        deadline_s: int,
        max_failures: int,
    ) -> int:
        """Offer a published version to the chosen devices (all that it fits, if none are named); return its number.

        What older rollouts of the model have not finished on these devices is superseded.

        Raises:
            RecipeError: Not published, no device that it fits, an unknown device, or odd waves.
        """
        entries = self.catalog.find(model, version)
        with self._sessions.begin() as session:
            chosen = self._choose(session, entries, classes, devices)
            order = rules.assign_waves([(device.id, device.device_class) for device, _ in chosen], waves)
            rollout = Rollout(
                model=model,
                version=version,
                status="running",
                created_at=self._clock(),
                deadline_s=deadline_s,
                max_failures=max_failures,
                waves=list(waves),
            )
            self._supersede(session, model, [device.id for device, _ in chosen])
            session.add(rollout)
            session.flush()
            for position, (device, entry) in enumerate(sorted(chosen, key=lambda pair: order[pair[0].id])):
                session.add(
                    Member(
                        rollout_id=rollout.id,
                        device_id=device.id,
                        position=position,
                        wave=order[device.id],
                        target=entry.target,
                    )
                )
            return rollout.id

    def abort(self, rollout_id: int) -> None:
        """End a rollout: devices that have not finished go back to what they ran.

        Raises:
            RecipeError: There is no such rollout, or it has ended.
        """
        with self._sessions.begin() as session:
            rollout = session.get(Rollout, rollout_id)
            if rollout is None or rollout.status in rules.ENDED:
                raise RecipeError(f"there is no running rollout {rollout_id}")
            rollout.status, rollout.finished_at = "aborted", self._clock()
            for member in rollout.members:
                if member.status not in rules.FINAL:
                    member.status, member.finished_at = "removed", self._clock()

    def step(self) -> list[str]:
        """Move every running rollout on; return the devices whose desired document changed.

        A halted rollout offers nothing more, and the devices that it offered something still have their deadline.
        """
        with self._sessions.begin() as session:
            for rollout in session.scalars(select(Rollout).where(Rollout.status == "running")):
                self._step(rollout)
            session.flush()
            self._time_out_halted(session)
            session.flush()
            devices = list(session.scalars(select(Device)))
            return [device.id for device in devices if self._redesire(session, device)]

    def envelope(self, device_id: str) -> bytes | None:
        """The signed `desired` document of a device (a DSSE envelope), or None if it was never offered anything."""
        from securesystemslib.dsse import Envelope

        with self._sessions() as session:
            device = _member(session, device_id)
            if device is None or not device.revision or device.desired_expires_at is None:
                return None
            desired = Desired(
                device=device.id,
                revision=device.revision,
                issued_at=device.desired_expires_at - DESIRED_LIFETIME,
                expires_at=device.desired_expires_at,
                models=tuple(from_json(DesiredModel, entry) for entry in device.desired["models"]),
            )
        envelope = Envelope(to_bytes(desired), DESIRED_TYPE, {})
        envelope.sign(self._director)
        return json.dumps(envelope.to_dict(), sort_keys=True, separators=(",", ":")).encode()

    def signed_time(self, nonce: str) -> bytes:
        """What time it is, signed for a device's question (a DSSE envelope).

        Raises:
            DocumentError: That is no nonce.
        """
        from securesystemslib.dsse import Envelope

        try:
            answer = SignedTime(nonce, self._clock())
        except ValueError as error:
            raise DocumentError(str(error)) from error
        envelope = Envelope(to_bytes(answer), TIME_TYPE, {})
        envelope.sign(self._director)
        return json.dumps(envelope.to_dict(), sort_keys=True, separators=(",", ":")).encode()

    def device_ids(self) -> list[str]:
        """Every enrolled device."""
        with self._sessions() as session:
            return list(session.scalars(select(Device.id)))

    def take_presence(self, presence: Presence) -> None:
        """Note that a device came or went. A will of an older session changes nothing."""
        with self._sessions.begin() as session:
            device = _member(session, presence.device)
            if device is None or (not presence.online and device.session not in ("", presence.session)):
                return
            device.online, device.last_seen = presence.online, self._clock()
            device.session = presence.session

    def take_report(self, report: Reported) -> bool:
        """Take a device's word on its state; return whether it has not seen its newest desired document."""
        with self._sessions.begin() as session:
            device = _member(session, report.device)
            if device is None:
                _log.warning("%s reports and is not enrolled, or is shut out", report.device)
                return False
            device.reported, device.last_seen = to_json(report), self._clock()
            for member in session.scalars(select(Member).where(Member.device_id == device.id)):
                rollout = member.rollout
                if member.status in rules.FINAL or member.offered_at is None:
                    continue
                status, error = rules.status_of(
                    report, model=rollout.model, version=rollout.version, rollout=str(rollout.id)
                )
                if status:
                    member.status, member.error = status, error
                    if status in rules.FINAL:
                        member.finished_at = self._clock()
            return report.desired_revision < device.revision

    def take_events(self, batch: EventBatch) -> Ack | None:
        """Store a batch once, measurements into the ledger; return the acknowledgement to send after the commit.

        The acknowledgement ends before the first gap: for older agents it speaks of everything up to its number, and what
        is missing may be on its way.
        """
        if not batch.events:
            return None
        with self._sessions.begin() as session:
            device = _member(session, batch.device)
            if device is None:
                _log.warning("%s sends events and is not enrolled, or is shut out", batch.device)
                return None
            _count_dropped(session, device, batch)
            known = set(
                session.scalars(
                    select(EventRow.sequence).where(
                        EventRow.device_id == device.id,
                        EventRow.outbox == batch.outbox,
                        EventRow.sequence.in_([event.sequence for event in batch.events]),
                    )
                )
            )
            for event in batch.events:
                if event.sequence not in known:
                    known.add(event.sequence)
                    self._store(session, device, batch.outbox, event)
        return Ack(batch.outbox, _last_in_a_row([event.sequence for event in batch.events]))

    def allowed_index(self, device_id: str, sha256: str) -> PackageIndex | None:
        """The index of a package that the device is told to run, or of a delta to it; None: it gets no other bytes."""
        with self._sessions() as session:
            device = _member(session, device_id)
            targets = [entry["target"] for entry in device.desired.get("models", ())] if device else []
        for entry in self.catalog.entries():
            if entry.target in targets:
                offered = {blob.sha256: blob for blob in (entry.index, *deltas_of(entry.index).values())}
                if sha256 in offered:
                    return offered[sha256]
        return None

    def sharers(self, sha256: str) -> int:
        """How many devices that are here now are told to run what these bytes are of, and have not finished."""
        targets = [
            entry.target
            for entry in self.catalog.entries()
            if sha256 in {blob.sha256 for blob in (entry.index, *deltas_of(entry.index).values())}
        ]
        asked = (
            select(func.count(func.distinct(Member.device_id)))
            .join(Device, Device.id == Member.device_id)
            .where(
                Member.target.in_(targets),
                Member.offered_at.is_not(None),
                Member.status.not_in(rules.FINAL),
                Device.online,
            )
        )
        with self._sessions() as session:
            return session.scalar(asked) or 0

    def _choose(
        self, session: Session, entries: Iterable[Entry], classes: Sequence[str], names: Sequence[str]
    ) -> list[tuple[Device, Entry]]:
        enrolled = list(session.scalars(select(Device)))
        unknown = sorted(set(names) - {device.id for device in enrolled})
        if unknown:
            known = ", ".join(sorted(device.id for device in enrolled)) or "none"
            raise RecipeError(f"{unknown[0]} is not enrolled; enrolled are: {known}")
        wanted = [
            device
            for device in enrolled
            if (not names or device.id in names) and (not classes or device.device_class in classes)
        ]
        found = []
        for device in wanted:
            fitting = [entry for entry in entries if entry.fits(device.device_class)]
            exact = [entry for entry in fitting if entry.index.device == device.device_class]
            if fitting:
                found.append((device, (exact or fitting)[0]))
            elif names:
                kinds = ", ".join(sorted(entry.index.device for entry in entries))
                raise RecipeError(
                    f"{device.id} is a {device.device_class}, and this version is published for {kinds}; "
                    "build and publish it for that class"
                )
        if not found:
            there = ", ".join(sorted({device.device_class for device in enrolled})) or "none"
            raise RecipeError(f"no enrolled device fits; their classes are: {there}")
        return found

    def _supersede(self, session: Session, model: str, devices: Sequence[str]) -> None:
        older = (
            select(Member)
            .join(Member.rollout)
            .where(Rollout.model == model, Member.device_id.in_(devices), Member.status.not_in(rules.FINAL))
        )
        for member in session.scalars(older):
            member.status, member.finished_at = rules.SUPERSEDED, self._clock()

    def _step(self, rollout: Rollout) -> None:
        now = self._clock()
        parts = [rules.Part(m.device_id, m.wave, m.status, m.offered_at) for m in rollout.members]
        step = rules.next_step(
            parts, now=now, deadline=timedelta(seconds=rollout.deadline_s), max_failures=rollout.max_failures
        )
        for member in rollout.members:
            if member.device_id in step.timed_out:
                _time_out(member, now)
            if member.device_id in step.offer:
                member.status, member.offered_at = "offered", now
        if step.status != "running":
            rollout.status, rollout.reason, rollout.finished_at = step.status, step.reason, now
            for member in rollout.members:
                if member.status == "pending":
                    member.status = "removed"

    def _time_out_halted(self, session: Session) -> None:
        now = self._clock()
        working = (
            select(Member)
            .join(Member.rollout)
            .where(Rollout.status == "halted", Member.status.not_in(rules.FINAL))
        )
        for member in session.scalars(working):
            deadline = timedelta(seconds=member.rollout.deadline_s)
            if member.offered_at is not None and now - member.offered_at > deadline:
                _time_out(member, now)

    def _redesire(self, session: Session, device: Device) -> bool:
        """Recompute what a device should run; a new revision only where that changed or ends soon."""
        now = self._clock()
        models: dict[str, dict[str, Any]] = {}
        for member in session.scalars(
            select(Member).where(Member.device_id == device.id).order_by(Member.rollout_id)
        ):
            if member.offered_at is not None and member.status not in (*rules.FAILURES, "removed"):
                rollout = member.rollout
                wanted = DesiredModel(rollout.model, rollout.version, member.target, str(rollout.id))
                models[rollout.model] = to_json(wanted)
        content = {"models": [models[name] for name in sorted(models)]}
        fresh = device.desired_expires_at is not None and device.desired_expires_at - now > RENEW_BEFORE
        if (content == device.desired and fresh) or (not models and not device.revision):
            return False
        device.desired, device.revision = content, device.revision + 1
        device.desired_expires_at = now + DESIRED_LIFETIME
        return True

    def _store(self, session: Session, device: Device, outbox: str, event: Any) -> None:
        row = EventRow(
            device_id=device.id,
            outbox=outbox,
            sequence=event.sequence,
            kind=event.kind,
            at=event.at,
            received_at=self._clock(),
            body=dict(event.body),
        )
        session.add(row)
        if event.kind != "measurement":
            return
        try:
            found = from_json(Measurement, event.body)
        except DocumentError as error:
            _log.warning("%s sent a measurement that is none: %s", device.id, error)
            return
        session.flush()
        timing = found.timing
        session.add(
            MeasurementRow(
                event_id=row.id,
                device_id=device.id,
                device_class=device.device_class,
                stand_in_for=found.conditions.stand_in_for,
                model=found.model,
                version=found.version,
                variant=found.variant,
                package_sha256=found.package_sha256,
                measured_at=found.measured_at,
                p50_ns=timing.p50_ns if timing else None,
                p90_ns=timing.p90_ns if timing else None,
                golden_ok=found.golden_ok,
                error=found.error,
                document=to_json(found),
            )
        )


def _member(session: Session, device_id: str) -> Device | None:
    """A device whose word counts: enrolled, and its newest certificate, if it has one, not revoked."""
    device = session.get(Device, device_id)
    return None if device is None or is_shut_out(session, device_id) else device


def _time_out(member: Member, now: datetime) -> None:
    member.status, member.finished_at = "timed_out", now
    member.error = f"nothing finished within {member.rollout.deadline_s} s of the offer"


def _count_dropped(session: Session, device: Device, batch: EventBatch) -> None:
    """Add up what the device's outboxes say; what one of them says only grows, and an older word changes nothing."""
    if not batch.dropped:
        return
    rows = {
        row.outbox: row for row in session.scalars(select(OutboxRow).where(OutboxRow.device_id == device.id))
    }
    if not rows and device.dropped_events > batch.dropped:  # counted before outboxes were told apart
        rows[""] = OutboxRow(device_id=device.id, outbox="", dropped=device.dropped_events)
        session.add(rows[""])
    if batch.outbox not in rows:
        rows[batch.outbox] = OutboxRow(device_id=device.id, outbox=batch.outbox, dropped=0)
        session.add(rows[batch.outbox])
    rows[batch.outbox].dropped = max(rows[batch.outbox].dropped, batch.dropped)
    device.dropped_events = sum(row.dropped for row in rows.values())


def _last_in_a_row(sequences: Sequence[int]) -> int:
    """The last number of the unbroken run that begins with the smallest."""
    there, last = set(sequences), min(sequences)
    while last + 1 in there:
        last += 1
    return last
