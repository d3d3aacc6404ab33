# SPDX-License-Identifier: Apache-2.0
"""Stolen keys over a real broker: what a thief can do with each, and that a rotation heals devices without a visit.

Fast-forward, the attack of the specification that only keys make possible, is here: versions, revisions and moments that
a thief signs far ahead.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from publishing import Publisher
from tuf_site import Site

from edgeopt.fleet.broker import EmbeddedBroker, free_port
from edgeopt.keys import load_signer
from edgeopt.repository import Repository
from edgeopt.rotate import RotationRequest, rotate
from edgeopt_agent.transports import mqtt as transport_module
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.messages import DESIRED_TYPE, Desired

pytestmark = pytest.mark.flow
FAR = 2_000_000_000


@pytest.fixture
def site(tmp_path: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(transport_module, "REPLY_TIMEOUT_S", 1.0)
    broker = EmbeddedBroker(tmp_path, free_port())
    broker.start()
    made = Site(tmp_path, broker.port, publisher)
    yield made
    made.close()
    broker.stop()


def rotated(site: Site, *roles: str) -> None:
    """The owner's command, after which the publisher uses the new keys."""
    publisher, new = site.publisher, site.publisher.folder / f"keys-{'-'.join(roles)}"
    rotate(RotationRequest(publisher.repository, (publisher.keys,), new, roles), now=site.now)
    for role in roles:
        (publisher.keys / f"{role}.pem").unlink()
        (new / f"{role}.pem").rename(publisher.keys / f"{role}.pem")


def stolen_versions(site: Site) -> dict[str, bytes]:
    """What a thief of the snapshot and timestamp keys signs: the same packages, two thousand million versions ahead."""
    publisher = site.publisher
    signers = {role: load_signer(publisher.keys, role) for role in ("snapshot", "timestamp")}
    files = publisher.files()
    store = Repository(publisher.repository, signers, site.now)
    snapshot: Any = store.newest("snapshot")
    timestamp: Any = store.newest("timestamp")
    for metadata, role in ((snapshot, "snapshot"), (timestamp, "timestamp")):
        metadata.signed.version = FAR
        if role == "timestamp":
            metadata.signed.snapshot_meta.version = FAR
        metadata.signatures.clear()
        metadata.sign(signers[role])
    return {
        **files,
        f"metadata/{FAR}.snapshot.json": snapshot.to_bytes(),
        "metadata/timestamp.json": timestamp.to_bytes(),
    }


def test_fast_forward_of_snapshot_and_timestamp_is_healed_by_replacing_their_keys(site: Site) -> None:
    site.source.files = stolen_versions(site)
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "the thief hides nothing yet")
    site.publisher.add("3")
    site.source.be_honest()
    site.want("3")
    site.device.run_until(lambda: any("must be >=" in text for text in site.alarms()), "the owner looks old")
    assert site.device.serves() == "2"
    rotated(site, "snapshot", "timestamp")
    site.source.be_honest()
    site.device.run_until(lambda: site.device.serves() == "3", "version 3 serves after the rotation")


def test_thiefs_old_keys_count_no_more_after_the_rotation(site: Site) -> None:
    thiefs = stolen_versions(site)
    rotated(site, "snapshot", "timestamp")
    site.source.be_honest()
    site.source.files.update(
        {name: thiefs[name] for name in thiefs if name.endswith(("timestamp.json", ".snapshot.json"))}
    )
    site.want("2")
    site.device.run_until(site.alarms, "the alarm")
    assert site.device.serves() == "1"
    site.source.be_honest()
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")


def far_ahead(site: Site, **changes: Any) -> bytes:
    """A thief of the director key takes the model away, with a document dated or numbered far ahead."""
    from securesystemslib.dsse import Envelope

    honest = Envelope.from_dict(json.loads(site.publisher.desire(site.revision + 1, "1")))
    desired = replace(from_bytes(Desired, honest.payload), **changes)
    envelope = Envelope(to_bytes(desired), DESIRED_TYPE, {})
    envelope.sign(load_signer(site.publisher.keys, "director"))
    return json.dumps(envelope.to_dict()).encode()


