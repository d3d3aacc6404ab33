# SPDX-License-Identifier: Apache-2.0
"""Events wait on disk until they are acknowledged; what cannot be kept is counted."""

import errno
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edgeopt_agent import outbox as outbox_module
from edgeopt_agent.outbox import BATCH_EVENTS, Outbox
from edgeopt_wire.errors import StoreError

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def filled(folder: Path, count: int, limit: int = 100) -> Outbox:
    outbox = Outbox(folder, "d1", limit)
    for number in range(count):
        outbox.add("phase", NOW, {"number": number})
    return outbox


def numbers(outbox: Outbox) -> list[int]:
    batch = outbox.batch()
    return [event.body["number"] for event in batch.events] if batch else []


def test_events_survive_a_start_in_order(tmp_path: Path) -> None:
    before = filled(tmp_path, 3)
    after = Outbox(tmp_path, "d1")
    assert (after.id, numbers(after)) == (before.id, [0, 1, 2])


def test_events_stay_until_they_are_acknowledged(tmp_path: Path) -> None:
    outbox = filled(tmp_path, 3)
    assert numbers(outbox) == numbers(outbox) == [0, 1, 2]
    outbox.acknowledge(outbox.id, 2)
    assert numbers(outbox) == [2]


def test_acknowledgement_of_another_outbox_means_nothing(tmp_path: Path) -> None:
    outbox = filled(tmp_path, 2)
    outbox.acknowledge("somebody else", 2)
    assert len(outbox) == 2


def test_beyond_the_bound_the_oldest_goes_and_is_counted_for_ever(tmp_path: Path) -> None:
    outbox = filled(tmp_path, 7, limit=4)
    assert (numbers(outbox), outbox.dropped) == ([3, 4, 5, 6], 3)
    again = Outbox(tmp_path, "d1", 4)
    batch = again.batch()
    assert batch is not None
    assert batch.dropped == 3


def test_sequence_numbers_never_come_twice(tmp_path: Path) -> None:
    outbox = filled(tmp_path, 2)
    assert numbers(outbox) == [0, 1]
    outbox.acknowledge(outbox.id, 2)
    again = Outbox(tmp_path, "d1")
    again.add("phase", NOW, {"number": 9})
    batch = again.batch()
    assert batch is not None
    assert [event.sequence for event in batch.events] == [3]


def test_lost_record_starts_another_outbox_and_counts_what_it_lost(tmp_path: Path) -> None:
    before = filled(tmp_path, 3)
    (tmp_path / "outbox.json").write_bytes(b"\0")
    after = Outbox(tmp_path, "d1")
    assert after.id != before.id
    assert (len(after), after.dropped) == (0, 3)


def test_event_that_the_disk_damaged_is_counted_and_does_not_block_the_rest(tmp_path: Path) -> None:
    outbox = filled(tmp_path, 3)
    (tmp_path / "000000000001.event").write_bytes(b"\xff")
    assert (numbers(outbox), outbox.dropped) == ([1, 2], 1)


def test_batch_is_bounded(tmp_path: Path) -> None:
    outbox = filled(tmp_path, BATCH_EVENTS + 5)
    assert numbers(outbox) == list(range(BATCH_EVENTS))


