# SPDX-License-Identifier: Apache-2.0
"""The director's word: DSSE envelopes, whose keys the repository signs in `fleet/director.json`.

Sources: the DSSE protocol (secure-systems-lab/dsse, protocol.md), as securesystemslib implements it; the split between
who makes packages and who directs devices is Uptane's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeopt_wire.document import parse_json
from edgeopt_wire.errors import DocumentError, ForgedError, TrustError

DIRECTOR_TARGET = "fleet/director.json"
DIRECTOR_SCHEMA = "edgeopt.director/1"


@dataclass(frozen=True)
class Director:
    """Who may direct this fleet: public keys by id, and how many of them must sign."""

    keys: dict[str, Any]
    threshold: int

    def open(self, envelope: bytes, payload_type: str, what: str) -> bytes:
        """Return the payload of an envelope that the director signed.

        Raises:
            ForgedError: It is not signed by the director.
            TrustError: It is no envelope, or the director signed another kind of document.
        """
        from securesystemslib.dsse import Envelope
        from securesystemslib.exceptions import FormatError, VerificationError

        try:
            found = Envelope.from_dict(parse_json(envelope, what))
        except (KeyError, ValueError, TypeError, AttributeError, FormatError) as error:
            raise TrustError(f"the {what} has no readable envelope: {error}") from error
        try:
            found.verify(list(self.keys.values()), self.threshold)
        except (VerificationError, ValueError) as error:
            raise ForgedError(f"the {what} is not signed by this fleet's director") from error
        if found.payload_type != payload_type:
            raise TrustError(f"the director signed {found.payload_type}, expected {payload_type}")
        payload: bytes = found.payload
        return payload


def read_director(raw: bytes) -> Director:
    """Read the signed target that names the director's keys.

    Raises:
        TrustError: It is signed, and it is no list of keys.
    """
    from securesystemslib.exceptions import FormatError
    from securesystemslib.signer import Key

    document = parse_json(raw, "director keys")
    try:
        if document["schema"] != DIRECTOR_SCHEMA:
            raise DocumentError(f"expected schema {DIRECTOR_SCHEMA}, found {document['schema']!r}")
        keys = {keyid: Key.from_dict(keyid, dict(value)) for keyid, value in document["keys"].items()}
        threshold = int(document["threshold"])
    except (KeyError, ValueError, TypeError, AttributeError, FormatError) as error:
        raise TrustError(f"{DIRECTOR_TARGET} is signed and cannot be read: {error}") from error
    if not 1 <= threshold <= len(keys):
        raise TrustError(f"{DIRECTOR_TARGET} asks for {threshold} signatures of {len(keys)} keys")
    return Director(keys, threshold)
