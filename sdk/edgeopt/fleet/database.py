# SPDX-License-Identifier: Apache-2.0
"""What the control plane remembers, in SQL: SQLite by default, any engine that SQLAlchemy knows by its URL.

The ledger (`measurements`) keeps every measurement whole, with its conditions; a few columns stand beside it for
queries. A device's event is stored once, however often it is delivered: (device, outbox, sequence) is unique.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, ForeignKey, String, UniqueConstraint, create_engine, event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker
from sqlalchemy.types import DateTime, TypeDecorator


class Moment(TypeDecorator[datetime]):
    """An aware UTC moment; SQLite forgets time zones."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:  # noqa: ARG002
        """Store UTC without a zone."""
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:  # noqa: ARG002
        """Give UTC with a zone."""
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map = {dict[str, Any]: JSON, list[int]: JSON, datetime: Moment}  # noqa: RUF012 - SQLAlchemy's form


class Device(Base):
    """A device that may connect: what it is, what it last reported, what it should run."""

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    device_class: Mapped[str] = mapped_column(String(100))
    stand_in: Mapped[bool] = mapped_column(default=False)
    enrolled_at: Mapped[datetime]
    online: Mapped[bool] = mapped_column(default=False)
    session: Mapped[str] = mapped_column(String(64), default="")
    last_seen: Mapped[datetime | None]
    reported: Mapped[dict[str, Any]] = mapped_column(default=dict)
    dropped_events: Mapped[int] = mapped_column(default=0)
    revision: Mapped[int] = mapped_column(default=0)
    desired: Mapped[dict[str, Any]] = mapped_column(default=dict)
    desired_expires_at: Mapped[datetime | None]


class Rollout(Base):
    """One version of one model, offered to devices wave by wave."""

    __tablename__ = "rollouts"

    id: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(String(100))
    version: Mapped[str] = mapped_column(String(100))
    status: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str] = mapped_column(default="")
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    deadline_s: Mapped[int]
    max_failures: Mapped[int]
    waves: Mapped[list[int]]
    members: Mapped[list[Member]] = relationship(back_populates="rollout", order_by="Member.position")


class Member(Base):
    """One device's part in a rollout."""

    __tablename__ = "rollout_devices"

    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    position: Mapped[int]
    wave: Mapped[int]
    target: Mapped[str]
    status: Mapped[str] = mapped_column(String(20), default="pending")
    offered_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[str] = mapped_column(default="")
    rollout: Mapped[Rollout] = relationship(back_populates="members")


class EventRow(Base):
    """Something that a device said happened."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("device_id", "outbox", "sequence"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(String(64), index=True)
    outbox: Mapped[str] = mapped_column(String(64))
    sequence: Mapped[int]
    kind: Mapped[str] = mapped_column(String(40))
    at: Mapped[datetime]
    received_at: Mapped[datetime]
    body: Mapped[dict[str, Any]]


class OutboxRow(Base):
    """How many events one outbox of a device could not keep; a device whose disk was lost begins another."""

    __tablename__ = "outboxes"

    device_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    outbox: Mapped[str] = mapped_column(String(64), primary_key=True)
    dropped: Mapped[int] = mapped_column(default=0)


class MeasurementRow(Base):
    """One row of the ledger: a measurement of a device, whole in `document`."""

    __tablename__ = "measurements"

    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[int] = mapped_column(ForeignKey("events.id"), unique=True)
    device_id: Mapped[str] = mapped_column(String(64), index=True)
    device_class: Mapped[str] = mapped_column(String(100), index=True)
    stand_in_for: Mapped[str] = mapped_column(String(100))
    model: Mapped[str] = mapped_column(String(100), index=True)
    version: Mapped[str] = mapped_column(String(100))
    variant: Mapped[str] = mapped_column(String(100))
    package_sha256: Mapped[str] = mapped_column(String(64))
    measured_at: Mapped[datetime]
    p50_ns: Mapped[int | None]
    p90_ns: Mapped[int | None]
    golden_ok: Mapped[bool]
    error: Mapped[str]
    document: Mapped[dict[str, Any]]


class EnrolToken(Base):
    """One permission to enrol one device; the token itself is not kept, only its hash."""

    __tablename__ = "enrol_tokens"

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    device_id: Mapped[str] = mapped_column(String(64))  # empty: the device names itself, once
    device_class: Mapped[str] = mapped_column(String(100))
    stand_in: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    used_by: Mapped[str] = mapped_column(String(64), default="")
    key_sha256: Mapped[str] = mapped_column(String(64), default="")
    revoked_at: Mapped[datetime | None]


class CertificateRow(Base):
    """A certificate that was issued to a device; `serial` and digests in hexadecimal."""

    __tablename__ = "certificates"

    id: Mapped[int] = mapped_column(primary_key=True)
    serial: Mapped[str] = mapped_column(String(40), unique=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), index=True)
    key_sha256: Mapped[str] = mapped_column(String(64), index=True)
    issued_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    pem: Mapped[str]
    previous: Mapped[str] = mapped_column(
        String(40), default=""
    )  # the serial that it renews, empty: a token's
    confirmed_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    reason: Mapped[str] = mapped_column(String(40), default="")


def open_database(url: str) -> sessionmaker[Session]:
    """Open the database, make missing tables, and return what gives sessions."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _durable)
    Base.metadata.create_all(engine)
    return sessionmaker(engine, expire_on_commit=False)


def sqlite_url(folder: Path) -> str:
    """The URL of the embedded default: a file in the fleet's folder."""
    return f"sqlite:///{folder / 'fleet.sqlite'}"


def engine_of(sessions: sessionmaker[Session]) -> Engine:
    """The engine behind a session maker, to dispose of it."""
    engine = sessions.kw["bind"]
    assert isinstance(engine, Engine)
    return engine


def _durable(connection: Any, record: Any) -> None:  # noqa: ARG001 - SQLAlchemy's signature
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # an acknowledged measurement survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()