def test_director_far_ahead_in_revisions_is_healed_by_replacing_its_key(site: Site) -> None:
    site.source.want(far_ahead(site, revision=FAR))
    site.device.run_until(lambda: site.device.agent.reported().desired_revision == FAR, "the thief is obeyed")
    site.want("2")
    site.device.run_for(1.0)
    assert site.device.serves() == "1", "the owner's revision looks old"
    rotated(site, "director")
    site.source.be_honest()
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "the new director is followed")
    site.source.want(site.publisher.desire(1, "1"))
    site.device.run_for(1.0)
    assert site.device.serves() == "2", "and its revisions do not go back either"


def test_director_far_ahead_in_time_is_not_followed(site: Site) -> None:
    later = site.now + timedelta(days=3650)
    site.source.want(far_ahead(site, issued_at=later, expires_at=later + timedelta(days=7)))
    site.device.run_until(
        lambda: any("does not follow the director" in a for a in site.alarms()), "the alarm"
    )
    assert site.device.store.load_device().newest_moment < "2030"
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "the device's time was not moved")


def test_all_keys_but_root_stolen_is_healed_without_a_visit(site: Site) -> None:
    """The worst that the root survives: a thief's package runs, until the owner replaces four keys and publishes."""
    site.publisher.add("666")
    site.source.be_honest()
    site.want("666")
    site.device.run_until(lambda: site.device.serves() == "666", "the thief's package serves")
    rotated(site, "targets", "snapshot", "timestamp", "director")
    site.publisher.add("3")
    site.source.be_honest()
    site.want("3")
    site.device.run_until(lambda: site.device.serves() == "3", "the owner's package serves")


def test_device_that_slept_through_three_rotations_walks_the_chain(site: Site) -> None:
    for roles in (("root",), ("targets", "timestamp"), ("root", "director")):
        rotated(site, *roles)
    site.source.be_honest()
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")
    assert [name for name in site.source.asked if name.endswith(".root.json")][-1] == "metadata/5.root.json"


def test_root_that_the_old_root_did_not_sign_is_refused(site: Site) -> None:
    rotated(site, "timestamp")
    site.source.be_honest()
    from tuf.api.metadata import Metadata

    thief = Publisher(site.publisher.folder / "thief", site.now)
    root: Any = Metadata.from_bytes(site.source.files["metadata/2.root.json"])
    root.signatures.clear()
    root.sign(load_signer(thief.keys, "root"))
    site.source.files["metadata/2.root.json"] = root.to_bytes()
    site.want("2")
    site.device.run_until(site.alarms, "the alarm")
    assert site.device.serves() == "1"
    site.source.be_honest()
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")


def test_team_that_signs_anothers_model_is_not_believed_by_a_device(site: Site) -> None:
    from edgeopt.keys import create_key
    from edgeopt.teams import delegate

    publisher = site.publisher
    roles = ("targets", "snapshot", "timestamp")
    store = Repository(publisher.repository, {r: load_signer(publisher.keys, r) for r in roles}, site.now)
    team = create_key(publisher.folder / "team", "vision")
    delegate(store, "vision", ("vision-*",), team)
    mine: Any = store.newest("vision")
    store.put_targets(mine, {"models/tiny/9/host.json": b"{}"})
    store.write_role("vision", mine, (team,))
    store.sign_snapshot({"vision.json": mine.signed.version})
    site.source.be_honest()
    site.want("9")
    site.device.run_until(lambda: "lists no models/tiny/9/host.json" in site.device.error, "the refusal")
    assert site.device.serves() == "1"
    assert "models/tiny/9/host.json" not in site.device.agent.trust.list_targets()
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")
