# SPDX-License-Identifier: Apache-2.0
"""Measuring waits for a board that is cool, idle and on mains; where patience ends, the figure says what it did not wait out."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edgeopt_agent.calm import MAX_TEMPERATURE_C, Calm, limit_c, on_mains
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.measurement import Conditions, Measurement, Timing

NOTHING_ASKED = lambda command: ""  # noqa: E731


class Board:
    """A folder like a board's /sys and /proc, and a clock that a sleep moves; `then` maps seconds to what changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seconds = 0.0
        self.then: dict[float, Callable[[], None]] = {}
        self.busy_cores = 0.0
        self.waiting = 0.0
        self.served = 0
        self._ticks, self._waited_us = 0.0, 0.0

    def put(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def warm(self, celsius: float) -> None:
        self.put("sys/class/thermal/thermal_zone0/temp", str(round(celsius * 1000)))

    def sleep(self, seconds: float) -> None:
        for at in sorted(self.then):
            if at <= self.seconds + seconds:
                self.then.pop(at)()
        self.seconds += seconds
        self._ticks += 100 * seconds * self.busy_cores
        self._waited_us += 1e6 * seconds * self.waiting
        self.write_load()

    def write_load(self) -> None:
        self.put(
            "proc/stat",
            f"cpu  {round(self._ticks)} 0 0 {round(400 * self.seconds)} 7 0 0 0 0 0\ncpu0 1 2 3 4",
        )
        self.put(
            "proc/pressure/cpu", f"some avg10=0.00 avg60=0.00 avg300=0.00 total={round(self._waited_us)}"
        )

    def calm(self) -> Calm:
        return Calm(
            root=self.root,
            ask=NOTHING_ASKED,
            served=lambda: self.served,
            monotonic=lambda: self.seconds,
            sleep=self.sleep,
        )


@pytest.fixture
def board(tmp_path: Path) -> Board:
    made = Board(tmp_path)
    made.warm(45)
    made.write_load()
    return made


def _measured() -> Measurement:
    return Measurement(
        package_sha256="a" * 64,
        model="tiny",
        version="1",
        variant="a",
        precision="float32",
        device_id="d1",
        device_class="host",
        agent_version="0",
        measured_at=datetime(2026, 11, 25, tzinfo=UTC),
        conditions=Conditions("null", "1", 1, 1, "cpu", "x", "y", "z"),
        timing=Timing.of([10**6] * 10, warmup=1, load_ns=1, first_inference_ns=1),
        golden_ok=True,
    )


def test_a_cool_and_idle_board_is_measured_after_one_look(board: Board) -> None:
    seen = board.calm().wait(300)
    assert (seen.cool, seen.idle, seen.mains, seen.why) == (True, True, None, "")
    assert seen.waited_s == 1.0


def test_a_hot_board_is_waited_for_until_it_is_cool_and_moves_no_more(board: Board) -> None:
    board.warm(85)
    board.then = {20: lambda: board.warm(65), 30: lambda: board.warm(55)}
    seen = board.calm().wait(300)
    assert seen.is_calm
    assert 39 <= seen.waited_s <= 42, "10 s after the last movement"


def test_patience_ends_and_the_figure_says_what_was_seen(board: Board) -> None:
    board.warm(85)
    board.busy_cores, board.waiting = 1.5, 0.4
    calm = board.calm()
    seen = calm.wait(30)
    assert (seen.cool, seen.idle, seen.waited_s) == (False, False, 30.0)
    found = from_bytes(Measurement, to_bytes(calm.watch(_measured, seen)))
    assert found.conditions.extra["cool"] is False
    assert found.conditions.extra["idle"] is False
    assert found.conditions.extra["waited_s"] == 30.0
    assert "85 degrees, at most 70" in found.conditions.extra["not_calm"]
    assert "others kept 1.5 cores busy" in found.conditions.extra["not_calm"]


def test_who_waits_for_a_cpu_is_load_as_well(board: Board) -> None:
    board.busy_cores, board.waiting = 0.1, 0.4
    seen = board.calm().wait(5)
    assert seen.idle is False
    assert "waited for a CPU 40% of the time" in seen.why


def test_requests_in_service_are_waited_for(board: Board) -> None:
    calm = board.calm()
    board.then = {second: lambda: setattr(board, "served", board.served + 3) for second in (0.5, 1.5, 2.5)}
    seen = calm.wait(60)
    assert seen.is_calm
    assert seen.waited_s == 4.0


def test_a_request_while_it_is_measured_is_said(board: Board) -> None:
    calm = board.calm()
    seen = calm.wait(60)

    def measure() -> Measurement:
        board.served += 2
        board.sleep(1)
        return _measured()

    found = calm.watch(measure, seen).conditions.extra
    assert (found["cool"], found["idle"], found["not_calm"]) == (True, False, "2 requests were served")


def test_a_board_without_sensors_says_unknown_and_nobody_waits(tmp_path: Path) -> None:
    calm = Calm(root=tmp_path, ask=NOTHING_ASKED, sleep=lambda seconds: None)
    seen = calm.wait(0.2)
    assert (seen.cool, seen.idle, seen.mains, seen.is_calm) == (None, None, None, True)
    found = calm.watch(_measured, seen).conditions.extra
    assert (found["cool"], found["idle"]) == (None, None)
    assert "not_calm" not in found


def test_without_patience_nothing_is_waited_for(board: Board) -> None:
    board.warm(85)
    seen = board.calm().wait(0)
    assert (seen.cool, seen.idle, seen.waited_s) == (False, None, 0.0)


def test_the_limit_is_below_where_the_kernel_throttles(board: Board) -> None:
    assert limit_c(board.root) == MAX_TEMPERATURE_C
    zone = "sys/class/thermal/thermal_zone0"
    for number, (kind, celsius) in enumerate((("critical", 110), ("passive", 80), ("passive", 0))):
        board.put(f"{zone}/trip_point_{number}_type", kind)
        board.put(f"{zone}/trip_point_{number}_temp", str(celsius * 1000))
    assert limit_c(board.root) == 70.0
    board.put(f"{zone}/trip_point_1_temp", "60000")
    assert limit_c(board.root) == 50.0
    board.warm(52)
    assert board.calm().wait(0).cool is False


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (
            {"AC": {"type": "Mains", "online": "1"}, "BAT0": {"type": "Battery", "status": "Discharging"}},
            True,
        ),
        (
            {"AC": {"type": "Mains", "online": "0"}, "BAT0": {"type": "Battery", "status": "Discharging"}},
            False,
        ),
        ({"BAT0": {"type": "Battery", "status": "Charging"}}, True),
        ({"mouse": {"type": "Battery", "scope": "Device", "status": "Discharging"}}, None),
    ],
)
def test_a_board_on_its_battery_is_not_measured_yet(
    board: Board, files: dict[str, dict[str, str]], expected: bool | None
) -> None:
    for name, entries in files.items():
        for key, text in entries.items():
            board.put(f"sys/class/power_supply/{name}/{key}", text)
    assert on_mains(board.root) is expected
    assert board.calm().wait(2).is_calm is (expected is not False)


def test_whoever_is_told_to_stop_does_not_wait_on(board: Board) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    board.warm(85)
    with pytest.raises(Stopped):
        board.calm().wait(300, stop)
    assert board.seconds == 1.0


@pytest.fixture
def spinning() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    process.kill()
    process.wait()


@pytest.mark.usefixtures("spinning")
def test_a_real_process_that_spins_on_this_machine_is_seen() -> None:
    calm = Calm()
    time.sleep(0.3)  # its interpreter starts
    seen = calm.wait(1.5)
    assert seen.idle is False
    assert "cores busy" in seen.why
    assert calm.watch(lambda: (time.sleep(0.5), _measured())[1], seen).conditions.extra["idle"] is False


def test_the_probes_own_time_is_no_load_of_others() -> None:
    calm = Calm()
    work = "import time\nend = time.process_time() + 1.2\nwhile time.process_time() < end: pass"
    before = calm.load()
    subprocess.run([sys.executable, "-c", work], check=True)
    after = calm.load()
    assert after.busy_s is not None
    assert before.busy_s is not None
    assert after.probes_s - before.probes_s >= 1.2
    assert after.busy_s - before.busy_s >= 1.0
