# SPDX-License-Identifier: Apache-2.0
"""The fleet's certificate authority: a key and a certificate in a folder, and what it signs.

| certificate | common name | for | lives |
|---|---|---|---|
| the authority's | the name given when it was made | signing certificates and revocation lists | 10 years |
| a device's | `<tenant>.<device>` | TLS client authentication | 90 days |
| the control plane's | `edgeopt-control` | TLS client authentication | 90 days |
| broker, enrolment endpoint | its first name | TLS server authentication | 90 days |

Rules:
- What a certificate says is ours: of a request only the public key is taken, after its signature proved the key.
- EC P-256, P-384 and Ed25519 keys; whatever else asks is refused.
- A device's certificate authenticates clients only, so that no device can play the broker.

Source: RFC 5280; CA/Browser Forum's habits where nothing else decides. Keys on hardware are not supported yet.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgeopt.keys import Ask, encoded_key, load_private_key, write_private
from edgeopt_wire import topics
from edgeopt_wire.errors import RecipeError, StoreError, TrustError

CONTROL_NAME = "edgeopt-control"
AUTHORITY_LIFETIME = timedelta(days=3650)
LIFETIME = timedelta(days=90)
BACKDATED = timedelta(minutes=5)
"""A broker whose clock is a little late takes a certificate at once."""
CRL_LIFETIME = timedelta(days=30)
"""A broker refuses everybody once its list has ended: it is signed anew each day while the fleet runs."""

MAX_COMMON_NAME = 64

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True)
class Revoked:
    """An entry of the revocation list: `serial` in hexadecimal, `reason` a word of RFC 5280 (`keyCompromise`) or none."""

    serial: str
    at: datetime
    reason: str = ""


class Authority:
    """An open authority: its certificate and its private key."""

    def __init__(self, certificate: x509.Certificate, key: Any) -> None:
        self.certificate = certificate
        self._key = key

    @property
    def pem(self) -> str:
        """Its certificate as PEM."""
        return pem_of(self.certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its certificate, as a device pins it."""
        return fingerprint_of(self.certificate)

    def issue_device(
        self, key: PublicKey, tenant: str, device: str, now: datetime, *, life: timedelta = LIFETIME
    ) -> x509.Certificate:
        """Certify a device's key: client authentication, `life` long.

        Raises:
            RecipeError: The common name would be longer than a certificate may hold.
        """
        name = common_name(tenant, device)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"edgeopt://{tenant}/{device}")]
        return self._issue(key, name, names, ExtendedKeyUsageOID.CLIENT_AUTH, now, life)

    def issue_control(self, now: datetime) -> tuple[str, bytes]:
        """A certificate for the control plane and its key, both PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._issue(key.public_key(), CONTROL_NAME, [], ExtendedKeyUsageOID.CLIENT_AUTH, now)
        return pem_of(made), encoded_key(key)

    def issue_server(self, names: Sequence[str], now: datetime) -> tuple[str, bytes]:
        """A certificate for a server that is reached by these names or addresses, and its key, both PEM.

        Raises:
            RecipeError: No name, or one that cannot be one.
        """
        if not names:
            raise RecipeError("a server needs the names or addresses that it is reached by")
        key = ec.generate_private_key(ec.SECP256R1())
        found = [_general_name(name) for name in names]
        made = self._issue(key.public_key(), names[0], found, ExtendedKeyUsageOID.SERVER_AUTH, now)
        return pem_of(made), encoded_key(key)

    def revocation_list(self, revoked: Iterable[Revoked], now: datetime) -> str:
        """The certificates that no broker takes any more, signed, as PEM; its number is the moment in seconds."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - BACKDATED)
            .next_update(now + CRL_LIFETIME)
            .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
        )
        for entry in revoked:
            made = x509.RevokedCertificateBuilder(int(entry.serial, 16), entry.at)
            if entry.reason:
                made = made.add_extension(x509.CRLReason(x509.ReasonFlags(entry.reason)), critical=False)
            builder = builder.add_revoked_certificate(made.build())
        signed = builder.sign(self._key, _hash_for(self._key))
        return signed.public_bytes(Encoding.PEM).decode("ascii")

    def _issue(  # noqa: PLR0917 - each is what a certificate says
        self,
        key: PublicKey,
        name: str,
        names: list[x509.GeneralName],
        usage: Any,
        now: datetime,
        life: timedelta = LIFETIME,
    ) -> x509.Certificate:
        usages = dict.fromkeys(_USAGES, False) | {"digital_signature": True}
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name[:MAX_COMMON_NAME]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - min(BACKDATED, life / 20))
            .not_valid_after(min(now + life, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usages), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, _hash_for(self._key))


