# SPDX-License-Identifier: Apache-2.0
"""A device's life with certificates, in real processes: token, enrolment, broker, renewal, revocation, and lies on the way."""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from publishing import Publisher

from edgeopt.fleet.authority import create_authority

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = [
    pytest.mark.flow,
    pytest.mark.skipif(MOSQUITTO is None, reason="needs mosquitto: apt-get install mosquitto"),
]
BIN = Path(sys.executable).parent
WAIT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(claim: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> Any:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.CalledProcessError, json.JSONDecodeError, OSError):
            if found := claim():
                return found
        time.sleep(0.1)
    raise AssertionError(f"not within {wait_s:.0f} s: {what}")


@dataclass
class Site:
    """A fleet with an authority, a Mosquitto that asks for certificates, and the devices that enrol."""

    folder: Path
    publisher: Publisher
    http: int = field(default_factory=free_port)
    mqtt: int = field(default_factory=free_port)
    enrol: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    @property
    def server(self) -> str:
        return f"https://localhost:{self.enrol}"

    def run(self, program: str, *args: str | Path, check: bool = True, text: str = "") -> Any:
        command = [BIN / program, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=check, timeout=100, input=text)

    def ask(self, program: str, *args: str | Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(program, *args, "--json").stdout)
        return found

    def fleet(self, *args: str | Path) -> dict[str, Any]:
        return self.ask("edgeopt", "fleet", *args, "--fleet", self.url)

    def spawn(self, name: str, *command: str | Path) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)

    def stop(self, name: str) -> int:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(30)

    def start(self, *options: str) -> None:
        self.ask("edgeopt", "fleet", "ca", "create", self.folder / "ca")
        self.ask("edgeopt", "fleet", "broker", self.folder / "broker", "--authority", self.folder / "ca",
                 "--host", "localhost", "--host", "127.0.0.1", "--port", str(self.mqtt))  # fmt: skip
        assert MOSQUITTO is not None
        self.spawn("broker", MOSQUITTO, "-c", self.folder / "broker" / "mosquitto.conf")
        until(
            lambda: socket.create_connection(("127.0.0.1", self.mqtt), 1).close() is None,
            "the broker listens",
        )
        self.spawn(
            "fleet", BIN / "edgeopt", "fleet", "up", "--dir", self.folder / "fleet", "--repository",
            self.publisher.repository, "--keys", self.publisher.keys, "--http-port", str(self.http),
            "--broker", f"mqtts://localhost:{self.mqtt}", "--broker-files", self.folder / "broker",
            "--authority", self.folder / "ca", "--enrol-port", str(self.enrol), *options,
        )  # fmt: skip
        until(lambda: self.fleet("devices"), "the fleet answers")

    def token(self, device: str, **more: str) -> dict[str, Any]:
        options = [text for key, value in more.items() for text in (f"--{key}", value)]
        return self.fleet("token", "--class", "host", "--device", device, *options)

    def enroll(self, device: str, token: dict[str, Any], *more: str, check: bool = True) -> Any:
        return self.run(
            "edgeopt-agent", "enroll", "--config", self.config(device), "--server", token["server"],
            "--fingerprint", token["fingerprint"], "--token-file", "-", *more, check=check, text=token["token"],
        )  # fmt: skip

    def config(self, device: str) -> Path:
        return self.folder / device / "agent.json"

    def status(self, device: str) -> dict[str, Any]:
        return self.ask("edgeopt-agent", "status", "--config", self.config(device))

    def row(self, device: str) -> dict[str, Any]:
        return next(row for row in self.fleet("devices")["devices"] if row["id"] == device)

    def log(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-2500:]}" for path in self.folder.glob("*.log")
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    publisher = Publisher(tmp_path / "publisher", datetime.now(UTC).replace(microsecond=0))
    publisher.add("1")
    found = Site(tmp_path, publisher)
    yield found
    for process in found.processes.values():
        process.kill()
        process.wait()


@pytest.mark.slow  # half a minute: a certificate must live a while before it is renewed
def test_token_enroll_run_renew_revoke(site: Site) -> None:
    site.start("--certificate-life", "24s")
    token = site.token("bench")
    dry = json.loads(site.enroll("bench", token, "--dry-run", "--json").stdout)
    assert dry["dry_run"]
    assert not site.config("bench").exists()
    done = json.loads(site.enroll("bench", token, "--json").stdout)
    assert (done["schema"], done["device"], done["tenant"]) == ("edgeopt.enrol/1", "bench", "default")
    identity = Path(done["identity"])
    assert identity.stat().st_mode & 0o777 == 0o600
    assert site.row("bench")["certificate"]["serial"] == done["serial"]

    replay = site.enroll("thief", token, check=False)  # another board, another key, the same token
    assert replay.returncode == 1
    assert "was used" in replay.stderr
    assert not site.config("thief").exists()

    site.spawn("agent", BIN / "edgeopt-agent", "run", "--config", site.config("bench"))
    until(lambda: site.row("bench")["online"], f"seen on line\n{site.log()}")

    renewed = until(
        lambda: (s := site.status("bench")["certificate"])["renewed_at"] and s,
        f"renewed by itself\n{site.log()}",
    )
    assert renewed["serial"] != done["serial"]
    assert renewed["renewal_error"] == ""
    until(
        lambda: next(c for c in site.fleet("certificates")["certificates"] if c["by"] == "renewal")[
            "confirmed_at"
        ],
        f"confirmed\n{site.log()}",
    )
    until(lambda: site.row("bench")["online"], "on line with the new pair")
    with contextlib.closing(_database(site)) as database:
        told = until(
            lambda: [
                json.loads(body)
                for (body,) in database.execute("select body from events where kind='certificate'")
            ],
            f"an event tells of it\n{site.log()}",
        )
    assert told[0]["what"] == "renewed"

    site.fleet("revoke", "bench", "--reason", "keyCompromise")
    until(lambda: not site.row("bench")["online"], f"thrown out\n{site.log()}", 10.0)
    assert site.row("bench")["shut_out"]
    refused = site.run("edgeopt-agent", "renew", "--config", site.config("bench"), check=False)
    assert refused.returncode == 1
    assert "was revoked" in refused.stderr
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _connect(site, Path(json.loads(site.config("bench").read_text())["transport"]["certificate"]))
    assert site.stop("agent") == 0
    again = site.token("bench")
    site.enroll("bench", again)
    assert not site.row("bench")["shut_out"]
    assert _connect(site, Path(json.loads(site.config("bench").read_text())["transport"]["certificate"]))


