# SPDX-License-Identifier: Apache-2.0
"""A model that serves for years is proven, mended and measured again; what a device does about each finding."""

import queue
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from publishing import write_package

from edgeopt_agent.calm import Calm
from edgeopt_agent.config import AgentConfig
from edgeopt_agent.loop import Agent
from edgeopt_agent.main import make_agent
from edgeopt_agent.probe import run_probe
from edgeopt_agent.rot import find_rot
from edgeopt_agent.schedule import JITTER, Schedule, UpkeepOptions
from edgeopt_agent.store import Store
from edgeopt_agent.transports import Inbox
from edgeopt_agent.transports.memory import MemoryTransport
from edgeopt_wire.messages import Phase

sys.path.append(str(Path(__file__).parent.parent))
import device_lives as device

Publisher = Any
HOUR_S = 3600.0
IMAGE = {"image": np.ones((1, 2, 4, 4), np.float32)}
WEIGHTS = "variants/weights.bin"


class Device:
    """A device with two variants of a model and a megabyte beside them; its hours pass when told to."""

    def __init__(self, folder: Path, publisher: Publisher, options: UpkeepOptions) -> None:
        self.folder, self.publisher = folder, publisher
        self.config = AgentConfig(
            "d1", "host", str(folder / "state"), str(publisher.root), {"kind": "folder"}, upkeep=options
        )
        self.broken: set[tuple[str, str]] = set()
        self.broken_once: list[str] = []
        self.seconds = [0.0]
        self.busy = False
        self.start()

    def start(self) -> None:
        inbox: Inbox = queue.Queue()
        self.transport = MemoryTransport(inbox, self.publisher.files(), self.publisher.blobs())
        self.agent: Agent = make_agent(self.config, Store(self.config.folder), self.transport, inbox)
        self.agent.installer.probe = self.probe
        self.agent._monotonic = lambda: self.seconds[0]
        self.agent.start()

    def wish(self, revision: int, version: str) -> None:
        self.transport.offer(self.publisher.files(), self.publisher.blobs())
        device.wish(self.agent, self.publisher.desire(revision, version), self.seconds)

    def hours(self, hours: float) -> None:
        """Let time pass in one stride, and the device look twice."""
        self.seconds[0] += hours * HOUR_S
        for _ in range(3):
            self.agent.tick()
            self.seconds[0] += 700
        self.agent.tick()

    def probe(self, request: Any) -> Any:
        found = device.quick_probe(request)
        variant = request.variant
        is_wrong = (found.version, variant) in self.broken
        if variant in self.broken_once:
            self.broken_once.remove(variant)
            is_wrong = True
        if is_wrong:
            return replace(found, golden_ok=False, warnings=("the outputs are not the golden ones: 3 dB",))
        times = {"fast": 10**6, "frugal": 3 * 10**6}
        timing = type(found.timing).of([times[variant]] * 10, warmup=1, load_ns=1, first_inference_ns=1)  # type: ignore[union-attr]
        return replace(found, timing=timing)

    @property
    def said(self) -> list[str]:
        """What was said of golden outputs, in order."""
        events = [event for batch in self.transport.batches for event in batch.events]
        by_number = {event.sequence: event for event in events}
        return [e.body["what"] for _, e in sorted(by_number.items()) if e.kind == "golden"]

    @property
    def state(self) -> Any:
        return self.agent.states["tiny"]

    @property
    def variant(self) -> str:
        loaded, _ = self.agent.models.infer("tiny", IMAGE)
        assert loaded.variant.id == self.state.active.variant, "what serves is what is reported"
        assert loaded.manifest.version == self.state.active.version
        return loaded.variant.id

    def file(self, path: str) -> Path:
        return self.agent.store.slot("tiny", self.state.active.slot) / path


def _publish(publisher: Publisher, folder: Path, version: str) -> None:
    from edgeopt.publish import publish
    from edgeopt_wire.archive import write_archive

    work = folder / f"package-{version}"
    (work / "variants").mkdir(parents=True)
    (work / WEIGHTS).write_bytes(random.Random(int(version)).randbytes(1_000_000))
    write_package(work, {"fast": {}, "frugal": {}}, version=version)
    path = folder / f"tiny-{version}-host.edgeopt"
    with path.open("w+b") as file:
        write_archive(file, {p.relative_to(work).as_posix(): p for p in work.rglob("*") if p.is_file()})
    publish(path, publisher.repository, publisher.keys, now=publisher.now)


MakeDevice = Callable[..., Device]


@pytest.fixture
def make_device(tmp_path: Path, publisher: Publisher) -> MakeDevice:
    def make(**keys: Any) -> Device:
        _publish(publisher, tmp_path, "1")
        options = UpkeepOptions(**{"measure_every_h": 0, "patience_s": 0, **keys})
        made = Device(tmp_path, publisher, options)
        made.wish(1, "1")
        assert made.variant == "fast"
        made.transport.pulled.clear()
        return made

    return make


