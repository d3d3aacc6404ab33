# SPDX-License-Identifier: Apache-2.0
"""Budgets of bytes and hours for what is bulky: kept on any clock and over any restart, said where they hold something back."""

import hashlib
import json
import queue
import time
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import pytest
from publishing import Publisher

from edgeopt_agent.allowance import MIB, Allowance, read_allowance
from edgeopt_agent.config import AgentConfig, load_config
from edgeopt_agent.main import make_agent
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.pulling import fill
from edgeopt_agent.spending import SPENDING, STEP_BYTES, Spending
from edgeopt_agent.status import describe
from edgeopt_agent.store import Incoming, Store
from edgeopt_agent.telling import Teller
from edgeopt_agent.transports import Inbox, Online
from edgeopt_agent.transports.memory import MemoryTransport
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.errors import RecipeError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import Compatible
from edgeopt_wire.messages import Phase, Reported

NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
EAST = timezone(timedelta(hours=2))
"""It is two in the afternoon there."""
CHUNK = 4096
CONTENT = bytes(range(256)) * 160  # ten chunks
INDEX = PackageIndex(
    "tiny",
    "1",
    "host",
    Compatible(("host",)),
    len(CONTENT),
    hashlib.sha256(CONTENT).hexdigest(),
    CHUNK,
    tuple(hashlib.sha256(CONTENT[at : at + CHUNK]).hexdigest() for at in range(0, len(CONTENT), CHUNK)),
)


class Board:
    """A device's clock and what it may spend."""

    def __init__(self, folder: Path, day: float = 0, month: float = 0, *windows: str) -> None:
        self.wall = NOON
        self.seconds = 0.0
        self.allowance = read_allowance(day, month, windows)
        self.path = folder / SPENDING
        self.start()

    def start(self) -> None:
        self.clock = TrustedClock(lambda: self.wall, elapsed=lambda: self.seconds)
        self.spending = Spending(self.path, self.clock, lambda: self.allowance, EAST)

    def later(self, **time: float) -> None:
        self.wall += timedelta(**time)
        self.seconds += timedelta(**time).total_seconds()

    def pull(self, incoming: Incoming, transport: MemoryTransport) -> None:
        fill(incoming, partial(self.spending.pull, transport.pull), lambda: None)


def repository() -> MemoryTransport:
    return MemoryTransport(queue.Queue(), blobs={INDEX.sha256: CONTENT})


@pytest.mark.parametrize(
    ("window", "hours"),
    [
        ("22:00-06:00", {22, 23, 0, 1, 2, 3, 4, 5}),
        ("09:00-11:00", {9, 10}),
        ("00:00-24:00", set(range(24))),
    ],
)
def test_window_is_in_the_devices_own_hours_and_may_go_over_midnight(
    tmp_path: Path, window: str, hours: set[int]
) -> None:
    board = Board(tmp_path, 0, 0, window)
    found = set()
    for _ in range(24):
        if not board.spending.refusal():
            found.add(board.wall.astimezone(EAST).hour)
        board.later(hours=1)
    assert found == hours


@pytest.mark.parametrize("window", ["22-06", "22:00-06:61", "25:00-06:00", "06:00-06:00", "06:00-24:30", ""])
def test_window_that_is_none_is_refused_with_an_example(window: str) -> None:
    with pytest.raises(RecipeError, match=r"transport: .*window"):
        read_allowance(0, 0, [window])


def test_wrong_keys_are_named_when_the_agent_starts(tmp_path: Path) -> None:
    for key, value in (("budget_mib_day", -1), ("budget_mib_month", "ten"), ("windows", "22:00-06:00")):
        written = config(tmp_path, **{key: value})
        with pytest.raises(RecipeError, match=key):
            describe(load_config(written))


@pytest.mark.parametrize("year", [1970, 2100])
def test_unknown_time_opens_no_window_and_gives_no_new_day(tmp_path: Path, year: int) -> None:
    board = Board(tmp_path, 1, 0, "00:00-24:00")
    board.spending.count(MIB)
    board.wall = board.wall.replace(year=year)
    board.start()
    assert "not known yet" in board.spending.refusal()
    board.allowance = read_allowance(1, 0, ())
    assert "budget of this day is spent" in board.spending.refusal()
    board.clock.learn(NOON + timedelta(days=1))
    assert board.spending.refusal() == ""


