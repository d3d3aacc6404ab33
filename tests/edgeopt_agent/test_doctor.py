# SPDX-License-Identifier: Apache-2.0
"""`doctor` finds what is really wrong (a clock, a disk, a certificate, a broker) and says what to do about it."""

import datetime as dt
import json
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.doctor import Finding, Verdict, document, examine
from edgeopt_agent.install import install
from edgeopt_agent.store import DeviceRecord, Store
from edgeopt_wire.document import format_moment

Publisher = Any
NOW = dt.datetime.now(dt.UTC)


def _found(found: list[Finding], check: str) -> list[Finding]:
    return [entry for entry in found if entry.check == check]


@pytest.fixture
def config(tmp_path: Path, publisher: Publisher) -> AgentConfig:
    publisher.add("1")
    keys = {"kind": "folder", "path": str(publisher.repository)}
    return AgentConfig("d1", "host", str(tmp_path / "state"), str(publisher.root), keys)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(folder: Path, name: str, ends: dt.datetime, issuer: Any = None) -> tuple[Path, Path, Any]:
    """A key and a certificate of `issuer` (None: of itself, an authority), for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer, by = issuer or (key, _name(name))
    import ipaddress

    made = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - dt.timedelta(days=400))
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    paths[1].write_bytes(private)
    return *paths, (key, made.subject)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Any]:
    """Start a TLS server of a given certificate; returns its port."""
    servers = []

    def start(certificate: Path, key: Path) -> int:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        plain = socket.create_server(("127.0.0.1", 0))
        servers.append(plain)

        def serve() -> None:
            while True:
                try:
                    accepted, _ = plain.accept()
                except OSError:
                    return
                try:
                    context.wrap_socket(accepted, server_side=True).close()
                except OSError:
                    accepted.close()

        threading.Thread(target=serve, daemon=True).start()
        return int(plain.getsockname()[1])

    yield start
    for server in servers:
        server.close()


def _mqtt(config: AgentConfig, port: int, ca: Path, certificate: tuple[Path, Path]) -> AgentConfig:
    keys = {"kind": "mqtt", "host": "127.0.0.1", "port": port, "ca": str(ca)}
    return replace(config, transport={**keys, "certificate": str(certificate[0]), "key": str(certificate[1])})


def test_a_healthy_device_has_nothing_to_do_but_start_its_agent(
    config: AgentConfig, publisher: Publisher
) -> None:
    install(config, publisher.repository, model="", version="", unsigned=False)
    found = examine(config)
    assert {entry.check for entry in found if entry.verdict is not Verdict.OK} <= {"agent", "state directory"}
    assert _found(found, "models")[0].said == "tiny 1 [a]"
    assert document(config, found)["ok"]
    assert json.loads(json.dumps(document(config, found)))["schema"] == "edgeopt.doctor/1"


def test_a_device_that_was_never_started_is_looked_at_without_making_anything(config: AgentConfig) -> None:
    found = examine(config)
    assert "not there yet" in _found(found, "state directory")[0].said
    assert not config.folder.exists()


def test_a_clock_that_cannot_be_is_found(config: AgentConfig) -> None:
    store = Store(config.folder)
    store.save_device(DeviceRecord(newest_moment=format_moment(NOW.replace(microsecond=0))))
    for wrong in (dt.datetime(1970, 1, 1, 0, 3, tzinfo=dt.UTC), dt.datetime(2100, 1, 1, tzinfo=dt.UTC)):
        (found,) = _found(examine(config, lambda wrong=wrong: wrong), "clock")
        assert found.verdict is Verdict.WARNING
        assert "timedatectl" in found.advice
    (found,) = _found(examine(config), "clock")
    assert found.verdict is Verdict.OK


def test_a_root_of_trust_that_is_none_and_a_slot_that_lost_its_mark_are_found(
    config: AgentConfig, publisher: Publisher, tmp_path: Path
) -> None:
    install(config, publisher.repository, model="", version="", unsigned=False)
    (config.folder / "models/tiny/A/.whole").unlink()
    wrong = tmp_path / "root.json"
    wrong.write_text("{}")
    found = examine(replace(config, root=str(wrong)))
    assert _found(found, "root of trust")[0].verdict is Verdict.FAILED
    (model,) = _found(found, "models")
    assert (model.verdict, "not whole" in model.said) == (Verdict.FAILED, True)


def test_records_that_were_set_aside_are_told(config: AgentConfig, publisher: Publisher) -> None:
    install(config, publisher.repository, model="", version="", unsigned=False)
    shutil.copy(config.folder / "models/tiny/state-0.json", config.folder / "models/tiny/state-0.json.bad")
    assert any("set aside" in entry.said for entry in _found(examine(config), "state directory"))


def test_a_broker_that_is_away_and_one_of_another_authority_get_different_advice(
    config: AgentConfig, tmp_path: Path, listener: Any
) -> None:
    far = NOW + dt.timedelta(days=365)
    ca, _, authority = _certificate(tmp_path, "ca", far)
    other, _, _ = _certificate(tmp_path, "other", far)
    server = _certificate(tmp_path, "server", far, authority)
    mine = _certificate(tmp_path, "device", far, authority)
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()[1]
    (away,) = _found(examine(_mqtt(config, closed, ca, mine[:2])), "broker")
    assert (away.verdict, "firewall" in away.advice) == (Verdict.FAILED, True)
    port = listener(*server[:2])
    (fine,) = _found(examine(_mqtt(config, port, ca, mine[:2])), "broker")
    assert (fine.verdict, "TLSv1" in fine.said) == (Verdict.OK, True)
    (foreign,) = _found(examine(_mqtt(config, port, other, mine[:2])), "broker")
    assert (foreign.verdict, "did not sign" in foreign.advice) == (Verdict.FAILED, True)


def test_certificates_that_end_soon_or_have_ended_are_told_apart(
    config: AgentConfig, tmp_path: Path, listener: Any
) -> None:
    far = NOW + dt.timedelta(days=365)
    ca, _, authority = _certificate(tmp_path, "ca", far)
    port = listener(*_certificate(tmp_path, "server", NOW - dt.timedelta(days=1), authority)[:2])
    soon = _certificate(tmp_path, "soon", NOW + dt.timedelta(days=3), authority)
    found = examine(_mqtt(config, port, ca, soon[:2]))
    assert _found(found, "certificate")[0].verdict is Verdict.WARNING
    assert "clock" in _found(found, "broker")[0].advice
    gone = _certificate(tmp_path, "gone", NOW - dt.timedelta(days=3), authority)
    (expired,) = _found(examine(_mqtt(config, port, ca, gone[:2])), "certificate")
    assert (expired.verdict, "enrol" in expired.advice) == (Verdict.FAILED, True)
