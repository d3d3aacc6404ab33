# SPDX-License-Identifier: Apache-2.0
"""The work of an installation, one function an effect: each returns the event that came of it, and may run twice.

Who is to blame decides what follows: a transport that is away or a full disk is tried again; bytes that lie, a package
for something else, or variants that fail their golden outputs are refused, and the old package serves on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from edgeopt_agent.calm import Calm
from edgeopt_agent.config import AgentConfig
from edgeopt_agent.deltas import find_way, pull_by_delta
from edgeopt_agent.files import disk_error
from edgeopt_agent.fits import check_fits, this_machine
from edgeopt_agent.housekeeping import Housekeeper
from edgeopt_agent.machine import Effect, Event, Installed, Kind, State
from edgeopt_agent.probe import ProbeRequest
from edgeopt_agent.pulling import fill
from edgeopt_agent.race import race
from edgeopt_agent.remeasure import changes, conditions
from edgeopt_agent.spending import Spending
from edgeopt_agent.store import Incoming, Store
from edgeopt_agent.transports import Transport
from edgeopt_wire.errors import (
    EdgeoptError,
    ForgedError,
    RuntimeFailure,
    StoreError,
    TransportError,
    TrustError,
    UnsupportedError,
)
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.measurement import Measurement

_log = logging.getLogger(__name__)

STARVED = frozenset({"crash", "memory"})
"""Kinds of failure (`edgeopt_agent.probe.Failure`) behind which a machine without memory may stand."""
MAX_STARVED = 3
"""Probes of one package that end so, with a pause between them, before it is the package's fault."""


class _Starved(RuntimeFailure):
    """No variant runs right, and it may be the moment's fault."""


Probe = Callable[[ProbeRequest], Measurement]


class Finder(Protocol):
    """Finds a verified index: `edgeopt_agent.trust.Trust`."""

    def find_index(self, target: str) -> PackageIndex:
        """Return the verified index at a target path."""
        ...


class Server(Protocol):
    """Serves the package of a slot: `edgeopt_agent.serve.models.Models`."""

    def activate(self, model: str, installed: Installed) -> None:
        """Load a variant and serve from it; the one before serves until this one is ready."""
        ...