def test_first_record_is_there_before_the_first_event(tmp_path: Path) -> None:
    first = Outbox(tmp_path, "d1")
    assert Outbox(tmp_path, "d1").id == first.id


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk does not read files of that name."""
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)


def test_record_that_is_not_read_for_a_moment_costs_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = filled(tmp_path, 3)
    with monkeypatch.context() as patch:
        refuse(patch, "outbox.json")
        after = Outbox(tmp_path, "d1")
        assert after.batch() is None
        with pytest.raises(StoreError):
            after.add("phase", NOW, {"number": 3})
    assert (numbers(after), after.id, after.dropped) == ([0, 1, 2], before.id, 1)


def test_event_that_is_not_read_for_a_moment_waits_and_no_acknowledgement_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = filled(tmp_path, 3)
    with monkeypatch.context() as patch:
        refuse(patch, "000000000001.event")
        assert numbers(outbox) == [1, 2]
        outbox.acknowledge(outbox.id, 3)
    assert (numbers(outbox), outbox.dropped) == ([0], 0)


def test_power_cut_between_counting_a_drop_and_dropping_counts_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = filled(tmp_path, 4, limit=4)
    with monkeypatch.context() as patch:
        patch.setattr(outbox_module.Outbox, "_remove", lambda *_: None)
        outbox.add("phase", NOW, {"number": 4})
    after = Outbox(tmp_path, "d1", 4)
    assert (numbers(after), after.dropped) == ([1, 2, 3, 4], 1)


def test_what_was_handed_over_is_never_dropped_and_what_was_not_goes_instead(tmp_path: Path) -> None:
    outbox = filled(tmp_path, BATCH_EVENTS + 2, limit=BATCH_EVENTS + 2)
    assert numbers(outbox) == list(range(BATCH_EVENTS))  # delivered, and nobody acknowledges
    for number in range(100, 105):
        outbox.add("phase", NOW, {"number": number})
    assert (numbers(outbox), outbox.dropped) == (list(range(BATCH_EVENTS)), 5)
    outbox.acknowledge(outbox.id, BATCH_EVENTS)
    assert numbers(outbox) == [103, 104]


def test_start_knows_what_was_handed_over(tmp_path: Path) -> None:
    assert numbers(filled(tmp_path, BATCH_EVENTS, limit=BATCH_EVENTS + 1)) == list(range(BATCH_EVENTS))
    again = Outbox(tmp_path, "d1", BATCH_EVENTS + 1)
    for number in range(100, 103):
        again.add("phase", NOW, {"number": number})
    assert (numbers(again), again.dropped, len(again)) == (
        list(range(BATCH_EVENTS)),
        2,
        BATCH_EVENTS + 1,
    )


def test_acknowledgement_of_a_batch_that_is_not_on_its_way_says_nothing(tmp_path: Path) -> None:
    outbox = filled(tmp_path, BATCH_EVENTS + 3)
    outbox.acknowledge(outbox.id, 3)  # nothing was handed over
    assert numbers(outbox) == list(range(BATCH_EVENTS))
    outbox.acknowledge(outbox.id, BATCH_EVENTS + 2)
    assert len(outbox) == BATCH_EVENTS + 3


def test_drop_that_the_record_does_not_know_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = filled(tmp_path, 3, limit=3)
    with monkeypatch.context() as patch:
        patch.setattr(outbox_module.Outbox, "_try_to_save", lambda _: False)  # the disk refuses the record
        outbox.add("phase", NOW, {"number": 3})
        batch = outbox.batch()
    assert batch is not None
    assert ([event.body["number"] for event in batch.events], batch.dropped) == ([1, 2, 3], 0)
    again = Outbox(tmp_path, "d1", 4)  # the process ended before the disk took it: nothing is lost
    assert (numbers(again), again.dropped) == ([0, 1, 2, 3], 0)


def test_removed_files_that_a_power_cut_brings_back_are_neither_dropped_nor_delivered_as_new(
    tmp_path: Path,
) -> None:
    outbox = filled(tmp_path, 2, limit=2)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.event")}
    assert numbers(outbox) == [0, 1]
    outbox.acknowledge(outbox.id, 2)
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    again = Outbox(tmp_path, "d1", 2)
    for number in (7, 8, 9):
        again.add("phase", NOW, {"number": number})
    assert (numbers(again), again.dropped) == ([0, 1], 3)  # sent again, and the ledger has them


def test_numbers_are_not_given_again_where_the_record_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = filled(tmp_path, 1)
    real = outbox_module.write_durably

    def refuse_the_record(path: Path, content: bytes) -> None:
        if path.name == "outbox.json":
            raise StoreError("the disk is full")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(outbox_module, "write_durably", refuse_the_record)
        outbox.add("phase", NOW, {"number": 1})
        assert numbers(outbox) == [0, 1]  # a full disk silences nobody
        outbox.acknowledge(outbox.id, 2)
        assert len(outbox) == 2
    outbox.acknowledge(outbox.id, 2)
    again = Outbox(tmp_path, "d1")
    again.add("phase", NOW, {"number": 2})
    batch = again.batch()
    assert batch is not None
    assert [event.sequence for event in batch.events] == [3]


def test_event_that_the_disk_refuses_counts_as_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = filled(tmp_path, 1)
    with monkeypatch.context() as patch:

        def refuse(path: Path, content: bytes) -> None:
            raise StoreError("the disk is full")

        patch.setattr(outbox_module, "write_durably", refuse)
        with pytest.raises(StoreError):
            outbox.add("phase", NOW, {"number": 1})
    outbox.add("phase", NOW, {"number": 2})
    batch = Outbox(tmp_path, "d1").batch()
    assert batch is not None
    assert ([event.body["number"] for event in batch.events], batch.dropped) == ([0, 2], 1)


def test_record_of_an_older_agent_keeps_its_count(tmp_path: Path) -> None:
    before = filled(tmp_path, 3)
    record = {"id": before.id, "next": 4, "dropped": 1, "gone": 1}
    (tmp_path / "outbox.json").write_text(json.dumps(record))
    after = Outbox(tmp_path, "d1")
    assert (numbers(after), after.id, after.dropped) == ([1, 2], before.id, 1)
