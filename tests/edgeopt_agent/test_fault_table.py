# SPDX-License-Identifier: Apache-2.0
"""Faults times phases: whatever happens and whenever, the old model serves, and the new one comes once it is over.

Real keys, repository, trust, store, archive and null runtime; only the network is in memory, and the clock is given.
"""

import errno
import os
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_agent import files, golden, incoming
from edgeopt_agent.config import AgentConfig
from edgeopt_agent.loop import Agent
from edgeopt_agent.model import open_model
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.probe import ProbeRequest
from edgeopt_agent.serve.models import Models
from edgeopt_agent.store import Store
from edgeopt_agent.transports import Inbox
from edgeopt_agent.transports.memory import MemoryTransport
from edgeopt_agent.trust import Trust
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.manifest import Compatible
from edgeopt_wire.measurement import Conditions, Measurement, Timing
from edgeopt_wire.messages import Phase

Publisher = Any
HOUR_S = 3600.0


class PowerCut(BaseException):
    """Not an error that anybody may handle: everything in memory is gone."""


class World:
    """A published repository, a device's disk, and agents that start on it one after the other."""

    def __init__(self, folder: Path, publisher: Publisher) -> None:
        self.publisher = publisher
        self.config = AgentConfig(
            "d1", "host", str(folder / "state"), str(publisher.root), {"kind": "folder"}
        )
        self.seconds = 0.0
        self.revision = 0
        self.probed: list[str] = []
        self.boot()

    def boot(self) -> None:
        """A fresh process on the same disk."""
        inbox: Inbox = queue.Queue()
        store = Store(self.config.folder)
        self.transport = MemoryTransport(inbox, self.publisher.files(), self.publisher.blobs())

        def now() -> Any:
            return self.publisher.now

        self.agent = Agent(
            self.config,
            store,
            self.transport,
            inbox,
            trust=Trust(
                store.folder / "metadata",
                self.publisher.root.read_bytes(),
                self.transport.fetch,
                TrustedClock(now),
            ),
            outbox=Outbox(store.folder / "outbox", "d1"),
            models=Models(store),
            probe=self.probe,
            now=now,
            session="s",
            monotonic=lambda: self.seconds,
        )
        self.agent.start()

    def probe(self, request: ProbeRequest) -> Measurement:
        """The real model against its real golden outputs, in this process and with a given timing."""
        folder = Path(request.folder)
        manifest = self.agent.store.manifest("tiny", folder.name)
        self.probed.append(manifest.version)
        with open_model(folder, manifest, request.variant) as loaded:
            inputs = golden.load_inputs(folder, manifest)
            wanted = golden.load_outputs(folder, manifest, loaded.variant)
            found = [loaded.infer(sample) for sample in inputs]
        is_right = all(
            np.allclose(f["scores"], w["scores"], atol=1e-3) for f, w in zip(found, wanted, strict=True)
        )
        return Measurement(
            package_sha256=request.package_sha256,
            model="tiny",
            version=manifest.version,
            variant=request.variant,
            precision="fp32",
            device_id="d1",
            device_class="host",
            agent_version="0",
            measured_at=self.publisher.now,
            conditions=Conditions("null", "1.0", 1, 1, "cpu", "x", "x", "x"),
            timing=Timing.of([1000] * 10, warmup=1, load_ns=1, first_inference_ns=1),
            golden_ok=is_right,
        )

    def want(self, *versions: str, rollout: str = "") -> None:
        self.revision += 1
        self.transport.want(self.publisher.desire(self.revision, *versions, rollout=rollout))

    def want_again(self, *versions: str, rollout: str = "") -> None:
        """The broker's retained document, after a start."""
        self.transport.want(self.publisher.desire(self.revision, *versions, rollout=rollout))

    def run(self, ticks: int = 40) -> None:
        for _ in range(ticks):
            self.seconds += HOUR_S  # every pause is over
            self.agent.tick()

    def install(self, version: str) -> None:
        self.want(version)
        self.run()

    @property
    def state(self) -> Any:
        return self.agent.states["tiny"]

    def serves(self) -> str:
        """The version that answers a real inference now."""
        image = np.ones((1, 2, 4, 4), np.float32)
        loaded, outputs = self.agent.models.infer("tiny", {"image": image})
        assert outputs["scores"].shape == (1, 4)
        return loaded.manifest.version


