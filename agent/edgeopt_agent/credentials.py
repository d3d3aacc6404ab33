# SPDX-License-Identifier: Apache-2.0
"""A device's key and certificate: made, checked, kept in one file.

Rules:
- The private key is made here and never leaves this device; files that hold one are for their owner only.
- Key and certificate share one file that is replaced whole: power may go at any moment, and there is the old pair or the
  new one, never a key with another's certificate.
- What an endpoint answers counts once it is checked: our key, our name, signed by the authority that we trust.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.files import write_durably
from edgeopt_wire import topics
from edgeopt_wire.errors import ForgedError, StoreError

if TYPE_CHECKING:
    from cryptography import x509

PAIR_FILE = "identity.pem"

RENEW_AT, SPREAD = 2 / 3, 1 / 20
"""A certificate is renewed when this share of its life is over, and up to so much later: a fleet that was enrolled in
one hour does not come back in one hour."""


@dataclass(frozen=True)
class Pair:
    """A private key and the certificate for it; `pem` is both, as in the file."""

    key: Any
    certificate: x509.Certificate
    pem: bytes

    @property
    def serial(self) -> str:
        """The certificate's number, in hexadecimal."""
        return serial_of(self.certificate)

    @property
    def name(self) -> str:
        """The certificate's common name."""
        return common_name(self.certificate)

    @property
    def certificate_pem(self) -> str:
        """The certificate alone, as PEM."""
        from cryptography.hazmat.primitives.serialization import Encoding

        return self.certificate.public_bytes(Encoding.PEM).decode("ascii")

    @property
    def expires_at(self) -> datetime:
        """When the certificate ends."""
        return self.certificate.not_valid_after_utc

    @property
    def renews_at(self) -> datetime:
        """From when on it is to be renewed."""
        return spread_renewal(self.certificate)

    def sign(self, content: bytes) -> str:
        """Sign with the key; base64."""
        return sign(self.key, content)


def serial_of(certificate: x509.Certificate) -> str:
    """A certificate's number, in hexadecimal."""
    return f"{certificate.serial_number:040x}"


def spread_renewal(certificate: x509.Certificate) -> datetime:
    """From when on a certificate is to be renewed; the same whenever it is asked, spread among those of a fleet."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    share = int(hashlib.sha256(serial_of(certificate).encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    return begins + (ends - begins) * (RENEW_AT + SPREAD * share)


def new_key() -> Any:
    """Make a key: EC P-256, which every TLS library takes."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def kept_key(path: Path) -> Any:
    """The key of a request that is under way: the one at `path`, or a new one, on the disk before it is used.

    Raises:
        StoreError: The disk refused.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        pass
    except (ValueError, TypeError):
        path.unlink(missing_ok=True)  # nothing was certified for a key that cannot be read
    except OSError as error:
        raise StoreError(f"cannot read the key {path}: {error.strerror}") from error
    key = new_key()
    write_durably(path, key_pem(key))
    return key


def key_pem(key: Any) -> bytes:
    """A private key as PKCS #8 PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem


def make_request(key: Any, name: str) -> str:
    """A certificate request for a key, as PEM; of it only the key counts at the other end."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return made.public_bytes(Encoding.PEM).decode("ascii")


def sign(key: Any, content: bytes) -> str:
    """Sign with a key; base64."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return base64.b64encode(key.sign(content)).decode("ascii")
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return base64.b64encode(key.sign(content, ec.ECDSA(hashes.SHA256()))).decode("ascii")
    raise StoreError(
        "this device's key is neither EC nor Ed25519; enrol the device to get one that can be renewed"
    )


def join(key: Any, certificate: str, authorities: str, tenant: str, device: str) -> Pair:
    """Put a key and the certificate that came for it together, once it is known to be ours.

    Raises:
        ForgedError: It is for another key or device, not signed by an authority of `authorities`, or an authority itself.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    try:
        found = x509.load_pem_x509_certificate(certificate.encode("ascii"))
        trusted = x509.load_pem_x509_certificates(authorities.encode("ascii"))
        is_ours = found.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)
        issuer = next((by for by in trusted if _is_signed_by(found, by)), None)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ForgedError(f"what came is no certificate: {error}") from error
    wanted = topics.client_id(tenant, device)
    if not is_ours:
        raise ForgedError("the certificate that came is for another key")
    if common_name(found) != wanted:
        raise ForgedError(f"the certificate that came is for {common_name(found)!r}, and this is {wanted}")
    if issuer is None:
        raise ForgedError("the certificate that came is not signed by the authority that this device trusts")
    return Pair(key, found, key_pem(key) + certificate.encode("ascii"))


def read_pair(path: Path) -> Pair:
    """Read a file with a key and its certificate.

    Raises:
        StoreError: It is not there, or not whole.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        pem = path.read_bytes()
        return Pair(load_pem_private_key(pem, None), x509.load_pem_x509_certificate(pem), pem)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path} does not hold a key and its certificate: {error}") from error


def common_name(certificate: x509.Certificate) -> str:
    """A certificate's common name, empty if it has none."""
    from cryptography.x509.oid import NameOID

    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def _is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True