def create_authority(folder: Path, name: str, now: datetime, passphrase: str = "") -> Authority:
    """Make an authority in a folder: `ca.pem` to hand out, `ca.key` for its owner only.

    Raises:
        RecipeError: There is one already; it is never overwritten.
        StoreError: The disk refused.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    usages = dict.fromkeys(_USAGES, False) | {"key_cert_sign": True, "crl_sign": True}
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usages), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    made = Authority(certificate, key)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(folder / "ca.key", encoded_key(key, passphrase))
        (folder / "ca.pem").write_text(made.pem, encoding="ascii")
    except FileExistsError as error:
        raise RecipeError(
            f"{folder / 'ca.key'} is there already, and every device trusts it; choose another folder"
        ) from error
    except OSError as error:
        raise StoreError(f"cannot write an authority to {folder}: {error.strerror}") from error
    return made


def open_authority(folder: Path, ask: Ask | None = None) -> Authority:
    """Open an authority; an encrypted key takes `$EDGEOPT_KEY_PASSPHRASE`, else asks.

    Raises:
        StoreError: It is not there, or others may read its key.
        TrustError: The passphrase is wrong, or key and certificate do not belong together.
    """
    made_by = f"make an authority with `edgeopt fleet ca create {folder}`"
    key = load_private_key(folder / "ca.key", ask, made_by=made_by)
    certificate = read_authority(folder)
    if key_digest(key.public_key()) != key_digest(certificate.public_key()):
        raise TrustError(
            f"{folder / 'ca.key'} is not the key of {folder / 'ca.pem'}; restore both from one copy"
        )
    return Authority(certificate, key)


def read_authority(folder: Path) -> x509.Certificate:
    """The authority's certificate alone; needs no key.

    Raises:
        StoreError: It is not there.
        TrustError: It is none.
    """
    path = folder / "ca.pem"
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {error.strerror}; make an authority with `edgeopt fleet ca create {folder}`"
        ) from error
    except ValueError as error:
        raise TrustError(f"{path} is no certificate: {error}") from error


def common_name(tenant: str, device: str) -> str:
    """What a device is called in its certificate, which is its MQTT client id as well.

    Raises:
        RecipeError: Too long for a certificate (RFC 5280, ub-common-name).
    """
    name = topics.client_id(tenant, device)
    if len(name) > MAX_COMMON_NAME:
        raise RecipeError(
            f"{name} has {len(name)} characters and a certificate holds {MAX_COMMON_NAME}; give a shorter name"
        )
    return name


def key_of_request(csr: str) -> PublicKey:
    """The public key of a certificate request that proves to hold its private key; nothing else of it is read.

    Raises:
        TrustError: No request, not signed by its own key, or a key of a kind that is not taken.
    """
    try:
        request = x509.load_pem_x509_csr(csr.encode("ascii"))
        proven, key = request.is_signature_valid, request.public_key()
    except Exception as error:  # cryptography has many words for bytes that are no request
        raise TrustError(f"that is no certificate request: {error}") from error
    if not proven:
        raise TrustError("the certificate request is not signed by its own key")
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise TrustError("a device's key is EC P-256, P-384 or Ed25519; make one of these")


def verify(certificate: x509.Certificate, signature: bytes, content: bytes) -> None:
    """Check a signature with a certificate's key.

    Raises:
        TrustError: It is not from that key.
    """
    key = certificate.public_key()
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, content, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, content)
        else:
            raise TrustError("that certificate's key is none of ours")
    except InvalidSignature as error:
        raise TrustError("the request is not signed by the key of its certificate") from error


def key_digest(key: Any) -> str:
    """SHA-256 of a public key's SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def serial_of(certificate: x509.Certificate) -> str:
    """A certificate's serial number in hexadecimal."""
    return f"{certificate.serial_number:040x}"


def fingerprint_of(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def pem_of(certificate: x509.Certificate) -> str:
    """A certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM).decode("ascii")


_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise RecipeError(f"{name!r} is neither a host name nor an address: {error}") from error


def _hash_for(key: Any) -> Any:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
