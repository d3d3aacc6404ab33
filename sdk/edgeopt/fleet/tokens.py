# SPDX-License-Identifier: Apache-2.0
"""One-time enrolment tokens: made, listed, revoked, spent. Only their SHA-256 is kept.

Rules:
- A token enrols one key, once. The same key may come again with it, to finish what was cut; no other ever.
- It is bound to a device class, and to a device's name unless it was made without one.
- 256 random bits: there is nothing to guess, so no slow hash and no count of attempts is needed.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from edgeopt.fleet.database import EnrolToken
from edgeopt_wire.document import format_moment
from edgeopt_wire.enrolment import EnrolRequest
from edgeopt_wire.errors import RecipeError, TrustError

PREFIX = "eot-"
"""So that a token that lies in a log or a repository is found by whoever looks for secrets."""
MAX_TTL = timedelta(days=90)


def make_token(
    session: Session, *, device: str, device_class: str, stand_in: bool, now: datetime, ttl: timedelta
) -> tuple[str, EnrolToken]:
    """Make a token; it is returned once and can be shown by nobody later.

    Raises:
        RecipeError: It would live for no time, or too long.
    """
    if not timedelta(minutes=1) <= ttl <= MAX_TTL:
        raise RecipeError(f"a token lives between a minute and {MAX_TTL.days} days")
    token = PREFIX + secrets.token_urlsafe(32)
    row = EnrolToken(
        sha256=hash_of(token),
        device_id=device,
        device_class=device_class,
        stand_in=stand_in,
        created_at=now,
        expires_at=now + ttl,
    )
    session.add(row)
    session.flush()
    return token, row


def find_token(session: Session, request: EnrolRequest) -> EnrolToken:
    """The token of a request, if it is one and is for this device.

    Raises:
        TrustError: It is unknown, revoked, or for another device or class.
    """
    row = session.scalar(select(EnrolToken).where(EnrolToken.sha256 == hash_of(request.token)))
    if row is None:
        raise TrustError("this token is not known here; make one with `edgeopt fleet token`")
    if row.revoked_at is not None:
        raise TrustError(f"token {row.id} was revoked; make another with `edgeopt fleet token`")
    if request.device_class and request.device_class != row.device_class:
        raise TrustError(f"token {row.id} is for a {row.device_class}, and this is a {request.device_class}")
    if row.device_id and request.device and request.device != row.device_id:
        raise TrustError(f"token {row.id} is for {row.device_id}, and this is {request.device}")
    return row


def spend(session: Session, row: EnrolToken, *, device: str, key_sha256: str, now: datetime) -> None:
    """Use a token up for a key; of two at once one succeeds.

    Raises:
        TrustError: It was used, or its time is over.
    """
    if row.used_at is not None:
        raise TrustError(
            f"token {row.id} was used at {format_moment(row.used_at)} by {row.used_by} with another key; if that was not "
            "you, revoke that device; make another token with `edgeopt fleet token`"
        )
    if now >= row.expires_at:
        raise TrustError(f"token {row.id} ended at {format_moment(row.expires_at)}; make another")
    changed: Any = session.execute(
        update(EnrolToken)
        .where(EnrolToken.id == row.id, EnrolToken.used_at.is_(None), EnrolToken.revoked_at.is_(None))
        .values(used_at=now, used_by=device, key_sha256=key_sha256)
    )
    if changed.rowcount != 1:
        raise TrustError(f"token {row.id} was just used by somebody else; make another")


def revoke_token(session: Session, number: int, now: datetime) -> None:
    """Make a token worthless.

    Raises:
        RecipeError: There is no such token, or it was used: then its device is what can be revoked.
    """
    row = session.get(EnrolToken, number)
    if row is None:
        raise RecipeError(f"there is no token {number}; see `edgeopt fleet tokens`")
    if row.used_at is not None:
        raise RecipeError(
            f"token {number} was used by {row.used_by}; to shut it out: edgeopt fleet revoke {row.used_by}"
        )
    row.revoked_at = row.revoked_at or now


def token_document(row: EnrolToken, now: datetime) -> dict[str, Any]:
    """What is told of a token."""
    state = "open"
    if row.used_at is not None:
        state = "used"
    elif row.revoked_at is not None:
        state = "revoked"
    elif now >= row.expires_at:
        state = "expired"
    return {
        "id": row.id,
        "device": row.device_id,
        "device_class": row.device_class,
        "stand_in": row.stand_in,
        "state": state,
        "created_at": format_moment(row.created_at),
        "expires_at": format_moment(row.expires_at),
        "used_at": format_moment(row.used_at) if row.used_at else None,
        "used_by": row.used_by,
    }


def hash_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()
