# SPDX-License-Identifier: Apache-2.0
"""A week offline: what was produced is in the ledger once, or counted as dropped, whoever is stopped at whatever moment.

Real: the outbox on a disk, `Teller`, the documents' bytes, `Control` on an SQLite file. Made up: the clock, and a line that
loses, repeats, delays and reorders. A device stops at its writes and removals, and a power cut may bring back what was
removed since the folder was flushed. The control plane stops before it stores, before it commits, and before it answers.
"""

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from sqlalchemy import event, select

from edgeopt.fleet.catalog import Catalog
from edgeopt.fleet.control import Control
from edgeopt.fleet.database import Device, EventRow, engine_of, open_database, sqlite_url
from edgeopt_agent import outbox as outbox_module
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.telling import Teller
from edgeopt_wire.document import canonical_bytes, format_moment, from_bytes, to_bytes
from edgeopt_wire.messages import Ack, EventBatch, Reported
from edgeopt_wire.sketch import Sketch

BEGIN = datetime(2026, 11, 23, tzinfo=UTC)
DAY = 24 * 60
WEEK = 7 * DAY


class Stopped(BaseException):
    """The process ends here."""


class Disk:
    """A device's disk: each write and removal may be the last thing that the process does."""

    def __init__(self, rng: random.Random, patch: pytest.MonkeyPatch) -> None:
        self.rate = 0.0
        self.produced: set[bytes] = set()
        self._rng = rng
        self._write = outbox_module.write_durably
        self._unlink = Path.unlink
        self._removed: dict[Path, bytes] = {}
        patch.setattr(outbox_module, "write_durably", self.write)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: self.unlink(path, missing_ok=missing_ok))

    def write(self, path: Path, content: bytes) -> None:
        self._perhaps()
        self._write(path, content)
        if path.suffix == ".event":
            self.produced.add(canonical_bytes(json.loads(content)["body"]))
        self._perhaps()  # the folder is not flushed yet
        self._removed.clear()
        self._perhaps()

    def unlink(self, path: Path, *, missing_ok: bool) -> None:
        if path.suffix == ".event" and path.exists():
            self._perhaps()
            self._removed[path] = path.read_bytes()
        self._unlink(path, missing_ok=missing_ok)

    def cut(self) -> None:
        """The power is gone: some of what was removed and not flushed is there again."""
        for path, content in self._removed.items():
            if self._rng.random() < 0.5:
                path.write_bytes(content)
        self._removed.clear()

    def _perhaps(self) -> None:
        if self._rng.random() < self.rate:
            raise Stopped


class Line:
    """The transport, and what is under way on it."""

    def __init__(self) -> None:
        self.is_online = False
        self.up: list[bytes] = []
        self.down: list[bytes] = []

    def send(self, batch: EventBatch) -> bool:
        if self.is_online:
            self.up.append(to_bytes(batch))
        return self.is_online

    def report(self, reported: Reported) -> None:
        """Of no interest here."""


