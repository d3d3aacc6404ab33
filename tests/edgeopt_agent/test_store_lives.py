# SPDX-License-Identifier: Apache-2.0
"""Random lives of a device: models come, go and go back, room runs out, and the power fails at any write.

Several models share files. After each step: what is active, and at rest what was before it, is whole to the last byte and
serves; the quota is kept or an error says why not; nothing is on the disk that nobody names; each file has as many names
as there are users of it; and a start finds everything as it was left.
"""

import functools
import hashlib
import os
import queue
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from publishing import write_package

from edgeopt_agent import quota
from edgeopt_agent.config import AgentConfig
from edgeopt_agent.loop import Agent
from edgeopt_agent.machine import WORK
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.probe import ProbeRequest
from edgeopt_agent.serve.models import Models
from edgeopt_agent.store import Store
from edgeopt_agent.transports import Inbox
from edgeopt_agent.transports.memory import MemoryTransport
from edgeopt_wire.archive import write_archive
from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import StoreError
from edgeopt_wire.index import PackageIndex, index_of, target_path
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.measurement import Conditions, Measurement, Timing
from edgeopt_wire.messages import DesiredModel, Phase

NAMES, VERSIONS = ("a", "b", "c"), ("1", "2", "3")
PLENTY = 10**9
WEIGHTS = 20_000
SLACK = 8192
"""Records that were written since the last look at the quota."""
CUTS = st.none() | st.integers(1, 130)
"""At which write the power fails, if it does; an installation takes about a hundred."""
EXPECTED = re.compile("disk_quota|given up|loop:")
"""What may keep a model from the version that is wanted: no room, or too many starts in one deployment."""


class PowerCut(BaseException):
    """Not an error that anybody may handle: everything in memory is gone."""


@functools.cache
def published() -> dict[str, tuple[PackageIndex, bytes]]:
    """By target every version of every model. All share samples, and the first two versions of each their weights."""
    found = {}
    with tempfile.TemporaryDirectory() as base:
        for name in NAMES:
            for version in VERSIONS:
                folder = Path(base) / name / version
                folder.mkdir(parents=True)
                (folder / "weights.bin").write_bytes(bytes([version == "3"]) * WEIGHTS)
                manifest = write_package(folder, {"v": {"load_ns": int(version)}}, name=name, version=version)
                path = Path(base) / f"{name}-{version}.edgeopt"
                members = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
                with path.open("w+b") as file:
                    write_archive(file, members)
                index = index_of(
                    path,
                    name=name,
                    version=version,
                    device="host",
                    compatible=manifest.compatible,
                    chunk_bytes=16_384,
                )
                found[target_path(name, version, "host")] = (index, path.read_bytes())
    return found


class Finder:
    """Finds what was published; who signed it is the matter of other tests."""

    def find_index(self, target: str) -> PackageIndex:
        return published()[target][0]


def probe(request: ProbeRequest) -> Measurement:
    """What a probe says of a model that is right."""
    manifest = from_bytes(Manifest, (Path(request.folder) / "manifest.json").read_bytes())
    return Measurement(
        package_sha256=request.package_sha256,
        model=manifest.name,
        version=manifest.version,
        variant=request.variant,
        precision="fp32",
        device_id="d1",
        device_class="host",
        agent_version="0",
        measured_at=datetime.now(UTC).replace(microsecond=0),
        conditions=Conditions("null", "1.0", 1, 1, "cpu", "x", "x", "x"),
        timing=Timing.of([1000] * 10, warmup=1, load_ns=1, first_inference_ns=1),
        golden_ok=True,
    )


