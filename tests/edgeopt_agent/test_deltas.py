# SPDX-License-Identifier: Apache-2.0
"""A device that has an earlier version gets what differs; whatever is wrong with that, it gets the package."""

import queue
import shutil
from pathlib import Path
from typing import Any

import device_lives
import numpy as np
import pytest
from device_lives import quick_probe, serves, wish

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.loop import Agent
from edgeopt_agent.main import make_agent
from edgeopt_agent.store import Store
from edgeopt_agent.transports import Inbox
from edgeopt_agent.transports.memory import MemoryTransport
from edgeopt_wire.index import PackageIndex, deltas_of

Publisher = Any
PADDING = np.random.default_rng(0).bytes(400_000)


class Site:
    """A device on a transport in memory; versions 1 and 2 of a model share nearly everything."""

    def __init__(self, folder: Path, publisher: Publisher) -> None:
        self.folder = folder
        self.publisher = publisher
        self.revision = 0
        self.indexes: dict[str, PackageIndex] = {}
        for version in ("1", "2"):
            self.add(version, PADDING)
        self.start()

    def add(self, version: str, padding: bytes) -> None:
        work = self.publisher.folder / f"package-{version}"
        work.mkdir(parents=True)
        (work / "padding.bin").write_bytes(padding)
        self.indexes[version] = self.publisher.add(version)

    def start(self) -> None:
        inbox: Inbox = queue.Queue()
        config = AgentConfig(
            "d1", "host", str(self.folder / "state"), str(self.publisher.root), {"kind": "folder"}
        )
        self.transport = MemoryTransport(inbox, self.publisher.files(), self.publisher.blobs())
        self.agent: Agent = make_agent(config, Store(config.folder), self.transport, inbox)
        self.agent.installer.probe = quick_probe
        self.seconds = [0.0]
        self.agent._monotonic = lambda: self.seconds[0]
        self.agent.start()

    def want(self, version: str) -> int:
        """Install it; returns how many chunks were pulled for it."""
        self.revision += 1
        before = len(self.transport.pulled)
        wish(self.agent, self.publisher.desire(self.revision, version), self.seconds)
        return len(self.transport.pulled) - before


@pytest.fixture
def site(tmp_path: Path, publisher: Publisher) -> Site:
    made = Site(tmp_path, publisher)
    assert made.want("1") == len(made.indexes["1"].chunks) == 7
    return made


def test_the_next_version_comes_as_what_differs(site: Site) -> None:
    (delta,) = deltas_of(site.indexes["2"]).values()
    assert delta.size_bytes < 0.02 * site.indexes["2"].size_bytes
    assert site.want("2") == len(delta.chunks) == 1
    assert serves(site.agent) == "2"
    assert not list((site.folder / "state/incoming").iterdir()), "nothing of the delta stays"


def test_the_way_back_needs_nothing_while_the_package_is_here(site: Site) -> None:
    site.want("2")
    assert site.want("1") == 0
    assert serves(site.agent) == "1"


def test_the_way_back_needs_the_package_where_the_disk_lost_it(site: Site) -> None:
    site.want("2")
    site.agent.store.packages.forget([site.indexes["1"].sha256])
    assert site.want("1") == 7, "the index of version 1 knew nothing of version 2"
    assert serves(site.agent) == "1"


def test_a_delta_that_is_damaged_or_gone_or_of_another_base_costs_the_whole_package(site: Site) -> None:
    slot = site.agent.store.slot("tiny", "A")
    (slot / "padding.bin").write_bytes(PADDING[::-1])  # the disk lies about what the slot holds
    assert site.want("2") == 1 + 7
    assert serves(site.agent) == "2"


def test_a_control_plane_that_does_not_give_deltas_gives_the_package(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeopt_wire.errors import NotOfferedError

    real = site.transport.pull
    (delta,) = deltas_of(site.indexes["2"]).values()

    def pull(index: PackageIndex, *arguments: Any) -> None:
        if index.sha256 == delta.sha256:
            raise NotOfferedError("not for this device")
        real(index, *arguments)

    monkeypatch.setattr(site.transport, "pull", pull)
    assert site.want("2") == 7
    assert serves(site.agent) == "2"


def test_a_link_that_is_cut_in_a_delta_goes_on_in_the_delta(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("3", PADDING[:200_000] + np.random.default_rng(1).bytes(200_000))
    site.start()
    delta = deltas_of(site.indexes["3"])[site.indexes["1"].sha256]
    count = len(delta.chunks)
    assert count >= 3
    real, cuts = site.transport.spoil, [2]

    def spoil(number: int, chunk: bytes) -> bytes:
        if number >= 2 and cuts:
            cuts.pop()
            site.transport.is_away = True
            return b""
        return chunk

    assert real is None
    site.transport.spoil = spoil
    site.revision += 1
    wanted = site.publisher.desire(site.revision, "3")
    monkeypatch.setattr(device_lives, "TICKS", 5)
    wish(site.agent, wanted, site.seconds)
    assert serves(site.agent) == "1"
    site.transport.is_away = False
    pulled = len(site.transport.pulled)
    wish(site.agent, wanted, site.seconds)
    assert serves(site.agent) == "3"
    assert len(site.transport.pulled) - pulled == count - 2


def test_a_slot_that_is_not_whole_is_no_base(site: Site) -> None:
    shutil.rmtree(site.agent.store.slot("tiny", "A"))
    assert site.want("2") == 7
    assert serves(site.agent) == "2"
