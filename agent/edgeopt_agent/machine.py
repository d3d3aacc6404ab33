# SPDX-License-Identifier: Apache-2.0
"""The words of a device's life with one model: its state, what happens, what is to be done. `transitions` is its grammar.

Rules:
- The table `transitions.TRANSITIONS` is everything that can happen; its first row that fits counts, and where none does nothing
  changes. `python -m edgeopt_agent.machine_picture` writes it out for people.
- A state that changed is saved before its effects run (`SAVE` is then the first effect, which `step` sees to), and every
  effect may run twice: after a power cut the same state gives the same effects again.
- The active package serves in every state. Only a finished trial changes it, and only after the probe has passed.
- A package that failed on its merits is refused by its digest until another rollout wants it: no loop of attempts.
- Starts are counted before they are made; too many end in `failed`, not in a loop of restarts. A start that finds more
  of the package than the one before is no loop: a board that is switched off every evening may take weeks.
- Whatever else goes round in circles ends with the budget of saved states of one deployment.
- An active package that takes the process along while it is loaded at a start is loaded a few times only (`loads`).

"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt_wire.messages import DesiredModel, Phase

MAX_ATTEMPTS = 5
"""Starts of one candidate before it is given up; a transport that is away does not count."""

MAX_SAVES = 32
"""Saved states of one deployment, waiting aside, before it is given up as a loop; without faults it takes seven."""


@dataclass(frozen=True)
class Installed:
    """A package in a slot, the variant of it that serves, and under what conditions that was the fastest."""

    slot: str
    version: str
    package_sha256: str
    variant: str = ""
    measured_under: str = ""


@dataclass(frozen=True)
class State:
    """What is saved for one model. `refused` maps the digest of a target's index or package to the reason.

    `attempts` counts starts, `saves` saved states of the deployment in hand, `arrived` the chunks that the last start
    found. `revision` is that of the desired document which led here.
    """

    SCHEMA = "edgeopt.state/1"

    model: str
    phase: Phase = Phase.IDLE
    active: Installed | None = None
    previous: Installed | None = None
    candidate: Installed | None = None
    desired: DesiredModel | None = None
    attempts: int = 0
    error: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    saves: int = 0
    arrived: int = 0
    revision: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def free_slot(self) -> str:
        """The slot that a candidate may overwrite."""
        return "B" if self.active is not None and self.active.slot == "A" else "A"


class Effect(enum.Enum):
    """What the loop must do, in this order."""

    SAVE = "save"  # write the state, flushed, before anything else
    REPORT = "report"  # publish the new phase; never waited for
    RESOLVE = "resolve"  # find and verify the index of the desired target, check that it fits this device
    DOWNLOAD = "download"  # pull what is missing of the package
    VERIFY = "verify"  # read the package back, hash it, keep its files in the store
    PLACE = "place"  # fill the free slot from the store
    PROBE = "probe"  # measure every variant of the candidate in a child process
    SWITCH = "switch"  # serve from the candidate
    REMOVE = "remove"  # stop serving and forget the model
    CLEAN = "clean"  # remove blobs and slots that nothing names


class Kind(enum.Enum):
    """What can happen."""

    DESIRED = "desired"  # the control plane wants `desired` (None: not this model any more)
    STARTED = "started"  # the agent started, after a power cut perhaps
    DONE = "done"  # the effect in hand succeeded; `installed` says what it found
    LOST = "lost"  # what arrived is damaged on the disk; it is fetched again
    AWAY = "away"  # the transport or the disk is in the way; try again later
    MEASURED = "measured"  # the active package was measured again; `installed` says which variant serves now
    WORN = "worn"  # the active package is right no more; `installed` is the previous one, which is and serves
    DEADLY = "deadly"  # starts died of loading the active package; `installed` is the previous one, if whole
    REFUSED = "refused"  # the candidate is bad: it lies, does not fit, or fails its probe


@dataclass(frozen=True)
class Event:
    """Something that happened. `key` names what is refused (a digest).

    `arrived` says at a start how many chunks of the candidate are there, `revision` which document a wish came with.
    """

    kind: Kind
    desired: DesiredModel | None = None
    installed: Installed | None = None
    error: str = ""
    key: str = ""
    arrived: int = 0
    revision: int = 0


WORK = {
    Phase.RESOLVING: Effect.RESOLVE,
    Phase.DOWNLOADING: Effect.DOWNLOAD,
    Phase.VERIFYING: Effect.VERIFY,
    Phase.STAGED: Effect.PLACE,
    Phase.PROBING: Effect.PROBE,
    Phase.TRIAL: Effect.SWITCH,
}
"""The effect that a phase waits for."""

NEXT = {
    Phase.RESOLVING: Phase.DOWNLOADING,
    Phase.DOWNLOADING: Phase.VERIFYING,
    Phase.VERIFYING: Phase.STAGED,
    Phase.STAGED: Phase.PROBING,
    Phase.PROBING: Phase.TRIAL,
}
"""Where success leads."""