def test_budget_of_a_day_ends_at_the_devices_midnight_and_that_of_a_month_goes_on(tmp_path: Path) -> None:
    board = Board(tmp_path, day=1, month=2.5)
    board.spending.count(MIB)
    assert "budget_mib_day is 1" in board.spending.refusal()
    board.later(hours=9, minutes=59)
    assert board.spending.refusal()
    board.later(minutes=1)
    assert not board.spending.refusal()
    board.spending.count(MIB)
    board.later(days=1)
    board.spending.count(MIB // 2)
    assert "budget_mib_month is 2.5" in board.spending.refusal()
    board.later(days=8)
    assert not board.spending.refusal()


def test_clock_that_goes_back_gives_nothing_back_and_one_that_ran_ahead_locks_nobody_out(
    tmp_path: Path,
) -> None:
    board = Board(tmp_path, day=1)
    board.spending.count(MIB)
    board.wall -= timedelta(days=3)
    assert board.spending.refusal()
    board.wall = NOON + timedelta(days=10 * 365)  # plausible, and wrong
    assert not board.spending.refusal()
    board.spending.count(MIB)
    board.clock.learn(NOON)
    assert board.spending.refusal()  # what was spent stays spent
    board.later(days=1)
    assert not board.spending.refusal()


def test_power_cut_makes_no_byte_unspent(tmp_path: Path) -> None:
    board = Board(tmp_path, day=64)
    spent = 0
    for size in (10, STEP_BYTES, 3 * STEP_BYTES + 5, 1):
        board.spending.count(size)
        spent += size
        assert spent <= json.loads(board.path.read_bytes())["day_bytes"] <= spent + STEP_BYTES
    board.spending.close()
    board.start()
    assert board.spending.to_json()["day_bytes"] == spent


def test_damaged_record_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board = Board(tmp_path, day=1)
    for content in (b"", b"[]", b"\xff", b'{"schema": "edgeopt.spending/1"}'):
        board.path.write_bytes(content)
        board.start()
        board.spending.count(7)
        assert board.spending.to_json()["day_bytes"] == 7
    assert "counted from now on" in caplog.text


def test_download_stops_at_the_budget_and_goes_on_where_it_was_the_next_day(tmp_path: Path) -> None:
    board, transport = Board(tmp_path, day=3.5 * CHUNK / MIB), repository()
    incoming = Incoming(tmp_path / INDEX.sha256, INDEX)
    incoming.reserve()
    for day in range(3):
        with pytest.raises(TransportError, match="budget of this day is spent"):
            board.pull(incoming, transport)
        assert len(transport.pulled) == 3 * (day + 1)
        with pytest.raises(TransportError):
            board.pull(incoming, transport)
        board.later(days=1)
    board.pull(incoming, transport)
    assert (incoming.missing(), transport.pulled) == ([], list(range(10)))
    assert incoming.path.read_bytes() == CONTENT


def test_window_that_ends_ends_the_download(tmp_path: Path) -> None:
    board, transport = Board(tmp_path, 0, 0, "12:00-14:05"), repository()
    transport.spoil = lambda _, chunk: (board.later(minutes=1), chunk)[1]
    incoming = Incoming(tmp_path / INDEX.sha256, INDEX)
    incoming.reserve()
    with pytest.raises(TransportError, match="14:05 here"):
        board.pull(incoming, transport)
    assert len(incoming.missing()) == 5
    board.later(days=1, minutes=-60)
    board.pull(incoming, transport)
    assert incoming.missing() == []


def test_urgent_events_go_whatever_is_spent_and_telemetry_waits(tmp_path: Path) -> None:
    board, transport = Board(tmp_path, day=1), repository()
    teller = Teller(
        transport,
        Outbox(tmp_path / "outbox", "d1"),
        lambda: board.wall,
        lambda: board.seconds,
        lambda: Reported("d1", "host", "s", 0, "0", ()),
        spending=board.spending,
    )
    board.spending.count(MIB)
    teller.note("service", {})
    teller.alarm("tiny", "somebody lied")
    news = board.spending.news()
    assert news is not None
    assert "budget of this day is spent" in news["held_because"]
    assert board.spending.news() is None
    for _ in range(100):
        teller.send()
        while not transport.inbox.empty():
            teller.acknowledge(transport.inbox.get().ack)  # type: ignore[union-attr]
        board.later(seconds=1)
    assert [event.kind for batch in transport.batches for event in batch.events] == ["trust"]
    assert board.spending.to_json()["day_bytes"] > MIB  # reports and alarms count
    board.spending.count(MIB)
    assert board.spending.news() is None
    board.later(hours=10)
    teller.send()
    assert [event.kind for event in transport.batches[-1].events] == ["service"]
    said = board.spending.news()
    assert said is not None
    assert said["held_because"] == ""


def test_without_limits_all_goes_and_is_counted(tmp_path: Path) -> None:
    board = Board(tmp_path)
    assert board.allowance == Allowance()
    board.spending.count(10**12)
    assert (board.spending.refusal(), board.spending.to_json()["month_bytes"]) == ("", 10**12)


def test_status_shows_what_was_spent_and_what_waits(tmp_path: Path) -> None:
    configured = load_config(config(tmp_path, budget_mib_day=1, windows=["00:00-24:00"]))
    Path(configured.state_dir).mkdir()
    clock = TrustedClock(lambda: datetime.now(UTC))
    spending = Spending(Path(configured.state_dir) / SPENDING, clock)
    spending.count(2 * MIB)
    spending.close()
    found = describe(configured)["transfer"]
    assert (found["day_bytes"], found["day_budget_bytes"], found["windows"]) == (
        2 * MIB,
        MIB,
        ["00:00-24:00"],
    )
    assert "budget of this day is spent" in found["held_because"]


def config(folder: Path, **transport: object) -> Path:
    path = folder / "agent.json"
    document = {
        "schema": "edgeopt.agent/1",
        "device": "d1",
        "device_class": "host",
        "state_dir": str(folder / "state"),
        "root": str(folder / "root.json"),
        "transport": {"kind": "mqtt", "host": "127.0.0.1", **transport},
    }
    path.write_text(json.dumps(document))
    return path


def test_new_version_waits_for_its_window_and_then_is_installed(tmp_path: Path, publisher: Publisher) -> None:
    publisher.add("1")
    moment = publisher.now
    hour = moment.astimezone().hour
    inbox: Inbox = queue.Queue()
    transport = MemoryTransport(inbox, publisher.files(), publisher.blobs())
    window = f"{(hour + 2) % 24:02d}:00-{(hour + 3) % 24:02d}:00"
    transport.allowance = read_allowance(0, 0, [window])  # type: ignore[attr-defined]
    configured = AgentConfig(
        "d1", "host", str(tmp_path / "state"), str(publisher.root), {"kind": "mqtt", "host": "127.0.0.1"}
    )
    clock = TrustedClock(lambda: moment)
    agent = make_agent(configured, Store(configured.folder), transport, inbox, clock=clock)
    agent.start()
    transport.want(publisher.desire(1, "1"))
    for _ in range(10):
        agent.tick()
    assert (agent.states["tiny"].phase, transport.pulled) == (Phase.DOWNLOADING, [])
    assert "transport.windows are" in agent.reported().facts["transfer"]["held_because"]
    moment += timedelta(hours=2)
    inbox.put(Online())
    deadline = time.monotonic() + 60
    while agent.states["tiny"].active is None and time.monotonic() < deadline:
        agent.tick(0.1)
    active = agent.states["tiny"].active
    assert active is not None
    assert active.version == "1"
    agent.close()
    assert json.loads((configured.folder / SPENDING).read_bytes())["day_bytes"] > sum(
        len(blob) for blob in publisher.blobs().values()
    )
