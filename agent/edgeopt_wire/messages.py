# SPDX-License-Identifier: Apache-2.0
"""What a device and the control plane say to each other over MQTT, apart from package bytes.

Rules:
- Desired state, idempotent: a lost, repeated or reordered message changes nothing.
- `Desired` travels inside a DSSE envelope signed by a director key; the others are
  confined to the device's own topics by the broker's ACL.
- Phases and outcomes are closed sets; their words are the ones in docs/protocol.md.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from edgeopt_wire.manifest import check_digest, check_name

DESIRED_TYPE = "application/vnd.edgeopt.desired+json"
"""DSSE payload type of a signed `Desired`."""

TIME_TYPE = "application/vnd.edgeopt.time+json"
"""DSSE payload type of a `SignedTime`."""

MAX_DESIRED_BYTES = 64 * 1024
MAX_META_PAGE_BYTES = 64 * 1024


class Phase(enum.Enum):
    """Where a device stands with one model."""

    IDLE = "idle"  # nothing to do: the desired package runs, or none is desired
    RESOLVING = "resolving"  # asks the signed metadata for the package's index
    DOWNLOADING = "downloading"  # pulls chunks
    VERIFYING = "verifying"  # reads back and hashes what was written
    STAGED = "staged"  # the candidate's slot is complete on disk
    PROBING = "probing"  # a child process loads, compares and measures the variants
    TRIAL = "trial"  # the candidate serves, the old one is kept
    COMMITTED = "committed"  # the candidate is the active package
    ROLLING_BACK = "rolling_back"  # goes back to the previous slot
    ROLLED_BACK = "rolled_back"  # the previous package serves again
    FAILED = "failed"  # the candidate was refused; the old package, if any, still serves


@dataclass(frozen=True)
class DesiredModel:
    """One model that a device should run. `target` is the path of its index in the signed metadata."""

    name: str
    version: str
    target: str
    rollout: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name, "model")
        check_name(self.version, "version")


@dataclass(frozen=True)
class Desired:
    """What one device should run. An older `revision` than the last one seen is ignored."""

    SCHEMA = "edgeopt.desired/1"

    device: str
    revision: int
    issued_at: datetime
    expires_at: datetime
    models: tuple[DesiredModel, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"a model is desired once, found {names}")


@dataclass(frozen=True)
class ReportedModel:
    """What a device runs of one model, and where it stands with the next. Digests are of packages."""

    name: str
    phase: Phase
    version: str = ""
    package_sha256: str = ""
    variant: str = ""
    candidate_version: str = ""
    rollout: str = ""
    error: str = ""


@dataclass(frozen=True)
class Reported:
    """The device's own word on its state; the only thing that counts as success."""

    SCHEMA = "edgeopt.reported/1"

    device: str
    device_class: str
    session: str
    desired_revision: int
    agent_version: str
    models: tuple[ReportedModel, ...]
    disk_free_bytes: int | None = None
    stand_in: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Presence:
    """Online or not. `session` keeps an old will from ending a new session."""

    SCHEMA = "edgeopt.presence/1"

    device: str
    online: bool
    session: str
    agent_version: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happened, kept on the device until acknowledged.

    `kind`: "measurement", "phase", "service", "summary", "golden", "drift", "certificate", "transfer" or "trust". The body of the last says what nobody signed:
    `model` (empty for the device's `desired`) and `error`.
    """

    sequence: int
    kind: str
    at: datetime
    body: Mapping[str, Any]


@dataclass(frozen=True)
class EventBatch:
    """Events of one device, ascending, with gaps or without; `dropped` counts what its outbox could not keep, ever."""

    SCHEMA = "edgeopt.events/1"

    device: str
    events: tuple[Event, ...]
    outbox: str
    dropped: int = 0


@dataclass(frozen=True)
class Ack:
    """The last number of a batch of `outbox` that the control plane has committed, with all before it in that batch.

    A gap in the batch ends it. Of other batches it says nothing.
    """

    SCHEMA = "edgeopt.ack/1"

    outbox: str
    sequence: int


@dataclass(frozen=True)
class Pull:
    """A device asks for chunks of a blob: runs of (first chunk, count).

    `lane` (`edgeopt_wire.lanes`): the lane on which it listens and where they shall come, 0 where it would take an offer
    of lanes, None for its own stream and nothing else. A control plane that knows no lanes sends on the own stream.
    """

    SCHEMA = "edgeopt.pull/1"

    sha256: str
    runs: tuple[tuple[int, int], ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_digest(self.sha256)
        if any(first < 0 or count < 1 for first, count in self.runs):
            raise ValueError("a run is (first >= 0, count >= 1)")

    @property
    def lane(self) -> int | None:
        """See above."""
        found = self.extra.get("lane")
        return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


@dataclass(frozen=True)
class PullRefused:
    """The control plane has no such blob, or may not give it to this device. Final for this attempt."""

    SCHEMA = "edgeopt.pull-refused/1"

    sha256: str
    reason: str


@dataclass(frozen=True)
class MetaRequest:
    """A device asks for signed metadata or a small target by name, from `offset` on.

    `name` is `metadata/<file>` or `targets/<path>` as in the repository, or `time/<nonce>` for a `SignedTime`.
    """

    SCHEMA = "edgeopt.meta-request/1"

    id: str
    name: str
    offset: int = 0


@dataclass(frozen=True)
class MetaReply:
    """A page of what was asked for, base64; `found` false is an explicit "there is none"."""

    SCHEMA = "edgeopt.meta-reply/1"

    id: str
    found: bool
    offset: int = 0
    total_bytes: int = 0
    data: str = ""


@dataclass(frozen=True)
class SignedTime:
    """What time it is, signed by the director for one question: `nonce` is 32 hexadecimal digits of the device's.

    Travels in a DSSE envelope as the answer to a `MetaRequest`.
    """

    SCHEMA = "edgeopt.time/1"

    nonce: str
    moment: datetime

    def __post_init__(self) -> None:
        if len(self.nonce) != 32 or not set(self.nonce) <= set("0123456789abcdef"):
            raise ValueError(f"a nonce is 32 hexadecimal digits, found {self.nonce!r}")
