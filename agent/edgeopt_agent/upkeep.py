# SPDX-License-Identifier: Apache-2.0
"""What a device does for a model that serves for years: prove its outputs, mend its files, measure it again.

| found | done |
|---|---|
| files changed on the disk | what is bad is pulled again; the model is loaded afresh |
| wrong, and right when loaded once more | told |
| wrong twice, files are whole | the fastest variant of the package that is right serves |
| no variant is right | the previous package serves, if it is whole and right now |
| neither | the model serves on and is reported `degraded`; proven again every `DEGRADED_S` |
| right when loaded, wrong as it serves | loaded afresh; if that does not help the process ends, once, for its manager to start |

Rule: every row is an event. What runs is changed only to what has just been proven.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from edgeopt_agent.calm import LOOK_S, Calm
from edgeopt_agent.installer import Installer
from edgeopt_agent.machine import Event, Installed, Kind, State
from edgeopt_agent.probe import ProbeRequest
from edgeopt_agent.proof import Proof, prove_loaded, prove_served
from edgeopt_agent.remeasure import changes
from edgeopt_agent.rot import digest_on_disk, find_rot, repair
from edgeopt_agent.schedule import Schedule, UpkeepOptions
from edgeopt_wire.errors import (
    EdgeoptError,
    RuntimeFailure,
    StoreError,
    TransportError,
    UnsupportedError,
)
from edgeopt_wire.manifest import MANIFEST_PATH

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.loop import Agent
    from edgeopt_agent.model import LoadedModel

_log = logging.getLogger(__name__)

SCHEMA = "edgeopt.golden/1"
DEGRADED_S = 6 * 3600.0
ROT_S = 3600.0
RACE_WAIT_S = 60.0
"""Seconds that one race waits for the board to cool down between its probes, all together."""
_ROTTEN = "damaged on the disk: "


class Serving(Protocol):
    """What serves: `edgeopt_agent.serve.models.Models`."""

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray]
    ) -> tuple[LoadedModel, dict[str, np.ndarray]]:
        """Run one inference; return the model that answered and its outputs."""
        ...

    def activate(self, model: str, installed: Installed) -> None:
        """Load a variant and serve from it."""
        ...


@dataclass
class Upkeep:
    """Looks after one device's models. `tell` takes a kind and a body; `restart` ends this process where that helps."""

    installer: Installer
    models: Serving
    schedule: Schedule
    tell: Callable[[str, dict[str, Any]], None]
    options: UpkeepOptions = field(default_factory=UpkeepOptions)
    calm: Calm = field(default_factory=Calm)
    restart: Callable[[], bool] = lambda: False
    go_on: Callable[[], None] = lambda: None
    monotonic: Callable[[], float] = time.monotonic
    _waiting: dict[str, float] = field(default_factory=dict)

    def look(self, state: State) -> Event | None:
        """Do what is due for one model; the event that came of it, if its state is to change.

        Raises:
            EdgeoptError: It cannot be done now; the next look tries again.
        """
        active, store = state.active, self.installer.store
        if active is None or not store.is_whole(state.model, active.slot, active.package_sha256):
            return None
        folder = store.slot(state.model, active.slot)
        note = self.schedule.note(
            state.model, active.package_sha256, lambda: digest_on_disk(folder / MANIFEST_PATH)
        )
        every_s = 3600 * self.options.golden_every_h
        if note.degraded:
            every_s = min(every_s or DEGRADED_S, ROT_S if note.degraded.startswith(_ROTTEN) else DEGRADED_S)
        if self.schedule.is_due(state.model, "golden", every_s):
            return self._prove(state, active)
        event = self.installer.look(state)
        if event is not None and event.error and event.installed is not None:
            return self._prove(state, event.installed)
        if event is not None and event.installed is not None and event.installed != active:
            self.schedule.done(state.model, "measured")
        if event is None and self.schedule.is_due(
            state.model, "measured", 3600 * self.options.measure_every_h
        ):
            return self._measure(state, active)
        return event

    def _prove(self, state: State, active: Installed) -> Event | None:
        model = state.model
        manifest_sha256 = self.schedule.note(model, active.package_sha256).manifest_sha256
        rotten = find_rot(self.installer.store, model, active, manifest_sha256)
        if rotten:
            return self._mend(state, active, rotten)
        found = self._loaded(model, active)
        if found.is_right is False:
            again = self._loaded(model, active)
            if again.is_right is False:
                return self._replace(state, active, again.why)
            self._say(state, active, "right_when_loaded_again", why=found.why)
            found = again
        if found.is_right is None:
            self._say(state, active, "not_told", why=found.why)
            self.schedule.done(model, "golden")
            return None
        if self._served(model, active).is_right is False:
            return self._reload(state, active)
        was = self.schedule.note(model, active.package_sha256).degraded
        self.schedule.done(model, "golden", degraded="", restarted="")
        if was:
            self._say(state, active, "right_again", why=was)
        is_news = bool(was) or active != state.active
        return Event(Kind.MEASURED, installed=active) if is_news else None

    def _mend(self, state: State, active: Installed, rotten: tuple[str, ...]) -> Event | None:
        why = f"{_ROTTEN}{', '.join(rotten)}"
        if self.schedule.note(state.model, active.package_sha256).degraded != why:
            self._say(state, active, "damaged", why=why, files=list(rotten))
        try:
            if state.desired is None or state.desired.version != active.version:
                raise StoreError("another version is wanted, and what this one was is not known any more")
            index = self.installer.trust.find_index(state.desired.target)
            noted = self.schedule.note(state.model, active.package_sha256).manifest_sha256
            pulled = repair(
                self.installer.store, state.model, active, index, self.installer.fill, manifest_sha256=noted
            )
            self.models.activate(state.model, active)
        except (EdgeoptError, OSError) as error:
            _log.error("%s: %s; not mended yet: %s", state.model, why, error)
            return self._degrade(state, active, why, is_told=True)
        self._say(state, active, "mended", files=list(rotten), chunks=pulled)
        return None  # it is still due: the next look proves what was mended

    def _replace(self, state: State, active: Installed, why: str) -> Event:
        """It is wrong twice and its files are whole: the runtime, or this machine, is not what it was."""
        now = self.installer.under(state.model, active)
        if active.measured_under and active.measured_under != now:
            why = f"{why}; changed since it was measured: {changes(active.measured_under, now)}"
        try:
            found = self.installer.raced(state.model, active)
            self.models.activate(state.model, found)
        except (RuntimeFailure, UnsupportedError) as error:
            return self._go_back(state, replace(active, measured_under=now), f"{why}; {error}")
        self.schedule.done(state.model, "golden", degraded="")
        self.schedule.done(state.model, "measured")
        self._say(state, found, "another_variant", why=why, instead_of=active.variant)
        return Event(Kind.MEASURED, installed=found)

    def _go_back(self, state: State, active: Installed, why: str) -> Event:
        previous, store = state.previous, self.installer.store
        if previous is not None and store.is_whole(state.model, previous.slot, previous.package_sha256):
            known = self.schedule.note(state.model, active.package_sha256).before
            noted = known.get(previous.package_sha256, "")
            is_sound = not find_rot(store, state.model, previous, noted)
            if is_sound and self._loaded(state.model, previous).is_right:
                try:
                    self.models.activate(state.model, previous)
                except EdgeoptError as error:
                    return self._degrade(state, active, f"{why}; the previous package: {error}")
                self._say(state, previous, "previous_package", why=why, instead_of=active.version)
                return Event(Kind.WORN, installed=previous, error=why, key=active.package_sha256)
        return self._degrade(state, active, why)

    def _reload(self, state: State, active: Installed) -> Event | None:
        """What serves is wrong, and the same loaded afresh is right: this process, or its memory, is at fault."""
        self.models.activate(state.model, active)
        found = self._served(state.model, active)
        if found.is_right is not False:
            self._say(state, active, "loaded_afresh")
            self.schedule.done(state.model, "golden", degraded="")
            return None
        note = self.schedule.note(state.model, active.package_sha256)
        if note.restarted != active.package_sha256:
            self.schedule.mark(state.model, restarted=active.package_sha256)
            if self.restart():
                self._say(state, active, "process_ended", why=found.why)
                return None
        return self._degrade(state, active, f"right in another process, wrong in this one: {found.why}")

    def _degrade(self, state: State, active: Installed, why: str, *, is_told: bool = False) -> Event:
        if not is_told and self.schedule.note(state.model, active.package_sha256).degraded != why:
            self._say(state, active, "degraded", why=why)
        self.schedule.done(state.model, "golden", degraded=why)
        return Event(Kind.MEASURED, installed=active, error=f"degraded: {why}")

    def _measure(self, state: State, active: Installed) -> Event | None:
        """Measure when the board is calm; look again later until patience ends."""
        began = self._waiting.setdefault(state.model, self.monotonic())
        waited = self.monotonic() - began
        left = self.options.patience_s - waited
        if left > 0:
            seen = self.calm.wait(min(left, LOOK_S), self.go_on)
            if not seen.is_calm:
                _log.info("%s is measured later: %s", state.model, seen.why)
                return None
        del self._waiting[state.model]
        probe = self.calm.carefully(
            self.installer.probe, min(max(left, 0.0), RACE_WAIT_S), waited_s=waited, go_on=self.go_on
        )
        found = self.installer.raced(state.model, active, probe)
        if found.variant != active.variant:
            self.models.activate(state.model, found)
        self.schedule.done(state.model, "measured")
        return Event(Kind.MEASURED, installed=found)

    def _loaded(self, model: str, installed: Installed) -> Proof:
        return prove_loaded(self.installer.probe, self._request(model, installed))

    def _served(self, model: str, installed: Installed) -> Proof:
        store = self.installer.store
        manifest = store.manifest(model, installed.slot)
        return prove_served(self.models.infer, store.slot(model, installed.slot), manifest, installed.variant)

    def _request(self, model: str, installed: Installed) -> ProbeRequest:
        return self.installer.request(model, installed, installed.variant)

    def _say(self, state: State, installed: Installed, what: str, **more: Any) -> None:
        body: Mapping[str, Any] = {
            "schema": SCHEMA,
            "model": state.model,
            "version": installed.version,
            "variant": installed.variant,
            "package_sha256": installed.package_sha256,
            "what": what,
            **more,
        }
        _log.warning(
            "%s %s %s: %s %s", state.model, installed.version, installed.variant, what, more.get("why", "")
        )
        self.tell("golden", dict(body))


