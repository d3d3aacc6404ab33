# SPDX-License-Identifier: Apache-2.0
import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from securesystemslib.dsse import Envelope
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from edgeopt.fleet.app import make_app
from edgeopt.fleet.catalog import MAX_CHUNKS_A_PULL, Catalog
from edgeopt.fleet.control import DESIRED_LIFETIME, Control
from edgeopt.fleet.database import Device, engine_of, open_database, sqlite_url
from edgeopt.fleet.queries import Queries
from edgeopt.keys import load_signer
from edgeopt.publish import publish
from edgeopt_wire.document import from_bytes, to_json
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.measurement import Conditions, Measurement, Timing
from edgeopt_wire.messages import (
    DESIRED_TYPE,
    Desired,
    Event,
    EventBatch,
    MetaRequest,
    Phase,
    Presence,
    Pull,
    Reported,
    ReportedModel,
)

MakePackage = Callable[..., Path]
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


class Fleet:
    """A control plane on a real SQLite file and a real repository, with a clock that the test turns."""

    def __init__(self, folder: Path, keys: Path, make_package: MakePackage) -> None:
        self.now = NOON
        self.repository = folder / "repo"
        self.keys = keys
        self.make_package = make_package
        folder.mkdir(exist_ok=True)
        self.sessions: sessionmaker[Session] = open_database(sqlite_url(folder))
        self.catalog = Catalog(self.repository)
        self.control = Control(self.sessions, self.catalog, load_signer(keys, "director"), lambda: self.now)
        self.queries = Queries(self.sessions, self.catalog)

    def publish(self, version: str = "1", device: str = "host", **more: Any) -> Any:
        package = self.make_package(version=version, device=device, **more)
        return publish(package, self.repository, self.keys, now=self.now).index

    def enrol(self, *devices: str, device_class: str = "host") -> None:
        for device in devices:
            self.control.enrol(device, device_class, stand_in=False)

    def roll_out(self, version: str = "1", **changes: Any) -> int:
        options = {
            "classes": [],
            "devices": [],
            "waves": [100],
            "deadline_s": 600,
            "max_failures": 0,
            **changes,
        }
        return self.control.create_rollout(**{"model": "tiny", "version": version, **options})

    def report(
        self, device: str, phase: Phase, version: str = "", candidate: str = "", rollout: int | str = ""
    ) -> bool:
        model = ReportedModel(
            "tiny", phase, version=version, candidate_version=candidate, rollout=str(rollout)
        )
        revision = self.desired(device).revision if self.control.envelope(device) else 0
        return self.control.take_report(Reported(device, "host", "s", revision, "0", (model,)))

    def desired(self, device: str) -> Desired:
        raw = self.control.envelope(device)
        assert raw is not None
        envelope = Envelope.from_dict(json.loads(raw))
        envelope.verify([load_signer(self.keys, "director").public_key], threshold=1)
        assert envelope.payload_type == DESIRED_TYPE
        return from_bytes(Desired, envelope.payload)

    def statuses(self, rollout: int) -> tuple[str, dict[str, str]]:
        found = self.queries.rollout(rollout)
        assert found is not None
        return found["status"], {device["id"]: device["status"] for device in found["devices"]}


@pytest.fixture
def fleet(tmp_path: Path, keys: Path, make_package: MakePackage) -> Iterator[Fleet]:
    made = Fleet(tmp_path / "fleet", keys, make_package)
    yield made
    engine_of(made.sessions).dispose()


def measurement(**changes: Any) -> Measurement:
    found = Measurement(
        package_sha256="b" * 64,
        model="tiny",
        version="1",
        variant="a",
        precision="int8",
        device_id="d1",
        device_class="host",
        agent_version="0",
        measured_at=NOON,
        conditions=Conditions(
            "null", "1", 1, 1, "cpu", "x86_64", "a CPU", "linux", stand_in_for="raspberry-pi-4"
        ),
        timing=Timing.of([1_000_000] * 90 + [3_000_000] * 10, warmup=5, load_ns=1, first_inference_ns=2),
        golden_ok=True,
    )
    return replace(found, **changes)


