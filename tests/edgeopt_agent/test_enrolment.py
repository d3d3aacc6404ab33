# SPDX-License-Identifier: Apache-2.0
"""Power fails at each write of enrolment and renewal, brokers refuse, clocks lie: the old pair or the new one, never a mix."""

import json
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from publishing import Publisher

from edgeopt.fleet.authority import create_authority
from edgeopt.fleet.database import engine_of, open_database, sqlite_url
from edgeopt.fleet.enrol_app import make_enrol_app
from edgeopt.fleet.enrolment import Enrolment
from edgeopt_agent import credentials, enrol, renewal
from edgeopt_agent.config import load_config
from edgeopt_agent.credentials import read_pair
from edgeopt_agent.endpoint import RefusedError
from edgeopt_agent.enrol import Wish
from edgeopt_agent.renewal import Renewal, read_progress
from edgeopt_agent.renewing import OFFLINE_S, Renewing, Session
from edgeopt_agent.trusted_time import BUILT_AT, TrustedClock
from edgeopt_wire.errors import TransportError, TrustError

NOW = datetime.now(UTC).replace(microsecond=0)


class Cut(BaseException):
    """Power fails here."""


class Endpoint:
    """A real enrolment endpoint with TLS on loopback, on a real database, with a clock that the test turns."""

    def __init__(self, folder: Path, root: bytes) -> None:
        import base64

        self.now = NOW
        self.sessions = open_database(sqlite_url(folder))
        self.authority = create_authority(folder / "ca", "fleet", NOW)
        self.ca = folder / "ca" / "ca.pem"
        self.enrolment = Enrolment(self.sessions, self.authority, "default", lambda: self.now)
        certificate, key = self.authority.issue_server(["localhost"], NOW)
        (folder / "server.pem").write_bytes(certificate.encode() + key)
        facts = {"root": base64.b64encode(root).decode(), "mqtt_host": "localhost", "mqtt_port": 8883}
        app = make_enrol_app(self.enrolment, lambda: facts)
        config = uvicorn.Config(app, port=0, log_level="error", ssl_certfile=folder / "server.pem")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"https://localhost:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def token(self, device: str = "d1") -> str:
        made = self.enrolment.make_token(
            device=device, device_class="host", stand_in=False, ttl=timedelta(hours=1)
        )
        return str(made["token"])

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        engine_of(self.sessions).dispose()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    publisher = Publisher(tmp_path_factory.mktemp("publisher"), NOW)
    publisher.add("1")
    return publisher.root.read_bytes()


@pytest.fixture
def endpoint(tmp_path: Path, root: bytes) -> Iterator[Endpoint]:
    made = Endpoint(tmp_path, root)
    yield made
    made.close()


@pytest.fixture
def wish(tmp_path: Path, endpoint: Endpoint) -> Wish:
    return Wish(tmp_path / "device" / "agent.json", endpoint.url, ca=endpoint.ca)


def make_renewal(wish: Wish, trial: Any = lambda pair, known: None, tell: Any = lambda body: None) -> Renewal:
    config = load_config(wish.config)
    folder = Path(config.transport["certificate"]).parent
    return Renewal(
        folder, wish.server, Path(config.enrolment.ca), tenant="default", device="d1", trial=trial,
        certain=lambda: BUILT_AT, tell=tell,
    )  # fmt: skip


def is_whole(path: Path) -> bool:
    """Whether a file's key is its certificate's, as a TLS library sees it."""
    ssl.create_default_context().load_cert_chain(path)
    pair = read_pair(path)
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    return bool(
        pair.key.public_key().public_bytes(*form) == pair.certificate.public_key().public_bytes(*form)
    )


def cut_at(monkeypatch: pytest.MonkeyPatch, number: int, *, before: bool) -> None:
    """Let power fail around the n-th durable write."""
    real = credentials.write_durably
    count = iter(range(1000))

    def write(path: Path, content: bytes) -> None:
        mine = next(count)
        if mine == number and before:
            raise Cut
        real(path, content)
        if mine == number:
            raise Cut

    for module in (credentials, enrol, renewal):
        monkeypatch.setattr(module, "write_durably", write)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", range(5))
def test_enrolment_cut_at_any_write_is_finished_by_the_same_token(
    endpoint: Endpoint, wish: Wish, number: int, before: bool
) -> None:
    token = endpoint.token()
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, number, before=before)
        with pytest.raises(Cut):
            enrol.enrol(wish, token)
    if wish.config.exists():  # whoever finds a configuration finds all that it names
        assert is_whole(Path(load_config(wish.config).transport["certificate"]))
    done = enrol.enrol(wish, token)
    config = load_config(wish.config)
    assert is_whole(done.identity)
    assert Path(config.root).is_file()
    assert Path(str(config.transport["ca"])).read_text() == endpoint.authority.pem
    assert not list((wish.config.parent / "state" / "enrolment").glob("pending.key"))
    assert len(endpoint.enrolment.certificates()["certificates"]) == 1


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", range(2))
def test_renewal_cut_at_any_write_leaves_a_whole_pair_and_goes_on(
    endpoint: Endpoint, wish: Wish, number: int, before: bool
) -> None:
    old = enrol.enrol(wish, endpoint.token())
    endpoint.now += timedelta(days=61)
    made = make_renewal(wish)
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, number, before=before)
        with pytest.raises(Cut):
            made.renew(endpoint.now)
    assert is_whole(made.path)
    assert made.pair().serial == old.pair.serial
    pair = made.renew(endpoint.now)
    assert is_whole(made.path)
    assert made.pair().serial == pair.serial != old.pair.serial
    assert made.confirm()
    with pytest.raises(RefusedError, match="may have been copied"):
        _renew_with(wish, endpoint, old.pair)


