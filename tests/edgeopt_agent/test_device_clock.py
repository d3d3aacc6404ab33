# SPDX-License-Identifier: Apache-2.0
"""Boards whose clock is wrong: at 1970 or 2100, jumping, or a little ahead, with and without a director who can tell."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from publishing import Publisher
from tuf_site import FASTER, Site

from edgeopt.fleet.broker import EmbeddedBroker, free_port
from edgeopt_agent.transports import mqtt as transport_module
from edgeopt_agent.trusted_time import BUILT_AT, LIFETIME, TrustedClock
from edgeopt_wire.document import format_moment

IN_1970 = datetime(1970, 1, 2, tzinfo=UTC)
IN_2100 = datetime(2100, 1, 1, tzinfo=UTC)
NOW = datetime(2027, 5, 1, 12, tzinfo=UTC)


class Elapsed:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize("wall", [IN_1970, IN_2100, BUILT_AT - timedelta(days=1), BUILT_AT + 2 * LIFETIME])
def test_clock_that_cannot_be_right_counts_as_none(wall: datetime) -> None:
    clock = TrustedClock(lambda: wall)
    assert (clock.now(), clock.is_known) == (BUILT_AT, False)
    assert TrustedClock(lambda: wall, lambda: format_moment(NOW)).now() == NOW
    clock.learn(NOW)
    assert (clock.now(), clock.is_known) == (NOW, True)


def test_time_goes_on_from_the_signed_moment_whatever_the_wall_clock_does() -> None:
    elapsed, walls = Elapsed(), [IN_1970]
    clock = TrustedClock(lambda: walls[0], lambda: "", elapsed)
    clock.learn(NOW)
    for wall in (IN_1970, IN_2100, NOW - timedelta(days=300), BUILT_AT):
        walls[0] = wall
        elapsed.seconds += 3600
        assert clock.now() == NOW + timedelta(seconds=elapsed.seconds)
    assert clock.ahead_by is not None
    assert clock.ahead_by < timedelta(0)


def test_older_signed_moment_changes_nothing() -> None:
    elapsed = Elapsed()
    clock = TrustedClock(lambda: IN_1970, lambda: "", elapsed)
    clock.learn(NOW)
    elapsed.seconds = 60
    clock.learn(NOW + timedelta(seconds=30))
    assert clock.now() == NOW + timedelta(seconds=60)


def test_clock_that_jumped_ahead_and_came_back_leaves_no_trace() -> None:
    walls = [NOW]
    clock = TrustedClock(lambda: walls[0], lambda: format_moment(NOW))
    walls[0] = NOW + timedelta(days=900)
    assert clock.now() == walls[0]
    walls[0] = NOW + timedelta(minutes=1)
    assert clock.now() == walls[0]


@pytest.fixture
def site(tmp_path: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(transport_module, "REPLY_TIMEOUT_S", 1.0)
    broker = EmbeddedBroker(tmp_path, free_port())
    broker.start()
    made = Site(tmp_path, broker.port, publisher)
    yield made
    made.close()
    broker.stop()


def forget(site: Site, wall: datetime) -> None:
    """A fresh start of a board without battery, whose record was lost too."""
    site.device.stop()
    (site.device.config.folder / "device.json").unlink()
    site.now = wall
    site.device.boot()


@pytest.mark.flow
@pytest.mark.parametrize("wall", [IN_1970, IN_2100], ids=["1970", "2100"])
def test_board_without_a_clock_learns_the_time_and_installs(site: Site, wall: datetime) -> None:
    forget(site, wall)
    started = site.device.seconds()
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")
    assert (site.device.seconds() - started) / FASTER < 60
    assert abs(site.device.clock.now() - site.publisher.now) < timedelta(minutes=5)
    assert site.device.store.load_device().newest_moment >= format_moment(site.publisher.now)


@pytest.mark.flow
@pytest.mark.parametrize("wall", [IN_1970, IN_2100], ids=["1970", "2100"])
def test_board_without_a_clock_whom_nobody_tells_the_time_installs_nothing_and_serves(
    site: Site, wall: datetime
) -> None:
    """Somebody who swallows the answers and repeats old metadata for ever gains nothing but delay."""
    site.source.tell_time = lambda nonce: None
    forget(site, wall)
    site.want("2")
    site.device.run_until(lambda: "nobody signed the time" in site.device.error, "the reason")
    assert site.device.serves() == "1"
    site.source.be_honest()
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")


@pytest.mark.flow
def test_signed_time_ends_a_freeze_that_the_floor_alone_would_not_see(site: Site) -> None:
    """A board at 1970 and metadata of half a year ago: only the director's word tells that it is old."""
    frozen = dict(site.source.files)
    forget(site, IN_1970)
    site.publisher.now += timedelta(days=180)
    site.source.files = frozen
    site.want("2")
    site.device.run_until(
        lambda: "dated" in " ".join(site.alarms()) or "expired" in site.device.agent.unread_because,
        "the reason",
    )
    assert site.device.serves() == "1"
    site.publisher.freshen()
    site.source.be_honest()
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")