def batch(*sequences: int, outbox: str = "o", device: str = "d1", body: Any = None) -> EventBatch:
    content = to_json(measurement()) if body is None else body
    return EventBatch(
        device, tuple(Event(number, "measurement", NOON, content) for number in sequences), outbox
    )


def test_device_is_told_what_to_run_and_the_rollout_ends_when_it_has_committed(fleet: Fleet) -> None:
    fleet.publish()
    fleet.enrol("d1")
    assert fleet.control.envelope("d1") is None
    rollout = fleet.roll_out()
    assert fleet.control.step() == ["d1"]
    desired = fleet.desired("d1")
    assert (desired.device, desired.revision, desired.expires_at - desired.issued_at) == (
        "d1",
        1,
        DESIRED_LIFETIME,
    )
    assert [(m.name, m.version, m.target) for m in desired.models] == [
        ("tiny", "1", "models/tiny/1/host.json")
    ]
    fleet.report("d1", Phase.DOWNLOADING, candidate="1")
    assert fleet.statuses(rollout) == ("running", {"d1": "downloading"})
    fleet.report("d1", Phase.COMMITTED, version="1")
    assert fleet.control.step() == []
    assert fleet.statuses(rollout) == ("succeeded", {"d1": "succeeded"})


def test_second_wave_is_told_nothing_before_the_first_has_committed(fleet: Fleet) -> None:
    fleet.publish()
    fleet.enrol("a", "b", "c", "d")
    fleet.roll_out(waves=[25, 100])
    assert fleet.control.step() == ["a"]
    assert [fleet.control.envelope(device) for device in "bcd"] == [None] * 3
    fleet.report("a", Phase.COMMITTED, version="1")
    assert fleet.control.step() == ["b", "c", "d"]


def test_bad_version_halts_at_the_first_wave_and_its_device_is_told_the_old_one_again(fleet: Fleet) -> None:
    fleet.publish("1")
    fleet.enrol("a", "b")
    fleet.roll_out("1")
    fleet.control.step()
    for device in ("a", "b"):
        fleet.report(device, Phase.COMMITTED, version="1")
    fleet.control.step()
    fleet.publish("2")
    bad = fleet.roll_out("2", waves=[50, 100])
    assert fleet.control.step() == ["a"]
    fleet.report("a", Phase.ROLLED_BACK, version="1", candidate="2")
    assert fleet.control.step() == ["a"]
    assert fleet.statuses(bad) == ("halted", {"a": "rolled_back", "b": "removed"})
    assert [fleet.desired(device).models[0].version for device in "ab"] == ["1", "1"]


def test_silent_device_times_out(fleet: Fleet) -> None:
    fleet.publish()
    fleet.enrol("d1")
    rollout = fleet.roll_out(deadline_s=60)
    fleet.control.step()
    fleet.now += timedelta(seconds=60)
    fleet.control.step()
    assert fleet.statuses(rollout)[0] == "running"
    fleet.now += timedelta(seconds=1)
    fleet.control.step()
    assert fleet.statuses(rollout) == ("halted", {"d1": "timed_out"})


def test_aborted_rollout_takes_its_offer_back(fleet: Fleet) -> None:
    fleet.publish()
    fleet.enrol("d1")
    rollout = fleet.roll_out()
    fleet.control.step()
    fleet.control.abort(rollout)
    assert fleet.control.step() == ["d1"]
    assert fleet.desired("d1").models == ()
    assert fleet.desired("d1").revision == 2
    with pytest.raises(RecipeError, match="no running rollout"):
        fleet.control.abort(rollout)


def test_desired_document_is_signed_again_before_it_ends(fleet: Fleet) -> None:
    fleet.publish()
    fleet.enrol("d1")
    fleet.roll_out()
    fleet.control.step()
    fleet.report("d1", Phase.COMMITTED, version="1")
    fleet.now += timedelta(days=4)
    assert fleet.control.step() == []
    fleet.now += timedelta(days=2)
    assert fleet.control.step() == ["d1"]
    assert fleet.desired("d1").expires_at == fleet.now + DESIRED_LIFETIME


def test_device_that_missed_the_newest_document_is_sent_it_again(fleet: Fleet) -> None:
    fleet.publish()
    fleet.enrol("d1")
    fleet.roll_out()
    fleet.control.step()
    assert fleet.control.take_report(Reported("d1", "host", "s", 0, "0", ()))
    assert not fleet.control.take_report(Reported("d1", "host", "s", 1, "0", ()))