@pytest.fixture
def world(tmp_path: Path, publisher: Publisher) -> World:
    publisher.add("1")
    publisher.add("2")
    made = World(tmp_path, publisher)
    made.want("1")
    made.run()
    assert made.serves() == "1"
    return made


def test_without_a_fault_the_new_version_is_committed_and_reported(world: World) -> None:
    world.want("2", rollout="r")
    world.run()
    assert (world.serves(), world.state.phase) == ("2", Phase.COMMITTED)
    last = world.transport.reports[-1].models[0]
    assert (last.version, last.phase, last.rollout) == ("2", Phase.COMMITTED, "r")
    kinds = [event.kind for batch in world.transport.batches for event in batch.events]
    assert {"measurement", "phase"} <= set(kinds)
    assert world.agent.outbox.batch() is None


DISK_CALLS = ("fsync", "replace", "pwrite", "posix_fallocate", "fdatasync")


@contextmanager
def disk_fails(
    monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException, *, once: bool
) -> Iterator[list[int]]:
    """The disk operation number `after` (and, without `once`, every later one) raises `error`."""
    count = [0]

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == after or (not once and count[0] > after):
                raise error
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in DISK_CALLS:
            patch.setattr(os, name, failing(getattr(os, name)))
        patch.setattr(Path, "replace", failing(Path.replace))
        yield count


def disk_operations(world: World, monkeypatch: pytest.MonkeyPatch) -> int:
    with disk_fails(monkeypatch, -1, PowerCut(), once=True) as count:
        world.want("2")
        world.run()
    return count[0]