@contextmanager
def power(cut: int | None) -> Iterator[None]:
    """What reaches the disk; at call number `cut`, and at every later one, there is no power any more.

    What was written before it stays, flushed or not: `tests/faults` loses what was not flushed.
    """
    left = [cut]

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if left[0] is not None:
                left[0] -= 1
                if left[0] <= 0:
                    raise PowerCut
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, guard(lambda _: None))
        for name in ("link", "pwrite", "posix_fallocate"):
            patch.setattr(os, name, guard(getattr(os, name)))
        for name in ("replace", "rename", "unlink"):
            patch.setattr(Path, name, guard(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", guard(shutil.rmtree))
        yield


class Device:
    """A process of the agent on a state directory."""

    def __init__(self, folder: Path, disk_quota: int) -> None:
        self.seconds = 0.0
        inbox: Inbox = queue.Queue()
        self.store = Store(folder)
        self.models = Models(self.store)
        blobs = {index.sha256: raw for index, raw in published().values()}
        self.transport = MemoryTransport(inbox, blobs=blobs)
        trust: Any = Finder()
        self.agent = Agent(
            AgentConfig("d1", "host", str(folder), "", {}, disk_quota=f"{disk_quota}B"),
            self.store,
            self.transport,
            inbox,
            trust=trust,
            outbox=Outbox(folder / "outbox", "d1"),
            models=self.models,
            probe=probe,
            now=lambda: datetime.now(UTC).replace(microsecond=0),
            session="s",
            monotonic=lambda: self.seconds,
        )
        self.keeper = self.agent.installer.keeper
        self.worker = self.agent.worker

    def follow(self, wanted: dict[str, DesiredModel], revision: int) -> None:
        """Take a wish and work until nothing is left, or until only what has no room is."""
        self.worker.want(dict(wanted), revision)
        still = 0
        for number in range(200):
            if not self.worker.is_busy or still > 12:
                return
            before = dict(self.worker.states)
            self.seconds += 3600.0 * (
                number % 4 == 0
            )  # every pause is over, and between that others have their turn
            self.worker.do_one()
            still = still + 1 if self.worker.states == before else 0

    def end(self) -> None:
        for name in self.models.names():
            self.models.deactivate(name)


class Lives(RuleBasedStateMachine):
    """The device, and what its control plane wants."""

    base = Path()

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=self.base))
        self.wanted: dict[str, DesiredModel] = {}
        self.revision = self.rollouts = 0
        self.quota = PLENTY
        self.device: Device | None = None
        with power(None):
            self.boot()

    def teardown(self) -> None:
        if self.device is not None:
            self.device.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def boot(self) -> None:
        if self.device is not None:
            self.device.end()
        self.device = Device(self.folder, self.quota)
        self.device.worker.start()

    def live(self, cut: int | None, act: Callable[[Device], None]) -> None:
        """Do something; where the power fails meanwhile, start again and hear the wish again."""
        assert self.device is not None
        device = self.device
        try:
            with power(cut):
                act(device)
        except PowerCut:
            with power(None):
                self.boot()
                self.device.follow(self.wanted, self.revision)

    def want(self, cut: int | None) -> None:
        self.revision += 1
        self.live(cut, lambda device: device.follow(self.wanted, self.revision))

    @rule(name=st.sampled_from(NAMES), version=st.sampled_from(VERSIONS), cut=CUTS)
    def install(self, name: str, version: str, cut: int | None) -> None:
        self.rollouts += 1
        target = target_path(name, version, "host")
        self.wanted[name] = DesiredModel(name, version, target, str(self.rollouts))
        self.want(cut)

    @rule(name=st.sampled_from(NAMES), cut=CUTS)
    def roll_back(self, name: str, cut: int | None) -> None:
        """To the version before; its bytes are here, so none is asked for."""
        device = self.device
        assert device is not None
        state = device.worker.states.get(name)
        if state is None or state.previous is None or state.phase in WORK:
            return
        asked = len(device.transport.pulled)
        is_alone = not device.worker.is_busy
        self.install(name, state.previous.version, cut)
        if is_alone:
            assert self.device is not None
            assert len(self.device.transport.pulled) == (asked if self.device is device else 0)

    @rule(name=st.sampled_from(NAMES), cut=CUTS)
    def forget(self, name: str, cut: int | None) -> None:
        self.wanted.pop(name, None)
        self.want(cut)

    @rule(packages=st.integers(0, 4), cut=CUTS)
    def squeeze(self, packages: int, cut: int | None) -> None:
        """From now on there is room for what is needed, at most, and a few packages more."""
        assert self.device is not None
        keeper, known = self.device.keeper, self.device.worker.known
        kept, stored = keeper.kept(known), self.device.store.packages.all()[0]
        least = keeper.used_bytes() - quota.choose(stored, kept, PLENTY).freed_bytes
        self.quota = max(1, least + packages * WEIGHTS)
        self.live(cut, self._clean)

    @rule(cut=CUTS)
    def relax(self, cut: int | None) -> None:
        self.quota = PLENTY
        self.live(cut, self._clean)
        self.want(None)

    @rule(need=st.integers(1, 6 * WEIGHTS))
    def make_room(self, need: int) -> None:
        """It is made, or nothing goes."""
        assert self.device is not None
        keeper, known = self.device.keeper, self.device.worker.known
        before = set(self.device.store.packages.all()[0])
        try:
            with power(None):
                keeper.make_room(need, known)
        except StoreError:
            assert set(self.device.store.packages.all()[0]) == before
        else:
            assert keeper.used_bytes() + need <= self.quota

    @rule(cut=CUTS)
    def restart(self, cut: int | None) -> None:
        assert self.device is not None
        is_at_rest = not self.device.worker.is_busy
        before = self.tree()
        try:
            with power(cut):
                self.boot()
        except PowerCut:
            with power(None):
                self.boot()
        if is_at_rest:
            assert self.tree() == before, "a start changes nothing of what is at rest"
        with power(None):
            self.device.follow(self.wanted, self.revision)

    def _clean(self, device: Device) -> None:
        device.keeper._disk_quota = f"{self.quota}B"
        device.keeper.clean(device.worker.known)

    def tree(self) -> dict[str, bytes]:
        found = (
            p for part in ("models", "blobs", "packages", "incoming") for p in (self.folder / part).rglob("*")
        )
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found if path.is_file()
        }

    @invariant()
    def what_is_named_is_whole_and_serves(self) -> None:
        assert self.device is not None
        states = self.device.worker.states
        assert set(states) == set(self.wanted) == set(self.device.store.models())
        for name, state in states.items():
            for entry in (state.active, state.previous if state.phase not in WORK else None):
                if entry is not None:
                    self.is_whole(name, entry.version, entry.slot, entry.package_sha256)
            if state.active is not None:
                assert self.device.models.describe(name).manifest.version == state.active.version

    def is_whole(self, name: str, version: str, slot: str, sha256: str) -> None:
        assert self.device is not None
        index, _ = published()[target_path(name, version, "host")]
        store, folder = self.device.store, self.device.store.slot(name, slot)
        assert index.sha256 == sha256
        assert store.is_whole(name, slot, sha256)
        stored = store.packages.find(sha256)
        assert stored is not None
        assert len(stored.files) == 5, "manifest, weights, variant and two samples"
        for file in stored.files:
            assert hashlib.sha256((folder / file.path).read_bytes()).hexdigest() == file.sha256
            assert (folder / file.path).samefile(self.folder / "blobs" / file.sha256)

    @invariant()
    def what_is_wanted_serves_or_an_error_says_why_not(self) -> None:
        assert self.device is not None
        for name, wish in self.wanted.items():
            state = self.device.worker.states[name]
            if state.active is None or state.active.version != wish.version:
                assert EXPECTED.search(state.error), state
            if name in self.device.worker._work:
                assert "disk_quota" in state.error, state
            if self.quota == PLENTY:
                assert state.phase not in WORK
        if self.quota == PLENTY:
            assert not self.device.worker.is_busy

    @invariant()
    def quota_is_kept_as_far_as_that_is_possible(self) -> None:
        assert self.device is not None
        keeper = self.device.keeper
        if keeper.excess(0) > SLACK:
            may_go = quota.choose(
                self.device.store.packages.all()[0], keeper.kept(self.device.worker.known), PLENTY
            )
            assert may_go.digests == ()

    @invariant()
    def nothing_is_there_that_nobody_names(self) -> None:
        assert self.device is not None
        packages, is_all = self.device.store.packages.all()
        assert is_all
        named = {file.sha256 for entry in packages.values() for file in entry.files}
        assert {path.name for path in (self.folder / "blobs").iterdir()} == named
        assert not list(self.folder.rglob(".half-*"))
        assert not list(self.folder.rglob("*.bad"))
        if not self.device.worker.is_busy:
            assert list((self.folder / "incoming").iterdir()) == []
        for name, state in self.device.worker.states.items():
            used = {
                entry.slot for entry in (state.active, state.previous, state.candidate) if entry is not None
            }
            slots = {path.name for path in (self.folder / "models" / name).iterdir() if path.is_dir()}
            assert slots <= used

    @invariant()
    def each_file_has_as_many_names_as_users(self) -> None:
        files = [path.stat() for path in self.folder.rglob("*") if path.is_file()]
        names = Counter(found.st_ino for found in files)
        assert all(found.st_nlink == names[found.st_ino] for found in files)
        for path in (self.folder / "blobs").iterdir():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def run(base: Path, examples: int, steps: int) -> None:
    here = type("Here", (Lives,), {"base": base})
    run_state_machine_as_test(
        here,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_some_lives(tmp_path: Path) -> None:
    run(tmp_path, 20, 12)


@pytest.mark.slow
def test_many_lives(tmp_path: Path) -> None:
    run(tmp_path, 300, 30)


def test_power_cut_at_each_write_of_an_installation_converges(tmp_path: Path) -> None:
    """The one sequence that every device sees, walked: the next version over a model that shares files with another."""
    cut, is_cut = 0, True
    while is_cut:
        cut += 7
        lives = type("Here", (Lives,), {"base": tmp_path})()
        lives.install("a", "1", None)
        lives.install("b", "2", None)
        before = lives.device
        lives.install("a", "3", cut)
        is_cut = lives.device is not before
        for check in (
            lives.what_is_named_is_whole_and_serves,
            lives.what_is_wanted_serves_or_an_error_says_why_not,
            lives.nothing_is_there_that_nobody_names,
            lives.each_file_has_as_many_names_as_users,
        ):
            check()
        state = lives.device.worker.states["a"]
        assert (state.phase, state.previous.version) == (Phase.COMMITTED, "1")
        lives.teardown()
    assert cut > 50
