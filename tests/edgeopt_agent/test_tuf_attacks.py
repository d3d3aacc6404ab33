# SPDX-License-Identifier: Apache-2.0
"""The attacks that The Update Framework's specification names, each over a real broker against the real agent.

Every one is the same story: version 1 serves, version 2 is wanted, somebody lies, version 1 goes on serving and what was
tried is said; once the honest repository answers, version 2 serves. What a rotation of keys heals is in
`test_key_compromise.py`.
"""

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from publishing import Publisher
from tuf_site import Site

from edgeopt.fleet.broker import EmbeddedBroker, free_port
from edgeopt.keys import load_signer
from edgeopt_agent import pulling
from edgeopt_agent.transports import mqtt as transport_module
from edgeopt_wire import topics
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import Compatible
from edgeopt_wire.messages import MetaReply, MetaRequest

pytestmark = pytest.mark.flow


@pytest.fixture
def site(tmp_path: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(transport_module, "REPLY_TIMEOUT_S", 1.0)
    monkeypatch.setattr(transport_module, "CHUNK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(pulling, "GRACE_S", 0.5)
    broker = EmbeddedBroker(tmp_path, free_port())
    broker.start()
    made = Site(tmp_path, broker.port, publisher)
    yield made
    made.close()
    broker.stop()


def newest(files: dict[str, bytes], ending: str) -> str:
    """The name of the newest file with this ending, as `7.targets.json`."""
    found = [name for name in files if name.endswith(ending)]
    return max(found, key=lambda name: int(name.rsplit("/", 1)[1].split(".")[0]))


def index_name(files: dict[str, bytes], version: str) -> str:
    return next(name for name in files if name.startswith(f"targets/models/tiny/{version}/"))


def thief_of(site: Site) -> Publisher:
    """Somebody with keys of his own and the same model names."""
    thief = Publisher(site.publisher.folder / "thief", site.publisher.now)
    thief.add("1", gain=9.0)
    thief.add("2", gain=9.0)
    return thief


def arbitrary_repository(site: Site) -> None:
    thief = thief_of(site)
    site.source.files, site.source.blobs = thief.files(), thief.blobs()


def arbitrary_index(site: Site) -> None:
    files, thief = site.source.files, thief_of(site).files()
    files[index_name(files, "2")] = thief[index_name(thief, "2")]


def arbitrary_bytes(site: Site) -> None:
    site.source.chunk = lambda number, chunk: [(number, bytes(len(chunk)))]


def endless_timestamp(site: Site) -> None:
    site.source.files["metadata/timestamp.json"] = b" " * 3_000_000


def endless_pages(site: Site) -> None:
    """Each page says that there is one more, for ever."""

    def page(request: MetaRequest) -> MetaReply:
        more = base64.b64encode(b"x" * 60_000).decode()
        return MetaReply(request.id, True, request.offset, request.offset + 120_000, more)

    site.source.page = page


def freeze(site: Site) -> None:
    """What was signed before version 2, for ever, while days go by."""
    site.source.files = dict(site.before)
    site.pass_time(timedelta(days=8))


def mirror_that_has_nothing(site: Site) -> None:
    site.source.page = lambda request: MetaReply(request.id, found=False)


def mirror_that_talks_nonsense(site: Site) -> None:
    site.source.page = lambda request: MetaReply(
        request.id, True, 0, 7, base64.b64encode(b"garbage").decode()
    )


def mix_of_old_snapshot_and_new_timestamp(site: Site) -> None:
    files = site.source.files
    files[newest(files, ".snapshot.json")] = site.before[newest(site.before, ".snapshot.json")]


def mix_of_old_targets_and_new_snapshot(site: Site) -> None:
    files = site.source.files
    files[newest(files, ".targets.json")] = site.before[newest(site.before, ".targets.json")]


def trickle_of_metadata(site: Site) -> None:
    """One byte a page, and time before each."""

    def page(request: MetaRequest) -> MetaReply:
        whole = site.source.honest_page(request)
        content = base64.b64decode(whole.data)[:1]
        time.sleep(0.05)
        return replace(whole, data=base64.b64encode(content).decode())

    site.source.page = page


def chatter_instead_of_chunks(site: Site) -> None:
    """Messages without end, none of which was asked for."""

    def chatter(number: int, chunk: bytes) -> list[tuple[int, bytes]]:
        def talk() -> None:
            end = time.monotonic() + 4
            blob = next(sha for sha in site.source.blobs if site.source.blobs[sha][:64] == chunk[:64])
            while time.monotonic() < end and site.source.chunk is chatter:
                site.source.client.publish(topics.chunk("default", "d1", blob, 999), b"x", qos=0)
                time.sleep(0.02)

        threading.Thread(target=talk, daemon=True).start()
        return []

    site.source.chunk = chatter


ATTACKS: dict[str, tuple[Callable[[Site], None], str]] = {
    "arbitrary software: another repository": (arbitrary_repository, "refused"),
    "arbitrary software: another index": (arbitrary_index, "refused"),
    "arbitrary software: other bytes": (arbitrary_bytes, "came wrong"),
    "endless data: one large file": (endless_timestamp, "goes on"),
    "endless data: pages without end": (endless_pages, "goes on"),
    "indefinite freeze": (freeze, "expired"),
    "malicious mirror: has nothing": (mirror_that_has_nothing, "there is no|cannot fetch"),
    "malicious mirror: talks nonsense": (mirror_that_talks_nonsense, "refused"),
    "mix-and-match: snapshot": (mix_of_old_snapshot_and_new_timestamp, "refused"),
    "mix-and-match: targets": (mix_of_old_targets_and_new_snapshot, "refused"),
    "slow retrieval: metadata": (trickle_of_metadata, "too slowly"),
    "slow retrieval: package": (chatter_instead_of_chunks, "too slowly"),
}
LIES = ("refused", "goes on")
"""What nobody signed raises an alarm; silence, slowness and old age are put off and said in the report."""


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_keeps_the_old_model_is_told_and_ends_with_the_attacker(site: Site, name: str) -> None:
    attack, said = ATTACKS[name]
    attack(site)
    site.want("2", lifetime=timedelta(days=30))
    heard: list[str] = []

    def told() -> bool:
        heard.extend(site.alarms())
        heard.append(site.device.error)
        heard.extend(model.error for report in site.source.reports for model in report.models)
        heard.extend([site.device.agent.unread_because])
        return any(re.search(said, text) for text in heard)

    site.device.run_until(told, said)
    if said in LIES:
        site.device.run_until(site.alarms, "the control plane hears of it")
    assert site.device.serves() == "1"
    site.publisher.now = site.now
    site.publisher.freshen()
    site.source.be_honest()
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves once the attack is over")


def test_rollback_is_refused_even_if_a_power_cut_lost_what_was_seen(site: Site) -> None:
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")
    site.device.stop()
    for path in (site.device.config.folder / "metadata").rglob("*.json"):
        path.unlink()
    site.source.files = dict(site.before)
    site.device.boot()
    site.want("1")
    site.device.run_until(lambda: any("went back" in text for text in site.alarms()), "the alarm")
    assert site.device.serves() == "2"
    site.source.be_honest()
    site.want("1", rollout="the operator means it")
    site.device.run_until(
        lambda: site.device.serves() == "1", "an older model, when the newest metadata lists it"
    )


def test_rollback_of_the_timestamp_alone_is_refused(site: Site) -> None:
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")
    site.publisher.add("3")
    site.source.files["metadata/timestamp.json"] = site.before["metadata/timestamp.json"]
    site.want("3")
    site.device.run_until(lambda: any("must be >=" in text for text in site.alarms()), "the alarm")
    assert site.device.serves() == "2"
    site.source.be_honest()
    site.device.run_until(lambda: site.device.serves() == "3", "version 3 serves")


def test_extraneous_dependency_in_a_forged_wish_installs_nothing(site: Site) -> None:
    """A thief adds a model of his to what the device should run; nothing is installed beside what was signed."""
    thief = thief_of(site)
    honest = json.loads(site.publisher.desire(7, "2"))
    more = json.loads(thief.desire(7, "2", rollout="mine"))
    site.source.want(json.dumps({**more, "signatures": honest["signatures"]}).encode())
    site.device.run_until(lambda: any("not signed by" in text for text in site.alarms()), "the alarm")
    assert (site.device.serves(), sorted(site.device.agent.states)) == ("1", ["tiny"])
    site.revision = 7
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")


def test_extraneous_package_that_the_director_wants_and_nobody_signed_is_not_installed(site: Site) -> None:
    site.want("6")
    site.device.run_until(lambda: "lists no" in site.device.error, "the refusal")
    assert site.device.serves() == "1"
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")


def test_wrong_software_an_index_at_another_models_path_is_refused(site: Site) -> None:
    from edgeopt.repository import Repository

    signers = {role: load_signer(site.publisher.keys, role) for role in ("targets", "snapshot", "timestamp")}
    store = Repository(site.publisher.repository, signers, site.publisher.now)
    index = from_bytes(PackageIndex, site.source.files[index_name(site.source.files, "2")])
    other = replace(index, version="8", compatible=Compatible(("host",)))
    store.add({"models/other/8/host.json": to_bytes(other)}, {})
    site.source.be_honest()
    site.device.run_until(lambda: site.device.serves() == "1", "version 1 serves")
    with pytest.raises(Exception, match="index of another package"):
        site.device.agent.trust.find_index("models/other/8/host.json")


def test_wish_of_another_device_is_not_followed(site: Site) -> None:
    site.source.want(site.publisher.desire(9, "2", device="d2"))
    site.device.run_until(lambda: any("is for d2" in text for text in site.alarms()), "the alarm")
    assert site.device.serves() == "1"
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp", "director"])
def test_one_stolen_online_or_targets_key_makes_no_package(site: Site, role: str) -> None:
    """With one key a thief signs what that role says; the rest of the chain is missing, whichever it is."""
    from tuf.api.metadata import Metadata

    thief = thief_of(site)
    files = site.source.files
    if role == "director":
        site.source.files = thief.files()
        site.source.blobs = thief.blobs()
    else:
        forged = thief.files()
        name = "metadata/timestamp.json" if role == "timestamp" else newest(forged, f".{role}.json")
        metadata: Any = Metadata.from_bytes(forged[name])
        metadata.signatures.clear()
        metadata.sign(load_signer(site.publisher.keys, role))
        files = {**files, **forged, name: metadata.to_bytes()}
        site.source.files, site.source.blobs = files, thief.blobs()
    site.want("2")
    site.device.run_until(site.alarms, "the alarm")
    assert site.device.serves() == "1"
    site.source.be_honest()
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")
    image = np.ones((1, 2, 4, 4), np.float32)
    _, outputs = site.device.agent.models.infer("tiny", {"image": image})
    assert float(outputs["scores"][0, 0]) == pytest.approx(1.0), "the owner's model, not the thief's"


def test_time_that_somebody_else_signed_or_that_answers_another_question_is_not_learned(site: Site) -> None:
    trust, source = site.device.agent.trust, site.source
    for tell, said in (
        (lambda nonce: source.sign_time(nonce, source.publisher.now, "timestamp"), "not signed by"),
        (lambda nonce: source.signed_time("0" * 32), "another question"),
        (lambda nonce: source.sign_time(nonce, source.publisher.now + timedelta(days=400)), "after the end"),
    ):
        source.tell_time = tell
        with pytest.raises(Exception, match=said):
            trust.ask_time()


def test_without_an_attack_nobody_is_alarmed(site: Site) -> None:
    site.want("2")
    site.device.run_until(lambda: site.device.serves() == "2", "version 2 serves")
    assert site.alarms() == []
