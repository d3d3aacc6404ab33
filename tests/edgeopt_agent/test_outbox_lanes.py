# SPDX-License-Identifier: Apache-2.0
"""What is urgent goes first and is dropped last; who is back after a week sends a summary, then the newest, at its rate."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from edgeopt_agent import outbox as outbox_module
from edgeopt_agent.outbox import BATCH_EVENTS, Outbox
from edgeopt_agent.summaries import MOST_BYTES, merged, summarize
from edgeopt_agent.telling import RESEND_EVENTS_S, Teller
from edgeopt_agent.urgency import Lane
from edgeopt_wire.document import canonical_bytes, format_moment, to_bytes
from edgeopt_wire.messages import Ack, Event, EventBatch, Reported
from edgeopt_wire.sketch import Sketch

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
WEEK_H = 7 * 24


def window(hour: int, *latencies: float, variant: str = "a", load: str = "low") -> dict[str, Any]:
    sketch = Sketch()
    for latency in latencies:
        sketch.add(latency)
    return {
        "schema": "edgeopt.service/1",
        "model": "tiny",
        "version": "1",
        "variant": variant,
        "condition": {"power_mode": "", "load": load},
        "from": format_moment(NOW + timedelta(hours=hour)),
        "to": format_moment(NOW + timedelta(hours=hour + 1)),
        "calls": sketch.count,
        "rows": 2 * sketch.count,
        "failed": 1,
        "run_ns": sketch.to_json(),
        "inputs": {},
    }


def week(outbox: Outbox) -> None:
    """Two conditions a day, one window an hour."""
    for hour in range(WEEK_H):
        load = "high" if hour % 24 in range(8, 20) else "low"
        outbox.add("service", NOW, window(hour, *(1e6 + 1e4 * hour + i for i in range(10)), load=load))


def sequences(batch: EventBatch | None) -> list[int]:
    return [event.sequence for event in batch.events] if batch else []


class Line:
    """A transport that is there and keeps what it is handed."""

    def __init__(self, tell_bytes_s: int = 0) -> None:
        self.is_online = True
        self.tell_bytes_s = tell_bytes_s
        self.batches: list[EventBatch] = []

    def send(self, batch: EventBatch) -> bool:
        self.batches.append(batch)
        return True

    def report(self, reported: Reported) -> None:
        """Of no interest here."""


class Device:
    """A teller, its line and a clock."""

    def __init__(self, folder: Path, tell_bytes_s: int = 0) -> None:
        self.seconds = 0.0
        self.outbox = Outbox(folder, "d1")
        self.line = Line(tell_bytes_s)
        self.teller = Teller(
            self.line,  # type: ignore[arg-type]
            self.outbox,
            lambda: NOW,
            lambda: self.seconds,
            lambda: Reported("d1", "host", "s", 0, "0", ()),
        )

    def drain(self) -> list[list[Event]]:
        """Every batch until nothing waits, each acknowledged at once as a control plane does: before its first gap."""
        while len(self.outbox) and self.seconds < 1e5:
            known = len(self.line.batches)
            self.teller.send()
            for batch in self.line.batches[known:]:
                last = batch.events[0].sequence
                while last + 1 in sequences(batch):
                    last += 1
                self.teller.acknowledge(Ack(batch.outbox, last))
            self.seconds += 0.5
        return [list(batch.events) for batch in self.line.batches]


def test_urgent_events_go_before_telemetry_and_telemetry_newest_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "d1")
    for number in range(3 * BATCH_EVENTS):
        outbox.add("trust" if number == 5 else "service", NOW, window(number, 1e6))
    assert sequences(outbox.batch()) == [6]
    assert sequences(outbox.batch(Lane.BULK)) == list(range(2 * BATCH_EVENTS + 1, 3 * BATCH_EVENTS + 1))
    assert outbox.acknowledge(outbox.id, 3 * BATCH_EVENTS) is Lane.BULK
    assert sequences(outbox.batch()) == [6]  # still on its way
    assert outbox.acknowledge(outbox.id, 6) is Lane.URGENT
    assert sequences(outbox.batch()) == list(range(BATCH_EVENTS + 1, 2 * BATCH_EVENTS + 1))


def test_lanes_are_known_after_a_start(tmp_path: Path) -> None:
    before = Outbox(tmp_path, "d1")
    for kind in ("service", "phase", "summary", "measurement"):
        before.add(kind, NOW, {})
    assert sequences(Outbox(tmp_path, "d1").batch(Lane.BULK)) == [1, 4]
    assert sequences(Outbox(tmp_path, "d1").batch()) == [2]


def test_full_outbox_drops_telemetry_before_alarms_the_oldest_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "d1", 4)
    for number in range(1, 9):
        outbox.add("trust" if number in (1, 2, 5) else "service", NOW, {})
    assert (sequences(outbox.batch(Lane.URGENT)), sequences(outbox.batch(Lane.BULK))) == ([1, 2, 5], [8])
    assert outbox.dropped == 4


def test_summary_merges_what_was_served_by_condition(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "d1")
    week(outbox)
    assert summarize(outbox, NOW)
    (event,) = outbox.events("summary")
    parts = {part["condition"]["load"]: part for part in event.body["parts"]}
    assert (event.body["events"], event.body["windows"], event.body["left_out"]) == ([1, WEEK_H], WEEK_H, 0)
    assert [
        (parts[load]["windows"], parts[load]["calls"], parts[load]["failed"]) for load in ("low", "high")
    ] == [
        (84, 840, 84),
        (84, 840, 84),
    ]
    assert parts["low"]["from"] == format_moment(NOW)
    assert parts["low"]["to"] == format_moment(NOW + timedelta(hours=WEEK_H))
    everything = sorted(
        1e6 + 1e4 * hour + i for hour in range(WEEK_H) if hour % 24 not in range(8, 20) for i in range(10)
    )
    assert Sketch.from_json(parts["low"]["run_ns"]).quantile(0.5) == pytest.approx(everything[419], rel=0.01)


def test_no_window_is_summarized_twice_even_where_the_record_is_lost_behind_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path, "d1")
    week(outbox)
    with monkeypatch.context() as patch:
        patch.setattr(
            outbox_module.Outbox, "_try_to_save", lambda _: True
        )  # the power fails before the record
        assert summarize(outbox, NOW)
    again = Outbox(tmp_path, "d1")
    assert not summarize(again, NOW)
    for hour in range(BATCH_EVENTS + 1):
        again.add("service", NOW, window(WEEK_H + hour, 1e6))
    assert summarize(again, NOW)
    assert [event.body["windows"] for event in again.events("summary")] == [WEEK_H, BATCH_EVENTS + 1]


def test_summary_is_bounded_and_says_what_it_left_out() -> None:
    rows = [
        Event(
            number + 1,
            "service",
            NOW,
            window(0, *([1e6 * 1.3**k for k in range(number % 40)]), variant=f"v{number}"),
        )
        for number in range(400)
    ]
    rows.append(Event(401, "service", NOW, {"model": "tiny"}))
    body = merged(rows)
    assert len(canonical_bytes(body["parts"])) <= MOST_BYTES
    assert sum(part["windows"] for part in body["parts"]) + body["left_out"] == 401
    assert body["parts"][0]["calls"] == 39


def test_back_after_a_week_alarms_then_the_summary_then_the_newest(tmp_path: Path) -> None:
    device = Device(tmp_path)
    week(device.outbox)
    device.teller.alarm("tiny", "somebody lied")
    device.teller.is_due(events=True)
    batches = device.drain()
    assert [batches[0][0].kind, batches[1][0].kind] == ["trust", "summary"]
    told = [event.sequence for batch in batches[2:] for event in batch]
    assert [batch[-1].sequence for batch in batches[2:]][:3] == [
        WEEK_H,
        WEEK_H - BATCH_EVENTS,
        WEEK_H - 2 * BATCH_EVENTS,
    ]
    assert sorted(told) == list(range(1, WEEK_H + 1))
    assert device.outbox.dropped == 0


def test_all_but_urgent_events_keep_to_the_rate(tmp_path: Path) -> None:
    device = Device(tmp_path, tell_bytes_s=2048)
    week(device.outbox)
    device.drain()
    size = sum(len(to_bytes(batch)) for batch in device.line.batches[:-1])  # the last one's time is to come
    assert device.seconds >= size / 2048
    device.teller.keep("tiny", device_measurement())
    device.teller.alarm("tiny", "somebody lied")
    known = len(device.line.batches)
    device.teller.send()
    assert [event.kind for batch in device.line.batches[known:] for event in batch.events] == ["trust"]


def test_urgent_event_does_not_wait_for_telemetry_that_nobody_acknowledges(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.outbox.add("service", NOW, window(0, 1e6))
    device.teller.send()
    device.seconds += 1
    device.teller.alarm("tiny", "somebody lied")
    device.teller.send()
    assert [sequences(batch) for batch in device.line.batches] == [[1], [2]]


def test_pause_before_telemetry_is_sent_again_doubles(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.outbox.add("service", NOW, window(0, 1e6))
    for _ in range(3600):
        device.teller.send()
        device.seconds += 1
    assert len(device.line.batches) < 3600 / RESEND_EVENTS_S / 8


def device_measurement() -> Any:
    from edgeopt_wire.measurement import Conditions, Measurement

    return Measurement(
        package_sha256="b" * 64,
        model="tiny",
        version="1",
        variant="a",
        precision="int8",
        device_id="d1",
        device_class="host",
        agent_version="0",
        measured_at=NOW,
        conditions=Conditions("null", "1", 1, 1, "cpu", "x86_64", "a CPU", "linux"),
        timing=None,
        golden_ok=True,
        error="it crashed",
    )