def test_a_day_later_the_outputs_are_proven_and_nothing_is_said(make_device: MakeDevice) -> None:
    here = make_device()
    asked: list[str] = []
    probe = here.probe
    here.agent.installer.probe = lambda request: (asked.append(request.variant), probe(request))[1]
    here.hours(12)
    assert asked == []
    here.hours(24 * (1 + JITTER))
    assert asked == ["fast"], "the variant in service alone"
    assert here.said == []
    here.hours(12)
    assert asked == ["fast"]


def test_a_rotten_byte_is_told_from_a_changed_runtime_and_only_bad_chunks_are_pulled(
    make_device: MakeDevice,
) -> None:
    here = make_device()
    content = bytearray(here.file(WEIGHTS).read_bytes())
    right = bytes(content)
    content[500_000] ^= 4
    here.file(WEIGHTS).write_bytes(content)
    assert find_rot(here.agent.store, "tiny", here.state.active) == (WEIGHTS,)
    here.hours(30)
    assert here.said == ["damaged", "mended"]
    assert here.file(WEIGHTS).read_bytes() == right
    assert find_rot(here.agent.store, "tiny", here.state.active) == ()
    assert here.agent.store.packages.is_whole(here.state.active.package_sha256), "the store is mended too"
    assert 1 <= len(here.transport.pulled) <= 3, "the byte's chunk and those of its file's checksums, of 16"
    assert (here.variant, here.state.error) == ("fast", "")


