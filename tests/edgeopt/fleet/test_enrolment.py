# SPDX-License-Identifier: Apache-2.0
"""Who is let in, and who is not: tokens, requests that ask for more, renewals, copies of keys, revocation."""

import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sqlalchemy import text

from edgeopt.fleet.authority import Authority, create_authority, key_of_request, open_authority
from edgeopt.fleet.certificates import GRACE, MAX_SUCCESSORS
from edgeopt.fleet.database import engine_of, open_database, sqlite_url
from edgeopt.fleet.enrolment import Enrolment
from edgeopt_agent import credentials
from edgeopt_wire.enrolment import Confirm, EnrolRequest, RenewRequest, confirm_bytes, renewal_bytes
from edgeopt_wire.errors import RecipeError, StoreError, TrustError

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
HOST = {"device_class": "host", "stand_in": False, "ttl": timedelta(hours=1)}


class Office:
    """Enrolment on a real SQLite file and a real authority, with a clock that the test turns."""

    def __init__(self, folder: Path) -> None:
        self.now = NOON
        self.sessions = open_database(sqlite_url(folder))
        self.authority = create_authority(folder / "ca", "test fleet", NOON)
        self.enrolment = Enrolment(self.sessions, self.authority, "default", lambda: self.now)
        self.shut_out: list[str] = []
        self.enrolment.on_change = self.shut_out.extend

    def token(self, device: str = "d1", **more: Any) -> str:
        return str(self.enrolment.make_token(device=device, **{**HOST, **more})["token"])

    def enrol(self, token: str, key: Any, **more: Any) -> x509.Certificate:
        request = EnrolRequest(token, credentials.make_request(key, "whoever"), **more)
        return x509.load_pem_x509_certificate(self.enrolment.enrol(request)[1].encode())

    def renew(
        self, certificate: x509.Certificate, key: Any, new: Any, signer: Any = None
    ) -> x509.Certificate:
        csr = credentials.make_request(new, "x")
        signature = credentials.sign(signer or key, renewal_bytes(csr))
        answer = self.enrolment.renew(RenewRequest(_pem(certificate), csr, signature))
        return x509.load_pem_x509_certificate(answer.certificate.encode())

    def confirm(self, certificate: x509.Certificate, key: Any) -> None:
        pem = _pem(certificate)
        self.enrolment.confirm(Confirm(pem, credentials.sign(key, confirm_bytes(pem))))

    def serials(self) -> set[str]:
        return {entry.serial for entry in self.enrolment.revoked()}


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _serial(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:040x}"


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(tmp_path)
    yield made
    engine_of(made.sessions).dispose()


def test_certificate_says_what_we_say_and_nothing_that_the_request_asked_for(office: Office) -> None:
    key = credentials.new_key()
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "default.other")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("broker.example")]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    csr = greedy.public_bytes(serialization.Encoding.PEM).decode()
    _, pem = office.enrolment.enrol(EnrolRequest(office.token(), csr))
    found = x509.load_pem_x509_certificate(pem.encode())
    extensions = found.extensions
    assert credentials.common_name(found) == "default.d1"
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["edgeopt://default/d1"]
    assert found.not_valid_after_utc - NOON == timedelta(days=90)
    assert found.public_key() == key.public_key()
    found.verify_directly_issued_by(office.authority.certificate)


def test_token_itself_is_nowhere_in_the_database(office: Office, tmp_path: Path) -> None:
    token = office.token()
    office.enrol(token, credentials.new_key())
    with engine_of(office.sessions).connect() as connection:
        connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    raw = b"".join(path.read_bytes() for path in tmp_path.glob("fleet.sqlite*"))
    assert b"enrol_tokens" in raw
    assert token.encode() not in raw
    assert token.removeprefix("eot-").encode() not in raw


def test_same_token_and_key_finish_what_was_cut_and_another_key_gets_nothing(office: Office) -> None:
    token, key = office.token(), credentials.new_key()
    first = office.enrol(token, key)
    office.now += timedelta(days=2)  # the token's hour is long over: the enrolment was begun in time
    assert office.enrol(token, key) == first
    with pytest.raises(TrustError, match=r"was used .* by d1 with another key"):
        office.enrol(token, credentials.new_key())
    assert len(office.enrolment.certificates()["certificates"]) == 1