class ControlPlane:
    """`Control` and its database, which end and begin again."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.rate = 0.0
        self._folder = folder
        self._rng = rng
        self._signer = CryptoSigner.generate_ed25519()
        self.start()
        self.control.enrol("d1", "host", stand_in=False)

    def start(self) -> None:
        self.sessions = open_database(sqlite_url(self._folder))
        event.listen(engine_of(self.sessions), "commit", lambda _connection: self._perhaps())
        self.control = Control(self.sessions, Catalog(self._folder), self._signer, lambda: BEGIN)

    def stop(self) -> None:
        engine_of(self.sessions).dispose()

    def take(self, raw: bytes, answer: Callable[[bytes], None], stops: Counter[str]) -> None:
        """One message; where it stops is counted."""
        where = "before it stores"
        try:
            self._perhaps()
            where = "before it commits"
            ack = self.control.take_events(from_bytes(EventBatch, raw))
            assert ack is not None
            where = "before it answers"
            self._perhaps()
            answer(to_bytes(ack))
        except Stopped:
            stops[where] += 1
            self.stop()
            self.start()

    def ledger(self) -> tuple[list[bytes], int]:
        """All stored events, and how many count as dropped."""
        with self.sessions() as session:
            device = session.get(Device, "d1")
            assert device is not None
            stored = [canonical_bytes(row.body) for row in session.scalars(select(EventRow))]
            return stored, device.dropped_events

    def _perhaps(self) -> None:
        if self._rng.random() < self.rate:
            raise Stopped


class World:
    """One device, one control plane, and the minutes that pass."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, seed: int, limit: int) -> None:
        self.rng = random.Random(seed)
        self.stops: Counter[str] = Counter()
        self.disk = Disk(self.rng, patch)
        self.line = Line()
        (folder / "fleet").mkdir()
        self.plane = ControlPlane(folder / "fleet", self.rng)
        self.seconds = 0.0
        self.calm = False
        self._produced = 0
        self._folder, self._limit = folder / "outbox", limit
        self.start()

    def start(self) -> None:
        while True:
            try:
                self.outbox = Outbox(self._folder, "d1", self._limit)
                break
            except Stopped:
                self._cut()
        self.teller = Teller(self.line, self.outbox, self.now, lambda: self.seconds, self.reported)  # type: ignore[arg-type]

    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=int(self.seconds))

    def reported(self) -> Reported:
        return Reported("d1", "host", "s", 0, "0", ())

    def lives(self, step: Callable[[], Any]) -> None:
        """Do something that may be the end of a life, and begin the next."""
        try:
            step()
        except Stopped:
            self._cut()
            self.start()

    def minute(self) -> None:
        """A batch is produced, and whatever the line allows is exchanged."""
        self.seconds += 60
        number, self._produced = self._produced, self._produced + 1
        kind = "trust" if number % 97 == 0 else "service"
        self.lives(lambda: self.teller.note(kind, {"n": number, **self._served()}))
        self.exchange()

    def exchange(self) -> None:
        for _ in range(200):
            self.lives(self.teller.send)
            if not self.line.is_online or not (self.line.up or self.line.down):
                return
            if not self.calm and self.rng.random() < 0.1:
                return  # the rest comes later, if the line is there
            if self.line.up:
                self.plane.take(self._next(self.line.up), self.line.down.append, self.stops)
            if self.line.down:
                ack = from_bytes(Ack, self._next(self.line.down))
                self.lives(lambda ack=ack: self.teller.acknowledge(ack))  # type: ignore[misc]

    def _served(self) -> dict[str, Any]:
        """A window of service, as short as it can be."""
        sketch = Sketch()
        sketch.add(1e6 + self.rng.randrange(10**6))
        return {
            "model": "tiny",
            "version": "1",
            "variant": "a",
            "condition": {"load": self.rng.choice(("low", "high"))},
            "from": format_moment(self.now() - timedelta(seconds=60)),
            "to": format_moment(self.now()),
            "calls": 1,
            "rows": 1,
            "failed": 0,
            "run_ns": sketch.to_json(),
        }

    def settle(self) -> None:
        """No more faults: what waits is delivered, and one event more tells how much was dropped."""
        self.disk.rate = self.plane.rate = 0.0
        self.calm = True
        self.back()
        for _ in range(2):
            self.minute()
            for _ in range(self._limit + 100):
                if len(self.outbox):
                    self.seconds += 60
                    self.exchange()
        assert len(self.outbox) == 0

    def check(self) -> None:
        """The sum is right, to the event."""
        stored, dropped = self.plane.ledger()
        assert len(stored) == len(set(stored)), "an event is in the ledger twice"
        assert set(stored) <= self.disk.produced
        assert (len(stored) + dropped, dropped) == (len(self.disk.produced), self.outbox.dropped)

    def _next(self, queue: list[bytes]) -> bytes:
        """What arrives next: the line loses nothing by itself, which a stop does, but repeats and reorders."""
        if self.calm:
            return queue.pop(0)
        at = self.rng.randrange(len(queue))
        return queue[at] if self.rng.random() < 0.1 else queue.pop(at)

    def back(self) -> None:
        """The line is there again."""
        self.line.is_online = True
        self.teller.is_due(events=True)

    def lose(self) -> None:
        """The line is cut: of what was under way some is lost, the rest arrives when it is there again."""
        self.line.is_online = False
        for queue in (self.line.up, self.line.down):
            queue[:] = [content for content in queue if self.rng.random() < 0.5]

    def _cut(self) -> None:
        self.stops["device"] += 1
        self.disk.cut()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: each of 10,000 events is flushed twice."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="edgeopt-week-") as name:
        yield Path(name)


def week_away(world: World) -> None:
    """Nobody hears the device for a week; when it is back, both sides are stopped again and again."""
    world.disk.rate = 0.001
    for _ in range(WEEK):
        world.minute()
    world.disk.rate, world.plane.rate = 0.02, 0.15
    world.back()
    for _ in range(40):
        world.minute()


def comes_and_goes(world: World, minutes: int) -> None:
    """A line that is there for minutes and away for hours."""
    world.disk.rate, world.plane.rate = 0.01, 0.04
    left = 0
    for _ in range(minutes):
        left -= 1
        if left < 0:
            left = (
                world.rng.choice((3, 20, 60)) if not world.line.is_online else world.rng.choice((5, 90, 300))
            )
            if world.line.is_online:
                world.lose()
            else:
                world.back()
        world.minute()


def test_week_away_then_everything_is_stored_once_or_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(folder, monkeypatch, seed=1, limit=200)
    week_away(world)
    world.settle()
    world.check()
    assert world.outbox.dropped > 9000
    assert any(b"edgeopt.summary/1" in body for body in world.plane.ledger()[0])
    assert world.stops["device"] > 20
    world.plane.stop()


@pytest.mark.parametrize("seed", [1])
def test_line_that_comes_and_goes_miscounts_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    world = World(folder, monkeypatch, seed, limit=30)
    comes_and_goes(world, 400)
    world.settle()
    world.check()
    assert world.outbox.dropped > 0
    assert world.stops["device"] > 5
    world.plane.stop()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_whole_weeks_miscount_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    world = World(folder, monkeypatch, 100 + seed, limit=(30, 200, 2000)[seed % 3])
    if seed % 2:
        week_away(world)
    else:
        comes_and_goes(world, WEEK)
    world.settle()
    world.check()
    assert world.stops["device"] > 20
    assert all(world.stops[where] for where in ("before it commits", "before it answers"))
    world.plane.stop()
