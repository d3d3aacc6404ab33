# SPDX-License-Identifier: Apache-2.0
"""The way to the fleet's enrolment endpoint: HTTPS to a server that is known before anything is said to it.

Rules:
- A server is known by the authority that signed its certificate. Who has only the authority's fingerprint asks for the
  certificate first, with nothing secret said, compares, and connects again.
- Dates are judged by what is certain, never by the wall clock: a board at 1970 can enrol, and one in 2035 can renew.
- Answers are cut off at their limit.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import ssl
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from edgeopt_agent.trusted_time import BUILT_AT
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.enrolment import AUTHORITY_PATH, MAX_BODY_BYTES
from edgeopt_wire.errors import DocumentError, RecipeError, TransportError, TrustError

T = TypeVar("T")

TIMEOUT_S = 15.0
NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python's ssl has no name for."""


class RefusedError(TrustError):
    """The endpoint is who it should be, and refuses: its words say why. Asking again changes nothing."""


def certain_since() -> datetime:
    """The moment that has certainly been: when this agent was built."""
    return BUILT_AT


class Endpoint:
    """One server, known by `authorities` (PEM). `certain` gives a moment that has certainly been.

    Raises:
        RecipeError: The address is no https:// address, or the authorities are none.
    """

    def __init__(
        self, server: str, authorities: str, certain: Callable[[], datetime] = certain_since
    ) -> None:
        self.server = server.rstrip("/")
        self._parts = _split(self.server)
        self._certain = certain
        try:
            self._context = ssl.create_default_context(cadata=authorities)
        except (ssl.SSLError, ValueError) as error:
            raise RecipeError(f"the authority of {server} is no certificate: {error}") from error
        self._context.verify_flags |= ssl.VerifyFlags(NO_CHECK_TIME)

    def ask(self, path: str, document: Any, answer: type[T]) -> T:
        """Post a document and read the answer.

        Raises:
            TransportError: Nobody answers, or the server has trouble: later again.
            TrustError: The server is not who it should be.
            RefusedError: The server refuses; final.
        """
        raw = self.post(path, document)
        try:
            return from_bytes(answer, raw)
        except DocumentError as error:
            raise TransportError(f"{self.server} answers something else: {error}") from error

    def post(self, path: str, document: Any) -> bytes:
        """Post a document and return the answer's bytes; raises as `ask` does."""
        status, raw = self._exchange("POST", path, to_bytes(document))
        if status in (200, 201):
            return raw
        said = _words(raw) or f"it answered {status}"
        if status in (403, 422):
            raise RefusedError(said)
        raise TransportError(f"{self.server}: {said}")

    def check(self) -> None:
        """Only look whether the server is there and who it should be; raises as `ask` does."""
        status, _ = self._exchange("GET", AUTHORITY_PATH)
        if status != 200:
            raise TransportError(f"{self.server} is no enrolment endpoint: it answered {status}")

    def _exchange(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        connection = http.client.HTTPSConnection(
            self._parts.hostname or "", self._parts.port or 443, timeout=TIMEOUT_S, context=self._context
        )
        try:
            connection.connect()
            self._check_date(connection.sock)
            return _request(connection, method, path, body)
        except ssl.SSLCertVerificationError as error:
            raise TrustError(
                f"{self.server} is not who it should be ({error.verify_message}): nothing was said to it; check the "
                "address, and the authority's file or fingerprint"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(
                f"no enrolment endpoint answers at {self.server}: {error}; check address, port and firewall"
            ) from error
        finally:
            connection.close()

    def _check_date(self, sock: Any) -> None:
        ends = (sock.getpeercert() or {}).get("notAfter")
        if isinstance(ends, str) and ssl.cert_time_to_seconds(ends) < self._certain().timestamp():
            raise TrustError(f"the certificate of {self.server} ended on {ends}: nothing was said to it")


def fetch_authority(server: str, fingerprint: str) -> str:
    """Get the authority's certificate that has this SHA-256; nothing secret is said on the way.

    Raises:
        RecipeError: That is no fingerprint.
        TransportError: Nobody answers.
        TrustError: The server has another authority: somebody stands between, or the fingerprint is another fleet's.
    """
    wanted = fingerprint.replace(":", "").lower()
    if len(wanted) != 64 or not set(wanted) <= set("0123456789abcdef"):
        raise RecipeError(
            "a fingerprint is a SHA-256 in hexadecimal, 64 digits; `edgeopt fleet ca show` tells it"
        )
    parts = _split(server)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what comes is compared with the pinned digest
    connection = http.client.HTTPSConnection(
        parts.hostname or "", parts.port or 443, timeout=TIMEOUT_S, context=context
    )
    try:
        status, raw = _request(connection, "GET", AUTHORITY_PATH)
        pem = raw.decode("ascii") if status == 200 else ""
        found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest() if pem else "nothing"
    except (OSError, http.client.HTTPException) as error:
        raise TransportError(
            f"no enrolment endpoint answers at {server}: {error}; check address, port and firewall"
        ) from error
    except ValueError as error:
        raise TransportError(f"{server} is no enrolment endpoint: {error}") from error
    finally:
        connection.close()
    if found != wanted:
        raise TrustError(
            f"{server} shows the authority {found[:16]}..., expected was {wanted[:16]}...: nothing was said to it; "
            "compare with `edgeopt fleet ca show`"
        )
    return pem


def _request(
    connection: http.client.HTTPSConnection, method: str, path: str, body: bytes = b""
) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"} if body else {}
    connection.request(method, path, body=body or None, headers=headers)
    answer = connection.getresponse()
    raw = answer.read(MAX_BODY_BYTES + 1)
    if len(raw) > MAX_BODY_BYTES:
        raise http.client.HTTPException(f"the answer goes on after {MAX_BODY_BYTES} bytes")
    return answer.status, raw


def _split(server: str) -> SplitResult:
    try:
        parts = urlsplit(server)
        port = parts.port
    except ValueError as error:
        raise RecipeError(f"{server!r} is no address: {error}") from error
    if parts.scheme != "https" or not parts.hostname or parts.path.strip("/") or port == 0:
        raise RecipeError(f"an enrolment endpoint is https://HOST:PORT, found {server!r}")
    return parts


def _words(raw: bytes) -> str:
    try:
        found = json.loads(raw)
    except (ValueError, UnicodeDecodeError):
        return ""
    return str(found.get("error", ""))[:500] if isinstance(found, dict) else ""