def test_what_a_device_found_wrong_is_shown_and_odd_facts_are_not(fleet: Fleet) -> None:
    fleet.enrol("d1", "d2", "d3")
    drift = {"tiny": {"state": "drift", "feature": "image.mean.0", "psi": 1.2}}
    facts = {"degraded": {"tiny": "damaged on the disk: a.onnx"}, "drift": drift}
    fleet.control.take_report(Reported("d1", "host", "s", 0, "0", (), facts=facts))
    fleet.control.take_report(Reported("d2", "host", "s", 0, "0", (), facts={"drift": [1], "kernel": "6"}))
    found = {entry["id"]: entry for entry in fleet.queries.devices()["devices"]}
    assert found["d1"]["degraded"] == {"tiny": "damaged on the disk: a.onnx"}
    assert found["d1"]["drift"] == drift
    assert [found[name][key] for name in ("d2", "d3") for key in ("degraded", "drift")] == [{}] * 4


def test_device_of_a_family_gets_its_own_package_before_the_familys(fleet: Fleet) -> None:
    fleet.publish(
        device="jetson-orin", classes=("jetson-orin", "jetson-orin-nx-16gb", "jetson-agx-orin-64gb")
    )
    fleet.publish(device="jetson-orin-nx-16gb")
    fleet.enrol("nx", device_class="jetson-orin-nx-16gb")
    fleet.enrol("agx", device_class="jetson-agx-orin-64gb")
    fleet.enrol("pi", device_class="raspberry-pi-4")
    found = fleet.queries.rollout(fleet.roll_out())
    assert found is not None
    assert {device["id"]: device["target"].rpartition("/")[2] for device in found["devices"]} == {
        "nx": "jetson-orin-nx-16gb.json",
        "agx": "jetson-orin.json",
    }


def test_wrong_wishes_are_answered_with_what_there_is(fleet: Fleet) -> None:
    with pytest.raises(RecipeError, match="published are: none"):
        fleet.roll_out()
    fleet.publish()
    with pytest.raises(RecipeError, match="published are: tiny 1"):
        fleet.roll_out("7")
    with pytest.raises(RecipeError, match="no enrolled device fits; their classes are: none"):
        fleet.roll_out()
    fleet.enrol("pi", device_class="raspberry-pi-4")
    with pytest.raises(RecipeError, match="their classes are: raspberry-pi-4"):
        fleet.roll_out()
    with pytest.raises(RecipeError, match="pi is a raspberry-pi-4, and this version is published for host"):
        fleet.roll_out(devices=["pi"])
    with pytest.raises(RecipeError, match="ghost is not enrolled; enrolled are: pi"):
        fleet.roll_out(devices=["ghost"])
    with pytest.raises(RecipeError, match="enrolled as raspberry-pi-4"):
        fleet.enrol("pi")
    with pytest.raises(RecipeError):
        fleet.enrol("a/b")
    assert fleet.queries.rollouts()["rollouts"] == []


def test_event_is_stored_once_however_often_it_is_delivered(fleet: Fleet) -> None:
    fleet.enrol("d1")
    for sequences in ((1, 2), (1, 2), (2, 3), (1, 2, 3)):
        ack = fleet.control.take_events(batch(*sequences))
        assert ack is not None
        assert ack.sequence == sequences[-1]
    assert len(fleet.queries.measurements()["measurements"]) == 3


def test_new_outbox_starts_to_count_again(fleet: Fleet) -> None:
    fleet.enrol("d1", "d2")
    for one in (batch(1), batch(1, outbox="after-reset"), batch(1, device="d2")):
        fleet.control.take_events(one)
    assert len(fleet.queries.measurements()["measurements"]) == 3


def test_what_the_outboxes_of_a_device_dropped_adds_up(fleet: Fleet) -> None:
    fleet.enrol("d1")
    for outbox, dropped in (("a", 3), ("b", 2), ("a", 4), ("a", 1), ("b", 2)):
        fleet.control.take_events(replace(batch(1, outbox=outbox), dropped=dropped))
    (device,) = fleet.queries.devices()["devices"]
    assert device["dropped_events"] == 6