def test_power_cut_at_every_disk_operation_keeps_the_old_or_gives_the_new_model(
    tmp_path: Path, make_publisher: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = make_publisher(tmp_path / "p")
    publisher.add("1")
    publisher.add("2")

    def fresh(name: str) -> World:
        made = World(tmp_path / name, publisher)
        made.want("1")
        made.run(10)
        return made

    total = disk_operations(fresh("count"), monkeypatch)
    assert total > 30, "the table would be empty"
    for at in range(1, total + 1):
        world = fresh(f"cut-{at}")
        with disk_fails(monkeypatch, at, PowerCut(), once=True), pytest.raises(PowerCut):
            world.install("2")
        world.boot()
        assert world.serves() in ("1", "2"), f"cut at operation {at}: nothing serves"
        world.want_again("2")
        world.run()
        assert (world.serves(), world.state.active.version) == ("2", "2"), f"cut at operation {at}: no way on"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_disk_that_refuses_from_any_moment_on_keeps_the_old_model_and_goes_on_later(
    tmp_path: Path, make_publisher: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    publisher = make_publisher(tmp_path / "p")
    publisher.add("1")
    publisher.add("2")
    for at in range(1, 60, 5):
        world = World(tmp_path / f"{number}-{at}", publisher)
        world.want("1")
        world.run(10)
        with disk_fails(monkeypatch, at, OSError(number, os.strerror(number)), once=False):
            world.want("2")
            world.run(10)
            assert world.serves() in ("1", "2")
        world.run()
        assert world.serves() == "2", f"{os.strerror(number)} from operation {at} on"


def test_start_on_a_full_disk_serves_and_takes_the_work_up_when_there_is_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.transport.is_away = False
    world.transport.spoil = lambda _, chunk: chunk[::-1]
    world.want("2")
    world.run(3)
    with disk_fails(monkeypatch, 1, OSError(errno.ENOSPC, "full"), once=False):
        world.boot()
        assert world.serves() == "1"
        world.run(5)
        assert world.serves() == "1"
    world.run()
    assert world.serves() == "2"


@pytest.mark.parametrize("ticks", range(7))
def test_link_that_is_cut_in_any_phase_only_delays(world: World, ticks: int) -> None:
    world.want("2")
    world.run(ticks)
    world.transport.is_away = True
    world.run(5)
    assert world.serves() in ("1", "2")
    world.transport.is_away = False
    world.run()
    assert world.serves() == "2"


@pytest.mark.parametrize("ticks", range(7))
def test_process_that_ends_in_any_phase_goes_on(world: World, ticks: int) -> None:
    world.want("2")
    world.run(ticks)
    world.boot()
    assert world.serves() in ("1", "2")
    world.want_again("2")
    world.run()
    assert world.serves() == "2"


def test_flipped_byte_in_a_chunk_is_never_kept_and_only_that_chunk_comes_again(world: World) -> None:
    world.transport.spoil = lambda number, chunk: b"\0" + chunk[1:] if number == 0 else chunk
    world.want("2")
    world.run(5)
    assert (world.serves(), world.state.phase) == ("1", Phase.DOWNLOADING)
    world.transport.spoil = None
    world.run()
    assert world.serves() == "2"


def test_forged_metadata_raises_an_alarm_and_installs_when_the_honest_answer_is_back(world: World) -> None:
    index_name = next(name for name in world.transport.files if name.startswith("targets/models/tiny/2/"))
    good = world.transport.files[index_name]
    world.transport.files[index_name] = good.replace(b'"version":"2"', b'"version":"3"')
    world.want("2", rollout="first")
    world.run()
    assert (world.serves(), world.state.phase) == ("1", Phase.RESOLVING)
    assert "not what was signed" in world.transport.reports[-1].models[0].error
    alarms = [e.body for batch in world.transport.batches for e in batch.events if e.kind == "trust"]
    assert [body["model"] for body in alarms[:1]] == ["tiny"]
    world.transport.files[index_name] = good
    world.run()
    assert world.serves() == "2"


def test_wish_that_the_director_did_not_sign_changes_nothing(world: World) -> None:
    world.transport.want(world.publisher.desire(99, "2", role="timestamp"))
    world.run()
    assert (world.serves(), world.agent.reported().desired_revision) == ("1", 1)


def test_older_wish_and_one_revision_with_two_contents_change_nothing(world: World) -> None:
    world.want("2")
    world.run()
    world.transport.want(world.publisher.desire(1, "1"))
    world.transport.want(world.publisher.desire(2, "1"))
    world.run()
    assert world.serves() == "2"


def test_package_whose_outputs_are_wrong_never_serves(world: World) -> None:
    world.publisher.add("3", failure="wrong")
    world.transport.offer(world.publisher.files(), world.publisher.blobs())
    world.want("3")
    world.run()
    assert (world.serves(), world.state.phase) == ("1", Phase.FAILED)
    assert "no variant runs right" in world.state.error
    assert world.probed.count("3") == 1, "a failed package is not tried in a loop"


@pytest.mark.parametrize(
    ("compatible", "said"),
    [
        (Compatible(("jetson-orin",)), "package for"),
        (Compatible(("host",), ("riscv64",)), "built for riscv64"),
    ],
)
def test_package_for_something_else_is_refused_before_a_byte_is_fetched(
    world: World, compatible: Compatible, said: str
) -> None:
    world.config = replace(
        world.config, device_class="host" if "host" in compatible.device_classes else "pi5"
    )
    world.publisher.add("3", compatible=compatible)
    world.boot()
    world.want("3")
    world.run()
    assert world.serves() == "1"
    assert said in world.state.error
    assert "nothing was fetched" in world.state.error
    assert world.transport.pulled == []


def test_stand_in_skips_the_architecture_and_says_so(world: World) -> None:
    world.config = replace(world.config, stand_in=True)
    world.publisher.add("3", compatible=Compatible(("host",), ("riscv64",)))
    world.boot()
    world.want("3")
    world.run()
    assert world.serves() == "3"
    assert world.transport.reports[-1].stand_in


def test_events_that_could_not_be_sent_arrive_when_the_link_is_back(world: World) -> None:
    world.transport.batches.clear()
    world.want("2")
    world.run(2)
    world.agent.transport.is_away = True  # type: ignore[attr-defined]
    world.run(3)
    world.boot()
    world.run(10)
    world.run()
    events = [event for batch in world.transport.batches for event in batch.events]
    assert any(event.kind == "measurement" and event.body["version"] == "2" for event in events)


def test_model_that_nobody_wants_any_more_is_gone(world: World) -> None:
    world.want()
    world.run()
    assert world.agent.models.names() == []
    assert not (world.config.folder / "models/tiny").exists()


def test_every_disk_call_of_the_agent_is_in_the_table() -> None:
    source = Path(files.__file__).read_text() + Path(incoming.__file__).read_text()
    for name in ("fsync", "pwrite", "posix_fallocate", "fdatasync"):
        assert f"os.{name}" in source
        assert name in DISK_CALLS
