# SPDX-License-Identifier: Apache-2.0
"""When a fault strikes: in every state of the machine, and where it works, as the work begins, amid it, and as it ends.

As the work begins: the state is saved, nothing else is done. As it ends: all is done, and the next state is not saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from world import World

from edgeopt_agent import machine
from edgeopt_agent.machine import Effect, Event, State
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import Phase

PARTS = ("begins", "amid", "ends")
AT_REST = (Phase.IDLE, Phase.COMMITTED, Phase.FAILED, Phase.ROLLED_BACK)


@dataclass(frozen=True)
class Moment:
    """A phase, and the part of its work; no part where the machine is at rest."""

    phase: Phase
    part: str = ""

    def __str__(self) -> str:
        return f"{self.phase.value} {self.part}".strip()


MOMENTS = tuple(Moment(phase) for phase in AT_REST) + tuple(
    Moment(phase, part) for phase in machine.WORK for part in PARTS
)


def come_to_rest(world: World, phase: Phase) -> None:
    """A fresh device in this phase, version 1 serving."""
    world.begin(rollout="" if phase is Phase.COMMITTED else "again")
    if phase is Phase.FAILED:
        world.want("wrong")
        world.run(lambda: world.state.phase is Phase.FAILED, "the wrong version is refused")
    elif phase is Phase.ROLLED_BACK:
        Striker(world, Moment(Phase.TRIAL, "begins"), lambda: _damage(world))
        world.want("2")
        world.run(lambda: world.state.phase is Phase.ROLLED_BACK, "the trial is rolled back")
    assert world.state.phase is phase, world.said
    assert world.serves() == "1"


def _damage(world: World) -> None:
    """The candidate's model file is not what it was when it was probed."""
    candidate = world.state.candidate
    assert candidate is not None
    folder = world.agent.store.slot("tiny", candidate.slot)
    (folder / "variants/a.json").write_bytes(b"\0")


class Striker:
    """Waits in one device for a moment of its work, and then strikes, once."""

    def __init__(self, world: World, moment: Moment, strike: Callable[[], None]) -> None:
        self._effect = machine.WORK[moment.phase]
        self._part = moment.part
        self._strike = strike
        self._is_in_hand = False
        self.has_struck = False
        installer = world.agent.installer
        self._work, installer.work = installer.work, self._around  # type: ignore[method-assign]
        self._wait_amid(world)

    def _around(self, effect: Effect, state: State) -> Event:
        if effect is not self._effect:
            return self._work(effect, state)
        self._reach("begins")
        self._is_in_hand = True
        event = self._work(effect, state)
        self._is_in_hand = False
        self._reach("ends")
        return event

    def _reach(self, part: str) -> None:
        if part == self._part and not self.has_struck:
            self.has_struck = True
            self._strike()

    def _amid(self) -> None:
        if self._is_in_hand:
            self._reach("amid")

    def _wait_amid(self, world: World) -> None:
        agent = world.agent
        if self._effect is Effect.RESOLVE:
            agent.trust._fetch = _then(agent.trust._fetch, self._amid)
        elif self._effect is Effect.DOWNLOAD:
            agent.installer.transport = _Pulls(agent.installer.transport, self._amid)  # type: ignore[assignment]
        elif self._effect is Effect.PLACE:
            agent.store.place = _then(agent.store.place, self._amid)  # type: ignore[method-assign]
        elif self._effect is Effect.VERIFY:
            agent.store.stage = _then(agent.store.stage, self._amid)  # type: ignore[method-assign]
        elif self._effect is Effect.PROBE:
            agent.installer.probe = _before(agent.installer.probe, self._amid)
        else:
            agent.installer.server = _Serves(agent.installer.server, self._amid)


def _then(call: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    def both(*arguments: Any) -> Any:
        found = call(*arguments)
        act()
        return found

    return both


def _before(call: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    def both(*arguments: Any) -> Any:
        act()
        return call(*arguments)

    return both


class _Pulls:
    """A transport in which something happens behind the first chunk of a pull."""

    def __init__(self, transport: Any, act: Callable[[], None]) -> None:
        self._transport, self._act = transport, act

    def pull(self, index: PackageIndex, missing: Sequence[int], keep: Callable[[int, bytes], bool]) -> None:
        self._transport.pull(index, missing, _then(keep, self._act))


class _Serves:
    """A server in which something happens behind the switch."""

    def __init__(self, server: Any, act: Callable[[], None]) -> None:
        self._server, self._act = server, act

    def activate(self, *arguments: Any) -> None:
        self._server.activate(*arguments)
        self._act()