def look_after(agent: Agent, now: Callable[[], datetime]) -> Upkeep:
    """Let an agent look after its models from now on, and report what is wrong with them."""
    service = agent.models.service
    calm = Calm(served=lambda: service.calls if service is not None else 0)
    agent.installer.calm = calm
    schedule = Schedule(agent.store.folder / "upkeep.json", agent.config.device, now, agent.seconds)

    def go_on() -> None:
        if agent.installer.is_stopping():
            raise TransportError("the agent is told to stop")

    def facts() -> dict[str, Any]:
        drift = service.drift.summaries() if service is not None and service.drift is not None else {}
        degraded = {name: why for name, why in schedule.degraded().items() if name in agent.states}
        degraded |= agent.worker.unserved
        return {**({"degraded": degraded} if degraded else {}), **({"drift": drift} if drift else {})}

    def restart() -> bool:
        if not os.environ.get("NOTIFY_SOCKET"):
            return False
        agent.stop()
        return True

    found = Upkeep(
        agent.installer,
        agent.models,
        schedule,
        agent.teller.tell,
        options=agent.config.upkeep,
        calm=calm,
        restart=restart,
        go_on=go_on,
        monotonic=agent.seconds,
    )
    agent.facts = facts
    agent.worker.look_at = found.look
    return found
