# SPDX-License-Identifier: Apache-2.0
"""A device behind a line that is cut, goes silent, loses, repeats and reorders: it installs, and what it says converges."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from publishing import Publisher
from tcp_proxy import UP, Shuffle, TcpProxy
from tuf_site import Site

from edgeopt.fleet.broker import EmbeddedBroker, free_port
from edgeopt_agent.transports import mqtt as transport_module

pytestmark = pytest.mark.flow
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[TcpProxy]:
    broker = EmbeddedBroker(tmp_path, free_port())
    broker.start()
    with TcpProxy(broker.port) as made:
        yield made
    broker.stop()


@pytest.fixture
def site(
    tmp_path: Path, publisher: Publisher, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """The device is behind the proxy, the other side is not; waits are short."""
    for name, seconds in {
        "REPLY_TIMEOUT_S": 0.5, "CHUNK_TIMEOUT_S": 0.2, "MAX_DELAY_S": 0.3, "CONNECT_TIMEOUT_S": 0.5,
        "ANSWER_S": 0.5, "WATCH_S": 0.1,
    }.items():  # fmt: skip
        monkeypatch.setattr(transport_module, name, seconds)
    made = Site(tmp_path, proxy.target_port, publisher)
    made.device.stop()
    made.device.port = proxy.port
    made.device.boot()
    yield made
    proxy.speak()
    made.close()


def converges(site: Site) -> None:
    """Version 2 serves, and the newest report that arrived is what the device says of itself."""
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")

    def agree() -> bool:
        said = site.device.agent.reported()
        return bool(site.source.reports) and site.source.reports[-1].models == said.models

    site.device.run_until(lambda: not site.device.agent.is_busy and agree(), "the report arrives")
    site.device.run_until(lambda: len(site.device.agent.outbox) == 0, "the events are acknowledged")
    sequences = [event.sequence for event in site.source.events]
    assert set(sequences) == set(range(1, max(sequences) + 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_link_that_is_cut_again_and_again_delays_and_spoils_nothing(
    site: Site, proxy: TcpProxy, seed: int
) -> None:
    chance = random.Random(seed)
    site.want("2")
    for _ in range(8):
        site.device.run_for(chance.uniform(0.0, 0.15))
        proxy.cut()
    converges(site)


def test_link_that_is_down_for_a_while_is_taken_up_again(site: Site, proxy: TcpProxy) -> None:
    proxy.refuse()
    site.want("2")
    site.device.run_for(1.0)
    assert site.device.serves() == "1"
    proxy.accept()
    converges(site)


def test_peer_that_falls_silent_without_a_word_is_noticed_and_left(site: Site, proxy: TcpProxy) -> None:
    """Half-open: the connection stands, and nothing comes any more."""
    site.device.run_until(lambda: site.device.transport.is_online, "online")
    proxy.silence()
    site.device.transport.report(site.device.agent.reported())
    started = time.monotonic()
    while site.device.transport.is_online:
        assert time.monotonic() - started < transport_module.ANSWER_S + 2
        time.sleep(0.02)
    site.want("2")
    site.device.run_for(0.5)
    proxy.cut()
    proxy.speak()
    converges(site)


@pytest.mark.parametrize("seed", SEEDS)
def test_messages_lost_repeated_and_out_of_order_change_nothing(
    site: Site, proxy: TcpProxy, seed: int
) -> None:
    shuffle = Shuffle(random.Random(seed), lose=0.02, repeat=0.25, swap=0.15)
    proxy.filter = shuffle
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves", 60)
    proxy.filter = None
    converges(site)
    assert sum(shuffle.done.values()) > 5


def test_device_that_is_silent_for_long_costs_a_few_bytes(site: Site, proxy: TcpProxy) -> None:
    site.device.run_until(lambda: len(site.device.agent.outbox) == 0, "nothing waits")
    site.device.run_for(0.3)
    before = proxy.bytes[UP]
    site.device.run_for(2.0)
    assert proxy.bytes[UP] == before