@dataclass
class Installer:
    """Runs the effects of one device's models."""

    config: AgentConfig
    store: Store
    keeper: Housekeeper
    transport: Transport
    trust: Finder
    server: Server
    probe: Callable[[ProbeRequest], Measurement]
    keep: Callable[[str, Measurement], None]
    calm: Calm = field(default_factory=Calm)
    is_stopping: Callable[[], bool] = lambda: False
    states: Callable[[], Mapping[str, State]] = dict
    spending: Spending | None = None
    alarm: Callable[[str, str], None] = lambda model, error: _log.error("%s: %s", model, error)

    def __post_init__(self) -> None:
        self._indexes: dict[str, PackageIndex] = {}
        self._starved: dict[str, int] = {}
        self._works: dict[Effect, Callable[[State], Event]] = {
            Effect.RESOLVE: self._resolve,
            Effect.DOWNLOAD: self._download,
            Effect.VERIFY: self._verify,
            Effect.PLACE: self._place,
            Effect.PROBE: self._probe,
            Effect.SWITCH: self._switch,
        }

    def work(self, effect: Effect, state: State) -> Event:
        """Do it, and say what came of it; never raises one of our errors."""
        key = state.candidate.package_sha256 if state.candidate else ""
        try:
            return self._works[effect](state)
        except ForgedError as error:  # whoever answered lied; another answer may be right
            self.alarm(state.model, str(error))
            return Event(Kind.AWAY, error=str(error))
        except (TransportError, StoreError) as error:
            _log.warning("%s: %s is put off: %s", state.model, effect.value, error)
            return Event(Kind.AWAY, error=str(error))
        except OSError as error:
            blamed = disk_error(f"{effect.value} of {state.model}", error)
            _log.warning("%s: %s is put off: %s", state.model, effect.value, blamed)
            return Event(Kind.AWAY, error=str(blamed))
        except EdgeoptError as error:
            _log.error("%s: %s is refused: %s", state.model, effect.value, error)
            return Event(Kind.REFUSED, error=str(error), key=key)

    def _resolve(self, state: State) -> Event:
        assert state.desired is not None, "the machine resolves only what is desired"
        index = self.trust.find_index(state.desired.target)
        if (index.name, index.version) != (state.desired.name, state.desired.version):
            raise TrustError(
                f"{state.desired.target} is the index of {index.name} {index.version}, "
                f"desired is {state.desired.name} {state.desired.version}"
            )
        if index.sha256 in state.refused:
            raise UnsupportedError(f"refused before: {state.refused[index.sha256]}")
        check_fits(index, self.config, this_machine(self.store.folder))
        self._indexes[state.model] = index
        return Event(Kind.DONE, installed=Installed(state.free_slot, index.version, index.sha256))

    def _download(self, state: State) -> Event:
        index = self._index(state)
        if self.store.packages.find(index.sha256) is not None:
            _log.info("%s %s is here already", index.name, index.version)
            return Event(Kind.DONE)
        incoming = self.store.incoming(index)
        missing = incoming.missing()
        if missing:
            if self.spending is not None:
                self.spending.require()
            # the bytes that come, and the files that they are made into
            self.keeper.make_room(
                incoming.to_take() + index.size_bytes, {**self.states(), state.model: state}
            )
            incoming.reserve()
            way = find_way(index, state, self.store) if len(missing) == len(index.chunks) else None
            if way is None or not pull_by_delta(way, index, self.store, self.fill):
                self.fill(incoming)
        return Event(Kind.DONE)

    def fill(self, incoming: Incoming) -> None:
        """Pull what is missing of a blob; what came is on the disk whatever ends the pull."""
        pull = self.transport.pull
        fill(incoming, pull if self.spending is None else partial(self.spending.pull, pull), self._go_on)

    def _go_on(self) -> None:
        if self.is_stopping():
            raise TransportError("the agent is told to stop")

    def _verify(self, state: State) -> Event:
        index = self._index(state)
        incoming = self.store.incoming(index)
        if self.store.packages.find(index.sha256) is not None:
            is_whole = self.store.packages.is_whole(index.sha256)
        else:
            is_whole = not incoming.missing() and self.store.stage(index)
        if not is_whole:
            return Event(Kind.LOST, error="the package was damaged on the disk; it is fetched again")
        incoming.discard()
        return Event(Kind.DONE)

    def _place(self, state: State) -> Event:
        candidate = state.candidate
        assert candidate is not None, "a candidate is known since it was resolved"
        if not self.store.place(state.model, candidate.slot, candidate.package_sha256):
            return Event(Kind.LOST, error="the package was damaged in the store; it is fetched again")
        return Event(Kind.DONE)

    def _probe(self, state: State) -> Event:
        candidate = state.candidate
        assert candidate is not None, "a candidate is known since it was resolved"
        if not self.store.is_whole(state.model, candidate.slot, candidate.package_sha256):
            return Event(Kind.LOST, error=f"slot {candidate.slot} is not whole any more; it is fetched again")
        try:
            found = self.raced(state.model, candidate)
        except _Starved as error:
            tried = self._starved.pop(candidate.package_sha256, 0) + 1
            if tried >= MAX_STARVED:
                raise
            self._starved[candidate.package_sha256] = tried
            _log.warning("%s: the probe is put off, %d of %d: %s", state.model, tried, MAX_STARVED, error)
            return Event(Kind.AWAY, error=str(error))
        return Event(Kind.DONE, installed=found)

    def request(self, model: str, installed: Installed, variant: str) -> ProbeRequest:
        """What a probe of a variant of an installed package is asked for."""
        return ProbeRequest(
            folder=str(self.store.slot(model, installed.slot)),
            variant=variant,
            package_sha256=installed.package_sha256,
            device_id=self.config.device,
            device_class=self.config.device_class,
            stand_in_for=self.config.device_class if self.config.stand_in else "",
        )

    def under(self, model: str, installed: Installed) -> str:
        """What a measurement of an installed package depends on, as it is now."""
        manifest = self.store.manifest(model, installed.slot)
        return conditions(variant.runtime for variant in manifest.variants)

    def raced(self, model: str, installed: Installed, carefully: Probe | None = None) -> Installed:
        """A package in a slot with the variant that is the fastest now.

        `carefully` measures; without it nothing is waited for, and the figure says what the board was like.

        Raises:
            RuntimeFailure: None runs right.
        """
        manifest = self.store.manifest(model, installed.slot)
        measure = carefully or self.calm.carefully(self.probe)

        def probe(variant: str) -> Measurement:
            if self.is_stopping():
                raise TransportError("the agent is told to stop")
            measurement = measure(self.request(model, installed, variant))
            self.keep(model, measurement)
            return measurement

        found = race([variant.id for variant in manifest.variants], probe)
        if found.winner is None:
            why = "; ".join(
                f"{m.variant}: {m.error or ', '.join(m.warnings) or 'wrong outputs'}"
                for m in found.measurements
            )
            starved = any(m.extra.get("failure") in STARVED for m in found.measurements)
            raise (_Starved if starved else RuntimeFailure)(f"no variant runs right on this device: {why}")
        _log.info("%s %s: %s", model, installed.version, found.said)
        now = conditions(variant.runtime for variant in manifest.variants)
        return replace(installed, variant=found.winner.variant, measured_under=now)

    def look(self, state: State) -> Event | None:
        """Measure the active package again where the conditions are others than when it was; None where all is as it was.

        What fails now goes on serving as it is loaded: the event says so.
        """
        active = state.active
        if active is None or not self.store.is_whole(state.model, active.slot, active.package_sha256):
            return None
        manifest = self.store.manifest(state.model, active.slot)
        now = conditions(variant.runtime for variant in manifest.variants)
        if not active.measured_under:  # installed before conditions were kept: from now on they are
            return Event(Kind.MEASURED, installed=replace(active, measured_under=now))
        if active.measured_under == now:
            return None
        _log.info("%s is measured again: %s", state.model, changes(active.measured_under, now))
        try:
            found = self.raced(state.model, active)
            if found.variant != active.variant:
                self.server.activate(state.model, found)
        except (RuntimeFailure, UnsupportedError) as error:
            _log.error("%s: %s; %s serves on", state.model, error, active.variant)
            return Event(Kind.MEASURED, installed=replace(active, measured_under=now), error=str(error))
        return Event(Kind.MEASURED, installed=found)

    def _switch(self, state: State) -> Event:
        candidate = state.candidate
        assert candidate is not None, "a trial has a candidate"
        if not self.store.is_whole(state.model, candidate.slot, candidate.package_sha256):
            return Event(Kind.LOST, error=f"slot {candidate.slot} is not whole any more; it is fetched again")
        self.server.activate(state.model, candidate)
        return Event(Kind.DONE, installed=candidate)

    def _index(self, state: State) -> PackageIndex:
        index = self._indexes.get(state.model)
        if index is None:
            raise StoreError(f"the index of {state.model} is not known since the start")
        return index