def _renew_with(wish: Wish, endpoint: Endpoint, pair: Any) -> None:
    """Somebody has a copy of the old pair."""
    folder = wish.config.parent / "copy"
    folder.mkdir()
    (folder / "identity.pem").write_bytes(pair.pem)
    Renewal(
        folder, wish.server, endpoint.ca, tenant="default", device="d1", trial=lambda pair, known: None,
        certain=lambda: BUILT_AT,
    ).renew(NOW)  # fmt: skip


@pytest.mark.parametrize("error", [TransportError("away"), TrustError("not taken")])
def test_pair_that_the_broker_has_not_taken_replaces_nothing(
    endpoint: Endpoint, wish: Wish, error: Exception
) -> None:
    old = enrol.enrol(wish, endpoint.token())
    told: list[dict[str, Any]] = []
    endpoint.now += timedelta(days=61)
    answers: list[Exception | None] = [error, error, None]

    def trial(pair: Path, known: str) -> None:
        if (found := answers.pop(0)) is not None:
            raise found

    made = make_renewal(wish, trial, told.append)
    for _ in range(2):
        with pytest.raises(type(error)):
            made.renew(endpoint.now)
        assert made.pair().serial == old.pair.serial
    assert read_progress(made.folder).error == str(error)
    made.renew(endpoint.now)  # the same next pair is tried again, no other is asked for
    assert len(endpoint.enrolment.certificates()["certificates"]) == 2
    assert [body["what"] for body in told] == ["renewal-failed", "renewed"]


def test_device_that_slept_past_the_end_or_does_not_know_the_time_comes_back(
    endpoint: Endpoint, wish: Wish
) -> None:
    """The clock says that all is well; the broker is there and does not take the certificate: so it is renewed."""
    old = enrol.enrol(wish, endpoint.token())
    endpoint.now = old.pair.expires_at + timedelta(days=30)
    seconds, refused = [0.0], [True]

    def trial(pair: Path, known: str) -> None:
        if refused and read_pair(pair).serial == old.pair.serial:
            raise TrustError("certificate expired")

    made = make_renewal(wish, trial)
    clock = TrustedClock(lambda: datetime(1970, 1, 1, tzinfo=UTC), elapsed=lambda: seconds[0])
    reconnected: list[float] = []
    session = Session(lambda: False, lambda: False, lambda: reconnected.append(seconds[0]))
    renewing = Renewing(made, clock, session, elapsed=lambda: seconds[0])
    assert not renewing.step()
    seconds[0] += OFFLINE_S + 1
    assert renewing.step()
    assert made.pair().expires_at > endpoint.now
    assert reconnected == [seconds[0]]
    seconds[0] += OFFLINE_S + 1
    assert not renewing.step()


def test_outage_of_the_broker_and_a_clock_ahead_make_nobody_renew_again_and_again(
    endpoint: Endpoint, wish: Wish
) -> None:
    enrol.enrol(wish, endpoint.token())
    seconds = [0.0]

    def away(pair: Path, known: str) -> None:
        raise TransportError("away")

    session = Session(lambda: False, lambda: False, lambda: None)
    clock = TrustedClock(lambda: NOW, elapsed=lambda: seconds[0])
    renewing = Renewing(make_renewal(wish, away), clock, session, elapsed=lambda: seconds[0])
    for _ in range(50):
        seconds[0] += OFFLINE_S
        assert not renewing.step()
    assert len(endpoint.enrolment.certificates()["certificates"]) == 1
    ahead = TrustedClock(lambda: NOW + timedelta(days=4000), elapsed=lambda: seconds[0])
    online = Session(lambda: True, lambda: False, lambda: None)
    hasty = Renewing(make_renewal(wish), ahead, online, elapsed=lambda: seconds[0])
    assert [hasty.step() for _ in range(5)] == [True, False, False, False, False]
    ahead.learn(NOW)  # the director's word outdoes the wall clock
    seconds[0] += timedelta(days=30).total_seconds()
    assert not hasty.step()


def test_old_configuration_keeps_what_is_not_about_the_connection(endpoint: Endpoint, wish: Wish) -> None:
    enrol.enrol(wish, endpoint.token())
    before = json.loads(wish.config.read_text())
    wish.config.write_text(json.dumps({**before, "service_report_s": 77}))
    enrol.enrol(wish, endpoint.token())
    after = json.loads(wish.config.read_text())
    assert after["service_report_s"] == 77
    assert after["transport"]["certificate"] != before["transport"]["certificate"]
    assert not Path(before["transport"]["certificate"]).exists()
    with pytest.raises(RefusedError, match="is for d2, and this is d1"):
        enrol.enrol(wish, endpoint.token("d2"))
