# SPDX-License-Identifier: Apache-2.0
"""Enrolment's deeds, each one transaction: make and spend a token, issue, renew, confirm, revoke.

Nothing here knows HTTP or a broker: `on_change` is told whenever who may connect changed, after the commit and before
the answer, with the devices that were just shut out.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from edgeopt.fleet import certificates, tokens
from edgeopt.fleet.authority import (
    CRL_LIFETIME,
    LIFETIME,
    Authority,
    Revoked,
    common_name,
    key_digest,
    key_of_request,
    pem_of,
    serial_of,
    verify,
)
from edgeopt.fleet.database import CertificateRow, Device, EnrolToken
from edgeopt_wire import topics
from edgeopt_wire.document import format_moment
from edgeopt_wire.enrolment import Confirm, EnrolRequest, Renewed, RenewRequest, confirm_bytes, renewal_bytes
from edgeopt_wire.errors import DocumentError, RecipeError, TrustError

_log = logging.getLogger(__name__)

Changed = Callable[[Sequence[str]], None]


class Enrolment:
    """Who belongs to the fleet of one tenant, by certificates of one authority.

    Raises:
        RecipeError: The tenant's name would let two devices share a common name.
    """

    def __init__(
        self,
        sessions: sessionmaker[Session],
        authority: Authority,
        tenant: str,
        clock: Callable[[], datetime],
        *,
        grace: timedelta = certificates.GRACE,
        life: timedelta = LIFETIME,
    ) -> None:
        if "." in tenant:
            raise RecipeError(
                f"the tenant {tenant!r} has a dot: with certificates a.b of c and b.c of a would be one device; rename it"
            )
        self.authority = authority
        self.tenant = tenant
        self.on_change: Changed = lambda shut_out: None  # noqa: ARG005 - the signature of whoever wants to know
        self._sessions = sessions
        self._clock = clock
        self._grace = grace
        self._life = life

    def make_token(self, *, device: str, device_class: str, stand_in: bool, ttl: timedelta) -> dict[str, Any]:
        """Make a token for a device of a class (any new device, where `device` is empty); told here and never again.

        Raises:
            RecipeError: A name that cannot be one, a device of another class, or an odd lifetime.
        """
        if device:
            _check_name(self.tenant, device)
        now = self._clock()
        with self._sessions.begin() as session:
            known = session.get(Device, device) if device else None
            if known is not None and known.device_class != device_class:
                raise RecipeError(
                    f"{device} is enrolled as {known.device_class}; give the new device another id"
                )
            token, row = tokens.make_token(
                session, device=device, device_class=device_class, stand_in=stand_in, now=now, ttl=ttl
            )
            return {"token": token, **tokens.token_document(row, now)}

    def tokens(self) -> dict[str, Any]:
        """Every token, the newest first, none of them readable."""
        now = self._clock()
        with self._sessions() as session:
            rows = session.scalars(select(EnrolToken).order_by(EnrolToken.id.desc()))
            return {
                "schema": "edgeopt.enrol-tokens/1",
                "tokens": [tokens.token_document(r, now) for r in rows],
            }

    def revoke_token(self, number: int) -> None:
        """Make a token worthless that nobody used yet.

        Raises:
            RecipeError: There is no such token, or it was used.
        """
        with self._sessions.begin() as session:
            tokens.revoke_token(session, number, self._clock())

    def enrol(self, request: EnrolRequest) -> tuple[Device, str]:
        """Spend a token on a key; return the device and its certificate as PEM.

        The same token with the same key gets the same certificate again: what was cut can be finished.

        Raises:
            TrustError: The token or the request does not entitle to it.
            RecipeError: The device's name cannot be one.
        """
        key = key_of_request(request.csr)
        digest, now = key_digest(key), self._clock()
        with self._sessions.begin() as session:
            token = tokens.find_token(session, request)
            repeated = self._repeated(session, token, digest)
            if repeated is not None:
                return _device(session, repeated.device_id), repeated.pem
            name = token.device_id or request.device
            if not name:
                raise TrustError(f"token {token.id} names no device: say with --device who this is")
            _check_name(self.tenant, name)
            self._check_key(session, digest, name)
            tokens.spend(session, token, device=name, key_sha256=digest, now=now)
            device = self._admit(session, token, name, now)
            query = select(CertificateRow).where(CertificateRow.device_id == name)
            certificates.revoke(session.scalars(query), "superseded", now)
            row = self._issue(session, key, digest, name, now)
        self.on_change(())
        _log.info("%s is enrolled, certificate %s", device.id, row.serial[:12])
        return device, row.pem

    def renew(self, request: RenewRequest) -> Renewed:
        """Issue the successor of a certificate to whoever holds its key.

        Raises:
            TrustError: Not issued here, revoked, replaced, too old, not signed by its key, or the same key again.
        """
        current, key = _load(request.certificate), key_of_request(request.csr)
        digest, now = key_digest(key), self._clock()
        with self._sessions.begin() as session:
            row = certificates.find_row(session, current)
            verify(current, _decode(request.signature), renewal_bytes(request.csr))
            known = certificates.with_key(session, digest)
            made = next((found for found in known if found.previous == row.serial), None)
            if made is None:
                if known:
                    raise TrustError(
                        "a renewal needs a new key, and this one was certified before; make another"
                    )
                certificates.check_renewable(session, row, now, self._grace)
                made = self._issue(session, key, digest, row.device_id, now, previous=row.serial)
                _log.info("%s renewed %s as %s", row.device_id, row.serial[:12], made.serial[:12])
        return Renewed(made.pem, self.authority.pem)

    def confirm(self, request: Confirm) -> None:
        """Note that a device has its new pair: the certificate before renews nothing any more.

        Raises:
            TrustError: Not issued here, revoked, or not signed by its key.
        """
        shown = _load(request.certificate)
        with self._sessions.begin() as session:
            row = certificates.find_row(session, shown)
            verify(shown, _decode(request.signature), confirm_bytes(request.certificate))
            row.confirmed_at = row.confirmed_at or self._clock()

    def revoke(self, device: str, reason: str) -> list[str]:
        """Revoke every certificate of a device; it is shut out until it is enrolled again. Returns serials.

        Raises:
            RecipeError: It has no certificate, or that is no reason.
        """
        if reason not in certificates.REASONS:
            raise RecipeError(f"{reason!r} is no reason; these are: {', '.join(certificates.REASONS)}")
        with self._sessions.begin() as session:
            rows = list(session.scalars(select(CertificateRow).where(CertificateRow.device_id == device)))
            if not rows:
                raise RecipeError(f"{device} was given no certificate; see `edgeopt fleet certificates`")
            done = certificates.revoke(rows, reason, self._clock())
            _device(session, device).online = False  # nothing that it says counts from here, its will neither
            for token in session.scalars(select(EnrolToken).where(EnrolToken.device_id == device)):
                if token.used_at is None:
                    token.revoked_at = token.revoked_at or self._clock()
        self.on_change((device,))
        return done

    def certificates(self, device: str = "") -> dict[str, Any]:
        """Every certificate that was issued, the newest first."""
        query = select(CertificateRow).order_by(CertificateRow.id.desc())
        if device:
            query = query.where(CertificateRow.device_id == device)
        with self._sessions() as session:
            rows = [certificates.certificate_document(row) for row in session.scalars(query)]
        return {"schema": "edgeopt.fleet-certificates/1", "certificates": rows}

    def revoked(self) -> list[Revoked]:
        """What the revocation list must name now."""
        with self._sessions() as session:
            return certificates.revoked_entries(session, self._clock())

    def revocation_list(self) -> dict[str, Any]:
        """The signed list for brokers that are not kept by us."""
        now, entries = self._clock(), self.revoked()
        return {
            "schema": "edgeopt.crl/1",
            "pem": self.authority.revocation_list(entries, now),
            "revoked": len(entries),
            "next_update": format_moment(now + CRL_LIFETIME),
        }

    def admitted(self) -> list[str]:
        """The devices that may use a broker."""
        with self._sessions() as session:
            newest = certificates.newest_by_device(session)
            shut_out = {name for name, row in newest.items() if row.revoked_at is not None}
            return [
                name
                for name in session.scalars(select(Device.id).order_by(Device.id))
                if name not in shut_out
            ]

    def _repeated(self, session: Session, token: EnrolToken, digest: str) -> CertificateRow | None:
        """What this token gave this key before, as long as it is worth something."""
        if token.used_at is None or token.key_sha256 != digest:
            return None
        row = certificates.with_key(session, digest)[0]
        return certificates.find_row(session, _load(row.pem))

    def _check_key(self, session: Session, digest: str, device: str) -> None:
        others = {row.device_id for row in certificates.with_key(session, digest)} - {device}
        if others:
            raise TrustError(f"this key is that of {', '.join(others)}; each device makes its own")

    def _admit(self, session: Session, token: EnrolToken, name: str, now: datetime) -> Device:
        known = session.get(Device, name)
        if known is None:
            known = Device(id=name, device_class=token.device_class, stand_in=token.stand_in, enrolled_at=now)
            session.add(known)
            session.flush()
        elif not token.device_id:
            raise TrustError(f"{name} is enrolled already: a token that names no device is for new ones only")
        elif known.device_class != token.device_class:
            raise TrustError(
                f"{name} is enrolled as {known.device_class}, and the token is for another class"
            )
        return known

    def _issue(
        self, session: Session, key: Any, digest: str, device: str, now: datetime, *, previous: str = ""
    ) -> CertificateRow:
        made = self.authority.issue_device(key, self.tenant, device, now, life=self._life)
        row = CertificateRow(
            serial=serial_of(made),
            device_id=device,
            key_sha256=digest,
            issued_at=now,
            expires_at=made.not_valid_after_utc,
            pem=pem_of(made),
            previous=previous,
        )
        session.add(row)
        session.flush()
        return row


def _device(session: Session, name: str) -> Device:
    found = session.get(Device, name)
    assert found is not None, "a certificate's device is a foreign key"
    return found


def _check_name(tenant: str, device: str) -> None:
    try:
        topics.check_part(device, "device")
    except DocumentError as error:
        raise RecipeError(str(error)) from error
    common_name(tenant, device)


def _load(pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode("ascii"))
    except ValueError as error:
        raise TrustError(f"that is no certificate: {error}") from error


def _decode(signature: str) -> bytes:
    try:
        return base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TrustError("the signature is not base64") from error
