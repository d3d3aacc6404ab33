# SPDX-License-Identifier: Apache-2.0
"""What a device and the control plane may say: closed sets, bounded runs, values that contradict nothing."""

import json
from datetime import UTC, datetime

import pytest

from edgeopt_wire.document import from_bytes, from_json, to_bytes
from edgeopt_wire.errors import DocumentError
from edgeopt_wire.messages import (
    Ack,
    Desired,
    DesiredModel,
    Event,
    EventBatch,
    MetaReply,
    Phase,
    Presence,
    Pull,
    PullRefused,
    Reported,
    ReportedModel,
)

AT = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "ab" * 32
NET = DesiredModel("net", "1", "models/net/1/host.json")


def test_the_phases_are_a_closed_set_of_words() -> None:
    assert [phase.value for phase in Phase] == [
        "idle", "resolving", "downloading", "verifying", "staged", "probing", "trial", "committed",
        "rolling_back", "rolled_back", "failed",
    ]  # fmt: skip
    with pytest.raises(DocumentError, match="'exploded' is none of idle, resolving"):
        from_json(ReportedModel, {"name": "net", "phase": "exploded"})


def test_a_model_is_desired_once() -> None:
    with pytest.raises(ValueError, match="desired once"):
        Desired("d", 1, AT, AT, (NET, NET))


@pytest.mark.parametrize("name", ["Net", "../net", "", "a/b", "a..b", "x" * 101, "net\n"])
def test_a_desired_model_has_a_safe_name(name: str) -> None:
    with pytest.raises(ValueError, match="must match"):
        DesiredModel(name, "1", "models/net/1/host.json")
    with pytest.raises(ValueError, match="must match"):
        DesiredModel("net", name, "models/net/1/host.json")


@pytest.mark.parametrize("run", [(-1, 1), (0, 0), (3, -2)])
def test_a_pull_asks_for_real_chunks(run: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="first >= 0, count >= 1"):
        Pull(DIGEST, (run,))


@pytest.mark.parametrize("digest", ["", "ab", "AB" * 32, "g" * 64, DIGEST + "\n"])
def test_a_pull_names_a_blob_by_its_digest(digest: str) -> None:
    with pytest.raises(ValueError, match="64 lower-case hexadecimal"):
        Pull(digest, ())


def test_a_run_on_the_wire_is_exactly_two_numbers() -> None:
    with pytest.raises(DocumentError, match=r"Pull\.runs\[0\]: expected 2 entries, found 3"):
        from_json(Pull, {"schema": "edgeopt.pull/1", "sha256": DIGEST, "runs": [[1, 2, 3]]})


@pytest.mark.parametrize(
    "message",
    [
        Desired("d", 3, AT, AT, (NET,), {"new": 1}),
        Reported("d", "host", "s", 3, "0.1.0", (ReportedModel("net", Phase.TRIAL),), extra={"new": [1]}),
        Presence("d", True, "s"),
        EventBatch("d", (Event(1, "phase", AT, {"to": "trial"}),), "o", 2),
        Ack("o", 9),
        Pull(DIGEST, ((0, 4), (9, 1))),
        PullRefused(DIGEST, "not for this device"),
        MetaReply("1", False),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_comes_back_equal_and_says_what_it_is(message: object) -> None:
    raw = to_bytes(message)
    assert from_bytes(type(message), raw) == message
    assert json.loads(raw)["schema"] == type(message).SCHEMA


def test_one_message_is_never_read_as_another() -> None:
    with pytest.raises(DocumentError, match=r"expected schema 'edgeopt\.ack/1', found 'edgeopt\.presence/1'"):
        from_bytes(Ack, to_bytes(Presence("d", True, "s")))
