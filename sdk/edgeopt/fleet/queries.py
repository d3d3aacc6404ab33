# SPDX-License-Identifier: Apache-2.0
"""What people and scripts ask the control plane, as JSON-like documents; the API and the page show just these."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from edgeopt.fleet import certificates
from edgeopt.fleet.catalog import Catalog
from edgeopt.fleet.database import CertificateRow, Device, MeasurementRow, Rollout
from edgeopt_wire.document import format_moment


class Queries:
    """Read-only answers."""

    def __init__(self, sessions: sessionmaker[Session], catalog: Catalog) -> None:
        self._sessions = sessions
        self._catalog = catalog

    def devices(self) -> dict[str, Any]:
        """Every enrolled device with what it last reported."""
        with self._sessions() as session:
            newest = certificates.newest_by_device(session)
            found = session.scalars(select(Device).order_by(Device.id))
            rows = [_device(device, newest.get(device.id)) for device in found]
        return {"schema": "edgeopt.fleet-devices/1", "devices": rows}

    def packages(self) -> dict[str, Any]:
        """Every published package."""
        rows = [
            {
                "name": entry.index.name,
                "version": entry.index.version,
                "device": entry.index.device,
                "size_bytes": entry.index.size_bytes,
                "sha256": entry.index.sha256,
                "target": entry.target,
            }
            for entry in self._catalog.entries()
        ]
        return {"schema": "edgeopt.fleet-packages/1", "packages": rows}

    def rollouts(self) -> dict[str, Any]:
        """Every rollout, the newest first."""
        with self._sessions() as session:
            rows = [
                _rollout(rollout) for rollout in session.scalars(select(Rollout).order_by(Rollout.id.desc()))
            ]
        return {"schema": "edgeopt.rollouts/1", "rollouts": rows}

    def rollout(self, rollout_id: int) -> dict[str, Any] | None:
        """One rollout, or None."""
        with self._sessions() as session:
            found = session.get(Rollout, rollout_id)
            return None if found is None else {"schema": "edgeopt.rollout/1", **_rollout(found)}

    def measurements(self, *, device: str = "", model: str = "", limit: int = 500) -> dict[str, Any]:
        """The ledger's newest rows, whole, the newest first."""
        query = select(MeasurementRow).order_by(MeasurementRow.id.desc()).limit(limit)
        if device:
            query = query.where(MeasurementRow.device_id == device)
        if model:
            query = query.where(MeasurementRow.model == model)
        with self._sessions() as session:
            rows = [{"id": row.id, "measurement": row.document} for row in session.scalars(query)]
        return {"schema": "edgeopt.measurements/1", "measurements": rows}


def _device(device: Device, certificate: CertificateRow | None) -> dict[str, Any]:
    return {
        "id": device.id,
        "device_class": device.device_class,
        "stand_in": device.stand_in,
        "online": device.online,
        "last_seen": _moment(device.last_seen),
        "revision": device.revision,
        "seen_revision": device.reported.get("desired_revision", 0),
        "agent_version": device.reported.get("agent_version", ""),
        "models": device.reported.get("models", []),
        "degraded": _fact(device, "degraded"),
        "drift": _fact(device, "drift"),
        "disk_free_bytes": device.reported.get("disk_free_bytes"),
        "dropped_events": device.dropped_events,
        "certificate": None if certificate is None else certificates.certificate_document(certificate),
        "shut_out": certificate is not None and certificate.revoked_at is not None,
    }


def _fact(device: Device, name: str) -> dict[str, Any]:
    """A mapping by model of what a device reports; none from agents that know nothing of it."""
    facts = device.reported.get("facts", {})
    found = facts.get(name) if isinstance(facts, dict) else None
    return found if isinstance(found, dict) else {}


def _rollout(rollout: Rollout) -> dict[str, Any]:
    return {
        "id": rollout.id,
        "model": rollout.model,
        "version": rollout.version,
        "status": rollout.status,
        "reason": rollout.reason,
        "created_at": _moment(rollout.created_at),
        "finished_at": _moment(rollout.finished_at),
        "deadline_s": rollout.deadline_s,
        "max_failures": rollout.max_failures,
        "waves": rollout.waves,
        "devices": [
            {
                "id": member.device_id,
                "wave": member.wave,
                "status": member.status,
                "target": member.target,
                "offered_at": _moment(member.offered_at),
                "finished_at": _moment(member.finished_at),
                "error": member.error,
            }
            for member in rollout.members
        ],
    }


def _moment(moment: datetime | None) -> str | None:
    return None if moment is None else format_moment(moment)