def test_count_of_an_older_control_plane_goes_on(fleet: Fleet) -> None:
    fleet.enrol("d1", "d2")
    with fleet.sessions.begin() as session:
        for device in session.scalars(select(Device)):
            device.dropped_events = 5  # before outboxes were told apart
    fleet.control.take_events(replace(batch(1), dropped=7))  # the same outbox goes on
    fleet.control.take_events(replace(batch(1, device="d2"), dropped=2))  # another one
    assert [device["dropped_events"] for device in fleet.queries.devices()["devices"]] == [7, 7]


def test_ledger_keeps_the_whole_measurement_with_its_conditions(fleet: Fleet) -> None:
    fleet.enrol("d1")
    fleet.control.take_events(batch(1))
    (row,) = fleet.queries.measurements(device="d1", model="tiny")["measurements"]
    assert row["measurement"] == to_json(measurement())
    assert row["measurement"]["conditions"]["stand_in_for"] == "raspberry-pi-4"
    assert fleet.queries.measurements(device="d2")["measurements"] == []


def test_measurement_that_is_none_is_acknowledged_and_kept_out_of_the_ledger(fleet: Fleet) -> None:
    fleet.enrol("d1")
    ack = fleet.control.take_events(batch(1, body={"schema": "edgeopt.measurement/1", "p50": "fast"}))
    assert ack is not None
    assert fleet.queries.measurements()["measurements"] == []


def test_stranger_is_not_acknowledged_and_changes_nothing(fleet: Fleet) -> None:
    assert fleet.control.take_events(batch(1, device="stranger")) is None
    fleet.control.take_presence(Presence("stranger", True, "s"))
    assert not fleet.control.take_report(Reported("stranger", "host", "s", 0, "0", ()))
    assert fleet.queries.devices()["devices"] == []


def test_will_of_an_old_session_does_not_end_the_new_one(fleet: Fleet) -> None:
    fleet.enrol("d1")
    fleet.control.take_presence(Presence("d1", True, "old"))
    fleet.control.take_presence(Presence("d1", True, "new"))
    fleet.control.take_presence(Presence("d1", False, "old"))
    assert fleet.queries.devices()["devices"][0]["online"]
    fleet.control.take_presence(Presence("d1", False, "new"))
    assert not fleet.queries.devices()["devices"][0]["online"]


def test_device_gets_the_bytes_that_it_is_told_to_run_and_no_others(fleet: Fleet) -> None:
    one, two = fleet.publish("1"), fleet.publish("2")
    fleet.enrol("d1", "d2")
    fleet.roll_out("1", devices=["d1"])
    fleet.control.step()
    assert fleet.control.allowed_index("d1", one.sha256) == one
    assert fleet.control.allowed_index("d1", two.sha256) is None
    assert fleet.control.allowed_index("d2", one.sha256) is None
    assert fleet.control.allowed_index("stranger", one.sha256) is None


def test_chunks_make_the_package_again(fleet: Fleet) -> None:
    index = fleet.publish(weights=bytes(range(256)) * 2000)
    found = dict(fleet.catalog.chunks(Pull(index.sha256, ((0, 2), (2, 9999))), index))
    blob = (fleet.repository / "blobs" / index.sha256).read_bytes()
    assert b"".join(found[number] for number in sorted(found)) == blob
    assert len(list(fleet.catalog.chunks(Pull(index.sha256, ((0, 1),) * 1000), index))) == MAX_CHUNKS_A_PULL


def test_metadata_is_answered_in_pages_that_make_the_file_again(fleet: Fleet) -> None:
    for version in range(30):
        fleet.publish(str(version))
    index = fleet.publish("big", weights=bytes(65536 * 1200))
    name = next(
        path for path in (fleet.repository / "targets").rglob("*.host.json") if path.parent.name == "big"
    )
    wanted, found = str(name.relative_to(fleet.repository)), b""
    while True:
        reply = fleet.catalog.answer(MetaRequest("r", wanted, len(found)))
        assert reply.found
        found += base64.b64decode(reply.data)
        if len(found) >= reply.total_bytes:
            break
    assert found == name.read_bytes()
    assert len(found) > 65536
    assert from_bytes(type(index), found) == index


