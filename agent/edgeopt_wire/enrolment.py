# SPDX-License-Identifier: Apache-2.0
"""What a device and the enrolment endpoint say to each other over HTTPS: who it is to be, and its certificate.

| request | proof | answer |
|---|---|---|
| `POST /enrol/v1/enrol`: `EnrolRequest` | the token, and the CSR's own signature | `Enrolled` |
| `POST /enrol/v1/renew`: `RenewRequest` | a signature with the key of the certificate that it has | `Renewed` |
| `POST /enrol/v1/confirm`: `Confirm` | a signature with the key of the new certificate | nothing |
| `GET /enrol/v1/authority` | none | the authority's certificate as PEM; whoever pinned its fingerprint compares |

Rules:
- Of a CSR only the key counts; who the device is says the token, or the certificate that is renewed.
- Each request may be repeated: the same key gets the same certificate.
- What is signed begins with the request's schema, so that a signature for one request is none for another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt_wire.topics import check_part

ENROL_PATH = "/enrol/v1/enrol"
RENEW_PATH = "/enrol/v1/renew"
CONFIRM_PATH = "/enrol/v1/confirm"
AUTHORITY_PATH = "/enrol/v1/authority"

MAX_BODY_BYTES = 32 * 1024
"""More than any request or answer of these."""
MAX_PEM_CHARS = 8 * 1024
MAX_TOKEN_CHARS = 200


@dataclass(frozen=True)
class EnrolRequest:
    """A device asks for its first certificate; `device` and `device_class`, where given, must be the token's."""

    SCHEMA = "edgeopt.enrol-request/1"

    token: str
    csr: str
    device: str = ""
    device_class: str = ""
    agent_version: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < len(self.token) <= MAX_TOKEN_CHARS:
            raise ValueError(f"a token has 1 to {MAX_TOKEN_CHARS} characters")
        if self.device:
            check_part(self.device, "device")
        check_pem(self.csr)


@dataclass(frozen=True)
class Enrolled:
    """Who the device is now, its certificate, and what it needs to reach and to trust the fleet.

    `certificate` and `ca` are PEM, `root` is the signed root of trust in base64.
    """

    SCHEMA = "edgeopt.device-enrolled/1"

    tenant: str
    device: str
    device_class: str
    stand_in: bool
    certificate: str
    ca: str
    root: str
    mqtt_host: str
    mqtt_port: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_part(self.tenant, "tenant")
        check_part(self.device, "device")
        check_pem(self.certificate)
        check_pem(self.ca)
        if not 0 < self.mqtt_port < 65536:
            raise ValueError(f"{self.mqtt_port} is no port")


@dataclass(frozen=True)
class RenewRequest:
    """A device asks for its next certificate. `signature`: base64, of `renewal_bytes` with the key of `certificate`."""

    SCHEMA = "edgeopt.renew-request/1"

    certificate: str
    csr: str
    signature: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_pem(self.certificate)
        check_pem(self.csr)


@dataclass(frozen=True)
class Renewed:
    """The next certificate, and the authorities to trust from now on; both PEM."""

    SCHEMA = "edgeopt.renewed/1"

    certificate: str
    ca: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_pem(self.certificate)
        check_pem(self.ca)


@dataclass(frozen=True)
class Confirm:
    """The device has its new pair safe on its disk; the one before it may renew nothing any more."""

    SCHEMA = "edgeopt.renewal-confirm/1"

    certificate: str
    signature: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_pem(self.certificate)


def renewal_bytes(csr: str) -> bytes:
    """What the current key signs to ask for a certificate for the key of `csr`."""
    return f"{RenewRequest.SCHEMA}\0{csr}".encode()


def confirm_bytes(certificate: str) -> bytes:
    """What the new key signs once its pair is safe."""
    return f"{Confirm.SCHEMA}\0{certificate}".encode()


def check_pem(text: str) -> str:
    """Return `text` if it may be a certificate or a request as PEM: ASCII of a sensible size."""
    if not text.startswith("-----BEGIN ") or len(text) > MAX_PEM_CHARS or not text.isascii():
        raise ValueError(f"expected PEM of at most {MAX_PEM_CHARS} characters, found {text[:40]!r}")
    return text