def test_finished_enrolment_of_a_revoked_device_gives_nothing_back(office: Office) -> None:
    token, key = office.token(), credentials.new_key()
    office.enrol(token, key)
    office.enrolment.revoke("d1", "keyCompromise")
    with pytest.raises(TrustError, match="revoked"):
        office.enrol(token, key)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("other class", "is for a host, and this is a jetson"),
        ("other device", "is for d1, and this is d2"),
        ("expired", "ended at"),
        ("revoked", "was revoked"),
        ("invented", "not known"),
    ],
)
def test_token_that_is_not_for_this_device_now_is_refused(office: Office, spoil: str, said: str) -> None:
    made = office.enrolment.make_token(device="d1", **HOST)
    token, more = made["token"], {}
    if spoil == "other class":
        more = {"device_class": "jetson"}
    elif spoil == "other device":
        more = {"device": "d2"}
    elif spoil == "expired":
        office.now += timedelta(hours=1)
    elif spoil == "revoked":
        office.enrolment.revoke_token(made["id"])
    else:
        token = "eot-" + "A" * 43
    with pytest.raises(TrustError, match=said):
        office.enrol(token, credentials.new_key(), **more)
    assert office.enrolment.certificates()["certificates"] == []
    assert office.enrolment.admitted() == []


def test_request_must_prove_its_key_and_bring_one_of_a_kind_that_is_taken(office: Office) -> None:
    good = credentials.make_request(credentials.new_key(), "d1")
    request = x509.load_pem_x509_csr(good.encode())
    broken = bytearray(request.public_bytes(serialization.Encoding.DER))
    broken[-3] ^= 1
    import ssl

    forged = ssl.DER_cert_to_PEM_cert(bytes(broken)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    small = rsa.generate_private_key(65537, 2048)
    for csr, said in ((forged, "not signed by its own key|no certificate request"),
                      (credentials.make_request(small, "d1"), "EC P-256, P-384 or Ed25519"),
                      ("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "no certificate request")):  # fmt: skip
        with pytest.raises(TrustError, match=said):
            key_of_request(csr)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "d")])
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())):
        algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, algorithm)
        assert key_of_request(made.public_bytes(serialization.Encoding.PEM).decode()) == key.public_key()


def test_token_without_a_name_takes_new_devices_only(office: Office) -> None:
    office.enrol(office.token("d1"), credentials.new_key())
    with pytest.raises(TrustError, match="say with --device"):
        office.enrol(office.token(""), credentials.new_key())
    with pytest.raises(TrustError, match="d1 is enrolled already"):
        office.enrol(office.token(""), credentials.new_key(), device="d1")
    assert (
        credentials.common_name(office.enrol(office.token(""), credentials.new_key(), device="d2"))
        == "default.d2"
    )


def test_key_of_one_device_is_no_key_of_another(office: Office) -> None:
    key = credentials.new_key()
    office.enrol(office.token("d1"), key)
    with pytest.raises(TrustError, match="this key is that of d1"):
        office.enrol(office.token("d2"), key)


def test_device_that_is_enrolled_again_leaves_its_old_certificate_worthless(office: Office) -> None:
    lost, board = credentials.new_key(), credentials.new_key()
    old = office.enrol(office.token("d1"), lost)
    office.enrol(office.token("d1"), board)
    assert office.serials() == {_serial(old)}
    with pytest.raises(TrustError, match="revoked"):
        office.renew(old, lost, credentials.new_key())
    assert office.enrolment.admitted() == ["d1"]


def test_renewal_gives_a_new_key_the_same_name_and_repeats_itself(office: Office) -> None:
    key, new = credentials.new_key(), credentials.new_key()
    first = office.enrol(office.token(), key)
    office.now += timedelta(days=60)
    second = office.renew(first, key, new)
    assert office.renew(first, key, new) == second
    assert (credentials.common_name(second), second.public_key()) == ("default.d1", new.public_key())
    assert second.not_valid_after_utc - office.now == timedelta(days=90)
    with pytest.raises(TrustError, match="a renewal needs a new key"):
        office.renew(first, key, key)


def test_renewal_is_for_who_holds_the_key(office: Office, tmp_path: Path) -> None:
    key, thief = credentials.new_key(), credentials.new_key()
    first = office.enrol(office.token(), key)
    with pytest.raises(TrustError, match="not signed by the key of its certificate"):
        office.renew(first, key, thief, signer=thief)
    foreign = create_authority(tmp_path / "other", "test fleet", NOON)
    fake = foreign.issue_device(thief.public_key(), "default", "d1", NOON)
    with pytest.raises(TrustError, match="not issued by this fleet"):
        office.renew(fake, thief, credentials.new_key())


