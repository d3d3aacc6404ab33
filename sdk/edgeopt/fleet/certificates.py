# SPDX-License-Identifier: Apache-2.0
"""The record of every certificate that was issued, and what follows from it: who may renew, who is shut out.

Rules:
- A device is shut out while its newest certificate is revoked, whatever a broker thinks of the older ones.
- A certificate renews until its successor is confirmed. One that is used after that is a copied key: refused, said loudly.
- An expired certificate renews for `GRACE` longer, at the enrolment endpoint alone: brokers refuse it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from edgeopt.fleet.authority import Revoked, fingerprint_of, serial_of
from edgeopt.fleet.database import CertificateRow
from edgeopt_wire.document import format_moment
from edgeopt_wire.errors import TrustError

GRACE = timedelta(days=180)
MAX_SUCCESSORS = 10
"""As many renewals of one certificate may go astray before a person has to look."""
REASONS = ("keyCompromise", "cessationOfOperation", "superseded")


def newest_of(session: Session, device: str) -> CertificateRow | None:
    """A device's newest certificate."""
    query = select(CertificateRow).where(CertificateRow.device_id == device)
    return session.scalar(query.order_by(CertificateRow.id.desc()).limit(1))


def is_shut_out(session: Session, device: str) -> bool:
    """Whether nothing of this device counts: its newest certificate was revoked."""
    newest = newest_of(session, device)
    return newest is not None and newest.revoked_at is not None


def newest_by_device(session: Session) -> dict[str, CertificateRow]:
    """Each device's newest certificate."""
    newest = select(func.max(CertificateRow.id)).group_by(CertificateRow.device_id)
    rows = session.scalars(select(CertificateRow).where(CertificateRow.id.in_(newest)))
    return {row.device_id: row for row in rows}


def with_key(session: Session, key_sha256: str) -> list[CertificateRow]:
    """Every certificate for a key."""
    return list(session.scalars(select(CertificateRow).where(CertificateRow.key_sha256 == key_sha256)))


def find_row(session: Session, certificate: x509.Certificate) -> CertificateRow:
    """The record of a certificate that somebody shows.

    Raises:
        TrustError: It was not issued here, or it was revoked.
    """
    row = session.scalar(select(CertificateRow).where(CertificateRow.serial == serial_of(certificate)))
    if row is None or fingerprint_of(x509.load_pem_x509_certificate(row.pem.encode())) != fingerprint_of(
        certificate
    ):
        raise TrustError("that certificate was not issued by this fleet; enrol the device with a token")
    if row.revoked_at is not None or is_shut_out(session, row.device_id):
        at = f" at {format_moment(row.revoked_at)}" if row.revoked_at else ""
        raise TrustError(
            f"the certificate of {row.device_id} was revoked{at}; enrol it again with a new token"
        )
    return row


def check_renewable(session: Session, row: CertificateRow, now: datetime, grace: timedelta) -> None:
    """Whether a certificate may get a successor.

    Raises:
        TrustError: Its grace is over, its successor is in use, or too many were asked for.
    """
    if now > row.expires_at + grace:
        raise TrustError(
            f"the certificate of {row.device_id} ended at {format_moment(row.expires_at)}, more than {grace.days} days "
            "ago; enrol the device again with a new token"
        )
    successors = list(session.scalars(select(CertificateRow).where(CertificateRow.previous == row.serial)))
    if any(found.confirmed_at is not None for found in successors):
        raise TrustError(
            f"the certificate {row.serial[:12]} of {row.device_id} was replaced and is used again: its key may have been "
            f"copied; if it was: edgeopt fleet revoke {row.device_id}, and enrol the device again"
        )
    if len(successors) >= MAX_SUCCESSORS:
        raise TrustError(
            f"{row.device_id} renewed one certificate {MAX_SUCCESSORS} times without using what it got; look at the "
            "device, and enrol it again with a new token"
        )


def revoke(rows: Iterable[CertificateRow], reason: str, now: datetime) -> list[str]:
    """Revoke certificates; returns the serials of those that were not revoked before."""
    fresh = [row for row in rows if row.revoked_at is None]
    for row in fresh:
        row.revoked_at, row.reason = now, reason
    return [row.serial for row in fresh]


def revoked_entries(session: Session, now: datetime) -> list[Revoked]:
    """What the revocation list must name: revoked, and not expired by itself."""
    query = select(CertificateRow).where(
        CertificateRow.revoked_at.is_not(None), CertificateRow.expires_at > now
    )
    return [
        Revoked(row.serial, row.revoked_at, row.reason) for row in session.scalars(query) if row.revoked_at
    ]


def certificate_document(row: CertificateRow) -> dict[str, Any]:
    """What is told of a certificate."""
    return {
        "serial": row.serial,
        "device": row.device_id,
        "issued_at": format_moment(row.issued_at),
        "expires_at": format_moment(row.expires_at),
        "by": "renewal" if row.previous else "token",
        "confirmed_at": format_moment(row.confirmed_at) if row.confirmed_at else None,
        "revoked_at": format_moment(row.revoked_at) if row.revoked_at else None,
        "reason": row.reason,
    }