@pytest.mark.parametrize(
    "name",
    [
        "metadata/2.root.json",
        "../fleet.sqlite",
        "metadata/../../fleet.sqlite",
        "/etc/passwd",
        "blobs/x",
        "metadata",
        "",
    ],
)
def test_what_is_not_there_or_not_for_devices_is_an_explicit_no(fleet: Fleet, name: str) -> None:
    fleet.publish()
    assert not fleet.catalog.answer(MetaRequest("r", name)).found


def test_everything_survives_a_restart(fleet: Fleet, tmp_path: Path) -> None:
    fleet.publish()
    fleet.enrol("d1")
    rollout = fleet.roll_out()
    fleet.control.step()
    fleet.control.take_events(batch(1))
    sessions = open_database(sqlite_url(tmp_path / "fleet"))
    again = Control(sessions, fleet.catalog, load_signer(fleet.keys, "director"), lambda: fleet.now)
    queries = Queries(sessions, fleet.catalog)
    assert again.step() == []
    assert again.envelope("d1") == fleet.control.envelope("d1")
    assert queries.rollout(rollout) == fleet.queries.rollout(rollout)
    assert len(queries.measurements()["measurements"]) == 1
    engine_of(sessions).dispose()


def test_second_try_of_a_version_is_not_failed_by_the_word_on_the_first(fleet: Fleet) -> None:
    fleet.publish()
    fleet.enrol("d1")
    first = fleet.roll_out()
    fleet.control.step()
    fleet.report("d1", Phase.FAILED, candidate="1", rollout=first)
    fleet.control.step()
    second = fleet.roll_out()
    fleet.control.step()
    fleet.report("d1", Phase.FAILED, candidate="1", rollout=first)
    assert fleet.statuses(second)[1] == {"d1": "offered"}


def test_newer_rollout_supersedes_the_older_one_instead_of_letting_it_time_out(fleet: Fleet) -> None:
    fleet.publish("1")
    fleet.publish("2")
    fleet.enrol("d1")
    old = fleet.roll_out("1")
    fleet.control.step()
    fleet.roll_out("2")
    fleet.control.step()
    assert fleet.desired("d1").models[0].version == "2"
    assert fleet.statuses(old) == ("superseded", {"d1": "superseded"})
    fleet.now += timedelta(hours=1)
    fleet.control.step()
    assert fleet.statuses(old)[0] == "superseded"


def test_newer_rollout_leaves_other_models_and_other_devices_alone(fleet: Fleet) -> None:
    fleet.publish("1")
    fleet.publish("1", name="other")
    fleet.publish("2")
    fleet.enrol("d1", "d2")
    old = fleet.roll_out("1")
    other = fleet.roll_out("1", model="other")
    fleet.control.step()
    fleet.report("d1", Phase.COMMITTED, version="1", rollout=old)
    fleet.roll_out("2", devices=["d1"])
    fleet.control.step()
    assert fleet.statuses(old) == ("running", {"d1": "succeeded", "d2": "offered"})
    assert fleet.statuses(other) == ("running", {"d1": "offered", "d2": "offered"})


def test_longest_allowed_names_can_be_fetched(fleet: Fleet) -> None:
    fleet.publish("1", name="a" * 100, device="b" * 40)
    (path,) = (fleet.repository / "targets" / "models").rglob("*.json")
    assert fleet.catalog.answer(MetaRequest("r", str(path.relative_to(fleet.repository)))).found


def test_device_that_works_when_its_rollout_halts_still_has_a_deadline(fleet: Fleet) -> None:
    fleet.publish()
    fleet.enrol("d1", "d2")
    rollout = fleet.roll_out()
    fleet.control.step()
    fleet.report("d1", Phase.FAILED, candidate="1", rollout=rollout)
    fleet.report("d2", Phase.DOWNLOADING, candidate="1", rollout=rollout)
    fleet.control.step()
    assert fleet.statuses(rollout) == ("halted", {"d1": "failed", "d2": "downloading"})
    fleet.now += timedelta(seconds=601)
    assert fleet.control.step() == ["d2"]
    assert fleet.statuses(rollout) == ("halted", {"d1": "failed", "d2": "timed_out"})