@pytest.mark.flow
def test_clock_ahead_blocks_new_installs_only_and_converges_within_a_minute_of_being_right(
    site: Site,
) -> None:
    right = site.now
    site.now += timedelta(days=800)
    site.want("2")
    site.device.run_until(lambda: "expired" in site.device.agent.unread_because, "the reason")
    pauses = site.device.agent._unread_pause
    site.device.run_until(lambda: pauses.seconds >= 60, "pauses are at their longest")
    assert site.device.serves() == "1"
    site.now = right
    started = time.monotonic()
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")
    at_most = 60 / FASTER + 8  # one pause, and eight real seconds for a loaded machine's network and disk
    assert time.monotonic() - started < at_most


@pytest.mark.flow
def test_clock_that_jumps_all_the_time_neither_stops_serving_nor_moves_the_floor(site: Site) -> None:
    right = site.now
    floor = site.device.store.load_device().newest_moment
    for wall in (IN_1970, right + timedelta(days=400), IN_2100, right - timedelta(days=20)):
        site.now = wall
        site.device.run_for(0.2)
        assert site.device.serves() == "1"
    assert site.device.store.load_device().newest_moment <= max(floor, format_moment(site.publisher.now))
    site.now = right
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")


MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
needs = pytest.mark.skipif(
    not (MOSQUITTO and shutil.which("openssl") and shutil.which("faketime")),
    reason="needs mosquitto, openssl and faketime",
)


def certificates(folder: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "30", "-subj", "/CN=authority"
    )
    openssl("req", *key, "-keyout", "host.key", "-out", "host.csr", "-subj", "/CN=localhost")
    (folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl(
        "x509", "-req", "-in", "host.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30",
        "-extfile", "san", "-out", "host.crt",
    )  # fmt: skip


@needs
@pytest.mark.flow
@pytest.mark.parametrize("wall", ["1970-01-02 00:00:00", "2100-01-01 00:00:00"])
def test_real_process_at_a_wrong_clock_connects_over_tls_and_refuses_another_authority(
    tmp_path: Path, wall: str
) -> None:
    certificates(tmp_path)
    port = free_port()
    (tmp_path / "mosquitto.conf").write_text(
        f"user root\nlistener {port} 127.0.0.1\nallow_anonymous true\n"
        f"cafile {tmp_path}/ca.crt\ncertfile {tmp_path}/host.crt\nkeyfile {tmp_path}/host.key\n"
    )
    other = tmp_path / "other"
    other.mkdir()
    certificates(other)
    script = """
import queue, sys, time
from edgeopt_agent.main import utc_now
from edgeopt_agent.transports import Identity
from edgeopt_agent.transports.mqtt import MqttOptions, MqttTransport
from edgeopt_agent.trusted_time import TrustedClock
inbox = queue.Queue()
transport = MqttTransport(MqttOptions("localhost", int(sys.argv[1]), ca=sys.argv[2]), Identity("default", "d1", "s", "0"), inbox)
transport.use_clock(TrustedClock(utc_now))
transport.start()
print(utc_now().year, "online" if transport._online.wait(4) else "refused")
"""

    def run(ca: Path) -> list[str]:
        done = subprocess.run(
            ["faketime", wall, sys.executable, "-c", script, str(port), str(ca)],
            capture_output=True, text=True, check=True, timeout=60, env={**os.environ, "DONT_FAKE_MONOTONIC": "1"},
        )  # fmt: skip
        return done.stdout.split()

    broker: Any = subprocess.Popen(
        [MOSQUITTO, "-c", str(tmp_path / "mosquitto.conf")], stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(0.5)
        assert run(tmp_path / "ca.crt") == [wall[:4], "online"]
        assert run(other / "ca.crt") == [wall[:4], "refused"]
    finally:
        broker.kill()
        broker.wait(10)