@pytest.mark.parametrize("harm", ["truncated", "gone", "manifest"])
def test_files_that_are_short_or_gone_come_back(make_device: MakeDevice, harm: str) -> None:
    here = make_device()
    path = here.file("manifest.json" if harm == "manifest" else WEIGHTS)
    right = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(right[: len(right) // 2])
    else:
        path.write_bytes(right[:100] + b"\0" + right[101:])
    here.hours(30)
    assert here.said == ["damaged", "mended"]
    assert path.read_bytes() == right
    assert here.variant == "fast"


def test_rot_with_nobody_to_ask_is_reported_and_mended_when_somebody_is_there(
    make_device: MakeDevice,
) -> None:
    here = make_device()
    here.file(WEIGHTS).write_bytes(b"\0" * 1_000_000)
    here.transport.is_away = True
    here.hours(30)
    assert here.variant == "fast"
    assert here.state.error == f"degraded: damaged on the disk: {WEIGHTS}"
    assert here.agent.reported().facts["degraded"] == {"tiny": f"damaged on the disk: {WEIGHTS}"}
    here.transport.is_away = False
    here.hours(2)
    here.hours(2)
    assert here.said == ["damaged", "mended", "right_again"]
    assert here.state.error == ""
    assert "degraded" not in here.agent.reported().facts


def test_one_wrong_run_is_told_and_changes_nothing(make_device: MakeDevice) -> None:
    here = make_device()
    here.broken_once = ["fast"]
    here.hours(30)
    assert here.said == ["right_when_loaded_again"]
    assert (here.variant, here.state.error) == ("fast", "")


def test_a_variant_that_is_wrong_twice_gives_way_to_one_that_is_right(make_device: MakeDevice) -> None:
    here = make_device()
    here.broken = {("1", "fast")}
    here.hours(30)
    assert here.said == ["another_variant"]
    assert here.variant == "frugal"


def test_with_no_variant_right_the_previous_package_serves_if_it_is_right(
    make_device: MakeDevice, tmp_path: Path
) -> None:
    here = make_device()
    _publish(here.publisher, tmp_path, "2")
    here.wish(2, "2")
    assert here.state.active.version == "2"
    here.broken = {("2", "fast"), ("2", "frugal")}
    here.hours(30)
    assert here.said == ["previous_package"]
    assert (here.variant, here.state.active.version) == ("fast", "1")
    assert here.state.phase is Phase.ROLLED_BACK
    assert "not the golden ones" in here.state.error
    here.start()
    assert (here.variant, here.state.active.version) == ("fast", "1")
    here.wish(2, "2")
    assert here.state.active.version == "1", "the same wish does not bring it back"


@pytest.mark.parametrize("previous", ["wrong", "rotten"])
def test_a_previous_package_that_is_no_better_is_not_gone_back_to(
    make_device: MakeDevice, tmp_path: Path, previous: str
) -> None:
    here = make_device()
    old = here.file(WEIGHTS)
    _publish(here.publisher, tmp_path, "2")
    here.wish(2, "2")
    here.broken = {("2", "fast"), ("2", "frugal")}
    if previous == "rotten":
        old.write_bytes(b"\0" * 1_000_000)
    else:
        here.broken.add(("1", "fast"))
    here.hours(30)
    assert here.said == ["degraded"]
    assert (here.variant, here.state.active.version) == ("fast", "2")
    assert here.state.error.startswith("degraded: the outputs are not the golden ones")
    here.hours(7)
    assert here.said == ["degraded"], "told once"
    here.broken = set()
    here.hours(7)
    assert here.said == ["degraded", "right_again"]
    assert here.state.error == ""


def test_what_is_wrong_only_in_this_process_is_loaded_afresh_and_then_the_process_ends_once(
    make_device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_device()
    infer, activate = here.agent.models.infer, here.agent.models.activate
    flipped = [True]

    def wrong(model: str, inputs: Any) -> Any:
        loaded, outputs = infer(model, inputs)
        return loaded, {name: array + flipped[0] for name, array in outputs.items()}

    def mending(model: str, installed: Any) -> None:
        activate(model, installed)
        flipped[0] = False

    monkeypatch.setattr(here.agent.models, "infer", wrong)
    monkeypatch.setattr(here.agent.models, "activate", mending)
    here.hours(30)
    assert here.said == ["loaded_afresh"]
    flipped[0] = True
    monkeypatch.setattr(here.agent.models, "activate", activate)
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/manager")
    here.seconds[0] += 30 * HOUR_S
    here.agent.tick()
    assert here.agent._stop.is_set(), "systemd starts it again"
    here.agent._stop.clear()
    here.hours(2)
    assert here.said == ["loaded_afresh", "process_ended", "degraded"], "once is enough"


def test_the_real_probe_proves_a_real_package(make_device: MakeDevice) -> None:
    here = make_device()
    here.agent.installer.probe = run_probe
    here.hours(30)
    assert here.said == []
    here.file("golden/outputs/tiny/0.npy").write_bytes(b"x")
    here.hours(30)
    assert here.said == ["damaged", "mended"]


def test_measuring_again_waits_for_a_calm_board_and_says_when_it_did_not(make_device: MakeDevice) -> None:
    here = make_device(golden_every_h=0, measure_every_h=24, patience_s=6 * HOUR_S)
    served = [0]
    counts = [True]

    def count() -> int:
        served[0] += counts[0]
        return served[0]

    def sleep(seconds: float) -> None:
        here.seconds[0] += seconds

    calm = Calm(served=count, monotonic=lambda: here.seconds[0], sleep=sleep)
    here.agent.installer.calm = calm
    upkeep = here.agent.worker.look_at.__self__  # type: ignore[attr-defined]
    upkeep.calm = calm
    here.hours(0)  # what the installation measured is told, one batch at a time
    measured = _measured(here)
    here.hours(30)
    assert len(_measured(here)) == len(measured), "it waits"
    here.hours(7)
    late = _measured(here)[len(measured) :]
    assert late[0]["conditions"]["idle"] is False
    assert "requests were served" in late[0]["conditions"]["not_calm"]
    assert late[0]["conditions"]["waited_s"] >= 6 * HOUR_S
    counts[0] = False
    before = len(_measured(here))
    calm.root = here.folder  # a board that tells nothing: unknown, and not waited for
    here.hours(30)
    calm_ones = _measured(here)[before:]
    assert calm_ones[0]["conditions"]["idle"] in (True, None)
    assert calm_ones[0]["conditions"]["waited_s"] < 60


def _measured(here: Device) -> list[Any]:
    events = {e.sequence: e for batch in here.transport.batches for e in batch.events}
    return [e.body for _, e in sorted(events.items()) if e.kind == "measurement"]


def test_times_have_jitter_survive_restarts_and_jumping_clocks(tmp_path: Path) -> None:
    now, seconds = [datetime(2026, 11, 25, tzinfo=UTC)], [0.0]

    def make(device_id: str = "d1") -> Schedule:
        return Schedule(tmp_path / f"{device_id}.json", device_id, lambda: now[0], lambda: seconds[0])

    due = []
    for number in range(40):
        schedule = make(f"d{number}")
        schedule.note("tiny", "a" * 64)
        begin = now[0]
        hours = 0.0
        while not schedule.is_due("tiny", "golden", 24 * HOUR_S):
            hours += 0.1
            now[0] = begin + timedelta(hours=hours)
        now[0] = begin
        due.append(hours)
    assert 24 * (1 - JITTER) <= min(due) < 23.5
    assert 24.5 < max(due) <= 24 * (1 + JITTER) + 0.1
    schedule = make()
    now[0] += timedelta(hours=30)
    assert schedule.is_due("tiny", "golden", 24 * HOUR_S), "a restart forgets nothing"
    now[0] = datetime(1970, 1, 1, tzinfo=UTC)
    assert not schedule.is_due("tiny", "golden", 24 * HOUR_S)
    seconds[0] += 30 * HOUR_S
    assert schedule.is_due("tiny", "golden", 24 * HOUR_S), "a clock that stands is no excuse"
    schedule.done("tiny", "golden")
    assert not schedule.is_due("tiny", "golden", 24 * HOUR_S)
    assert not schedule.is_due("tiny", "measured", 0)
    (tmp_path / "d1.json").write_bytes(b"{")
    schedule = make()
    schedule.note("tiny", "a" * 64)
    assert not schedule.is_due("tiny", "golden", 24 * HOUR_S)
    assert schedule.note("tiny", "b" * 64).package_sha256 == "b" * 64


def test_odd_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="golden_every_h must be 0 or from 1 to 8784"):
        UpkeepOptions(golden_every_h=0.1)
    with pytest.raises(ValueError, match="unknown keys"):
        UpkeepOptions(extra={"golden": 1})