def test_event_that_comes_twice_in_one_batch_is_stored_once(fleet: Fleet) -> None:
    fleet.enrol("d1")
    ack = fleet.control.take_events(batch(1, 2, 2, 3, 1))
    assert ack is not None
    assert ack.sequence == 3
    assert len(fleet.queries.measurements()["measurements"]) == 3


def test_acknowledgement_ends_before_a_gap_and_goes_on_behind_it(fleet: Fleet) -> None:
    fleet.enrol("d1")
    acks = [fleet.control.take_events(batch(*numbers)) for numbers in ((3, 4, 6, 7), (6, 7))]
    assert [ack.sequence for ack in acks if ack] == [4, 7]
    assert len(fleet.queries.measurements()["measurements"]) == 4


@pytest.fixture
def http(fleet: Fleet) -> TestClient:
    connection = {
        "tenant": "default",
        "mqtt_host": "127.0.0.1",
        "mqtt_port": 1,
        "broker_connected": True,
        "root": "",
    }
    app = make_app(fleet.control, fleet.queries, lambda: connection, ("fleet.example",))
    return TestClient(app, base_url="http://127.0.0.1:8765")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8765", 200),
        ("[::1]:8765", 200),
        ("fleet.example", 200),
        ("evil.example:8765", 403),
        ("localhost.evil.example", 403),
        ("[", 403),
    ],
)
def test_only_our_own_names_are_answered(http: TestClient, host: str, status: int) -> None:
    assert http.get("/api/v1/devices", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8765", 201),
        ("http://127.0.0.1:9999", 403),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_page_of_another_site_enrols_nobody(http: TestClient, origin: str, status: int) -> None:
    body = {"id": "d1", "device_class": "host"}
    assert http.post("/api/v1/devices", json=body, headers={"origin": origin}).status_code == status
    assert len(http.get("/api/v1/devices").json()["devices"]) == (status == 201)


def test_rest_tells_the_story_of_a_rollout(fleet: Fleet, http: TestClient) -> None:
    fleet.publish()
    assert http.post("/api/v1/devices", json={"id": "d1", "device_class": "host"}).status_code == 201
    made = http.post("/api/v1/rollouts", json={"model": "tiny", "version": "1"})
    assert made.status_code == 201
    number = made.json()["id"]
    fleet.control.step()
    fleet.report("d1", Phase.COMMITTED, version="1")
    fleet.control.step()
    found = http.get(f"/api/v1/rollouts/{number}").json()
    assert (found["schema"], found["status"]) == ("edgeopt.rollout/1", "succeeded")
    assert http.get("/api/v1/packages").json()["packages"][0]["name"] == "tiny"
    assert http.get("/api/v1/devices").json()["devices"][0]["models"][0]["phase"] == "committed"
    assert http.get("/api/v1/health").json()["broker_connected"]
    assert http.get("/api/v1/rollouts").json()["rollouts"][0]["id"] == number
    assert http.post(f"/api/v1/rollouts/{number}/abort").status_code == 422


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"model": "tiny", "version": "9"}, "published are: tiny 1"),
        ({"model": "tiny", "version": "1", "waves": [50]}, "end with 100"),
        ({"model": "tiny", "version": "1", "devices": ["ghost"]}, "ghost is not enrolled"),
    ],
)
def test_rest_refuses_with_the_reason(
    fleet: Fleet, http: TestClient, body: dict[str, Any], word: str
) -> None:
    fleet.publish()
    fleet.enrol("d1")
    answer = http.post("/api/v1/rollouts", json=body)
    assert answer.status_code == 422
    assert word in answer.json()["error"]


def test_rest_refuses_unknown_fields_and_odd_numbers(http: TestClient) -> None:
    assert (
        http.post("/api/v1/devices", json={"id": "a", "device_class": "host", "admin": True}).status_code
        == 422
    )
    assert (
        http.post("/api/v1/rollouts", json={"model": "a", "version": "1", "deadline_s": 0}).status_code == 422
    )
    assert http.get("/api/v1/measurements?limit=0").status_code == 422
    assert http.get("/api/v1/rollouts/99").status_code == 404


def test_page_fetches_nothing_from_elsewhere(http: TestClient) -> None:
    page = http.get("/")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text