def test_expired_certificate_renews_until_its_grace_is_over(office: Office) -> None:
    key = credentials.new_key()
    first = office.enrol(office.token(), key)
    office.now = first.not_valid_after_utc + GRACE
    office.renew(first, key, credentials.new_key())
    office.now += timedelta(seconds=1)
    with pytest.raises(TrustError, match="enrol the device again"):
        office.renew(first, key, credentials.new_key())


def test_key_that_is_used_after_its_successor_is_seen_as_a_copy(office: Office) -> None:
    key, new = credentials.new_key(), credentials.new_key()
    first = office.enrol(office.token(), key)
    second = office.renew(first, key, new)
    with pytest.raises(TrustError, match="not signed"):
        office.confirm(second, key)
    office.confirm(second, new)
    with pytest.raises(TrustError, match="its key may have been copied"):
        office.renew(first, key, credentials.new_key())
    office.renew(second, new, credentials.new_key())


def test_renewals_that_go_astray_are_bounded(office: Office) -> None:
    key = credentials.new_key()
    first = office.enrol(office.token(), key)
    for _ in range(MAX_SUCCESSORS):
        office.renew(first, key, credentials.new_key())
    with pytest.raises(TrustError, match=f"renewed one certificate {MAX_SUCCESSORS} times"):
        office.renew(first, key, credentials.new_key())


def test_revoked_device_is_on_the_signed_list_until_its_certificates_end(office: Office) -> None:
    key, new = credentials.new_key(), credentials.new_key()
    first = office.enrol(office.token(), key)
    second = office.renew(first, key, new)
    token = office.token("d1")
    assert len(office.enrolment.revoke("d1", "keyCompromise")) == 2
    assert office.shut_out == ["d1"]
    assert office.enrolment.admitted() == []
    with pytest.raises(
        TrustError, match="was revoked"
    ):  # what was handed out for it before is worthless as well
        office.enrol(token, credentials.new_key())
    for certificate, holder in ((first, key), (second, new)):
        with pytest.raises(TrustError, match="revoked"):
            office.renew(certificate, holder, credentials.new_key())
    listed = x509.load_pem_x509_crl(office.enrolment.revocation_list()["pem"].encode())
    assert listed.is_signature_valid(office.authority.certificate.public_key())
    assert {f"{entry.serial_number:040x}" for entry in listed} == {_serial(first), _serial(second)}
    office.now = second.not_valid_after_utc + timedelta(seconds=1)
    assert office.serials() == set()
    office.enrol(office.token("d1"), credentials.new_key())  # a new token is the way back
    assert office.enrolment.admitted() == ["d1"]


def test_authority_is_for_its_owner_and_its_passphrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create_authority(tmp_path / "ca", "fleet", NOON, "open sesame")
    key = tmp_path / "ca" / "ca.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert b"ENCRYPTED" in key.read_bytes()
    monkeypatch.setenv("EDGEOPT_KEY_PASSPHRASE", "open sesame")
    assert open_authority(tmp_path / "ca").fingerprint == made.fingerprint
    monkeypatch.setenv("EDGEOPT_KEY_PASSPHRASE", "wrong")
    with pytest.raises(TrustError, match="wrong passphrase"):
        open_authority(tmp_path / "ca")
    with pytest.raises(RecipeError, match="every device trusts it"):
        create_authority(tmp_path / "ca", "fleet", NOON)
    key.chmod(0o644)
    with pytest.raises(StoreError, match="others may read"):
        open_authority(tmp_path / "ca")
    with pytest.raises(StoreError, match="edgeopt fleet ca create"):
        open_authority(tmp_path / "none")


def test_names_that_would_make_two_devices_one_are_refused(office: Office) -> None:
    with pytest.raises(RecipeError, match="64"):
        office.token("x" * 60)
    with pytest.raises(RecipeError, match="device"):
        office.token("a/b")
    with pytest.raises(RecipeError, match="has a dot"):
        Enrolment(office.sessions, office.authority, "a.b", lambda: NOON)


def test_authority_signs_for_servers_and_the_control_plane(office: Office) -> None:
    authority: Authority = office.authority
    pem, _ = authority.issue_server(["broker.example", "10.0.0.1"], NOON)
    found = x509.load_pem_x509_certificate(pem.encode())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["broker.example", "10.0.0.1"]
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    with pytest.raises(RecipeError):
        authority.issue_server([], NOON)