def test_who_has_no_certificate_or_a_foreign_one_or_another_devices_topics_gets_nothing(site: Site) -> None:
    site.start()
    site.enroll("one", site.token("one"))
    site.enroll("two", site.token("two"))
    one = Path(json.loads(site.config("one").read_text())["transport"]["certificate"])
    assert _connect(site, one)
    assert _publish(site, one, "eo/1/default/one/presence", 1) < 0x80
    assert _publish(site, one, "eo/1/default/two/presence", 1) >= 0x80
    assert _publish(site, one, "eo/1/default/one/desired", 1) >= 0x80
    control = site.folder / "broker" / "control.pem"
    for device in ("one", "two"):
        assert _publish(site, control, f"eo/1/default/{device}/ack", 1, retain=True) < 0x80
    # mosquitto takes every subscription and gives what may be read
    assert b"default/one/ack" in (heard := _hear(site, one, "eo/1/default/+/ack"))
    assert b"default/two/ack" not in heard
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _connect(site, None)
    foreign = create_authority(site.folder / "foreign", "edgeopt fleet", datetime.now(UTC))
    pem, key = foreign.issue_control(datetime.now(UTC))
    (site.folder / "foreign.pem").write_bytes(pem.encode() + key)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _connect(site, site.folder / "foreign.pem")


def test_server_with_another_authority_never_hears_the_token(site: Site) -> None:
    """A man in the middle: right name, right port, TLS, and an authority of his own."""
    site.start()
    token = site.token("bench")
    foreign = create_authority(site.folder / "foreign", "edgeopt fleet", datetime.now(UTC))
    heard: list[bytes] = []
    port = _listen(site.folder, foreign, heard)
    for known in (["--fingerprint", token["fingerprint"]], ["--ca", str(site.folder / "ca" / "ca.pem")]):
        done = site.run(
            "edgeopt-agent", "enroll", "--config", site.config("bench"), "--server", f"https://localhost:{port}",
            *known, "--token-file", "-", check=False, text=token["token"],
        )  # fmt: skip
        assert done.returncode == 1
        assert "nothing was said to it" in done.stderr
    assert heard  # the fingerprint's way did ask him for his authority
    assert not [piece for piece in heard if token["token"].encode() in piece]
    assert not site.config("bench").exists()
    site.enroll("bench", token)  # and the token is still good


@contextlib.contextmanager
def _session(site: Site, pair: Path | None) -> Iterator[ssl.SSLSocket]:
    """Speak MQTT over TLS with a pair, under some client id."""
    context = ssl.create_default_context(cafile=site.folder / "ca" / "ca.pem")
    if pair is not None:
        context.load_cert_chain(pair)
    plain = socket.create_connection(("localhost", site.mqtt), 5)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as secure:
        body = b"\0\4MQTT\5\2\0\x1e\0\0\5probe"
        secure.sendall(b"\x10" + bytes([len(body)]) + body)
        if secure.recv(200)[:1] != b"\x20":
            raise ConnectionError("the broker hung up")
        yield secure


def _connect(site: Site, pair: Path | None) -> bool:
    with _session(site, pair):
        return True


def _publish(site: Site, pair: Path, topic: str, number: int, *, retain: bool = False) -> int:
    """Publish at QoS 1; the reason in the broker's acknowledgement."""
    with _session(site, pair) as session:
        body = len(topic).to_bytes(2, "big") + topic.encode() + number.to_bytes(2, "big") + b"\0x"
        session.sendall(bytes([0x33 if retain else 0x32, len(body)]) + body)
        answer = session.recv(200)
        assert answer[0] == 0x40
        return answer[4] if answer[1] > 2 else 0


def _hear(site: Site, pair: Path, topic: str) -> bytes:
    """Subscribe and return everything that comes within a second."""
    heard = b""
    with _session(site, pair) as session:
        body = b"\0\1\0" + len(topic).to_bytes(2, "big") + topic.encode() + b"\0"
        session.sendall(b"\x82" + bytes([len(body)]) + body)
        session.settimeout(1)
        with contextlib.suppress(TimeoutError):
            while piece := session.recv(4096):
                heard += piece
    return heard


def _listen(folder: Path, authority: Any, heard: list[bytes]) -> int:
    """An HTTPS server of another authority that says so and writes down what it hears."""
    certificate, key = authority.issue_server(["localhost"], datetime.now(UTC))
    (folder / "middle.pem").write_bytes(certificate.encode() + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "middle.pem")
    listener = socket.create_server(("127.0.0.1", 0))
    pem = authority.pem.encode()

    def serve() -> None:
        while True:
            plain, _ = listener.accept()
            with contextlib.suppress(OSError), plain, context.wrap_socket(plain, server_side=True) as secure:
                heard.append(secure.recv(65536))
                secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(pem) + pem)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def _database(site: Site) -> Any:
    import sqlite3

    return sqlite3.connect(f"file:{site.folder / 'fleet' / 'fleet.sqlite'}?mode=ro", uri=True)
