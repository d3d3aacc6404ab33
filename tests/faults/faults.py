# SPDX-License-Identifier: Apache-2.0
"""What can go wrong around a device, as a table: how it strikes, when it is over, and how it is mended."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from world import PowerCut, World

from edgeopt_wire.messages import MetaReply, MetaRequest, Phase

SHORT_S = 0.5
"""Longer than the pauses and time-outs of the tests, so that the device has noticed."""
SILENT_S = 2.5
"""Longer than the transport waits for what it is owed."""

Act = Callable[[World], None]


@dataclass(frozen=True)
class Fault:
    """It lasts until `is_over` says so, `lasts_s` at most, or (`for_ever`) until the device has come through it.

    `is_wish`: it is something that the control plane wants, and is not followed by another wish before it is over.
    """

    name: str
    strike: Act
    mend: Act = World.mend
    lasts_s: float = SHORT_S
    is_over: Callable[[World], bool] = lambda world: False
    for_ever: bool = False
    is_wish: bool = False


def _corrupt(world: World) -> None:
    world.source.chunk = lambda number, chunk: [(number, bytes(len(chunk)))]


def _forge(world: World) -> None:
    world.source.files, world.source.blobs = world.thief.files(), world.thief.blobs()


def _forge_wish(world: World) -> None:
    world.source.want(world.thief.desire(world.revision + 1000, "2"))


def _be_old(world: World) -> None:
    world.source.files = dict(world.before)


def _hang(world: World) -> None:
    """The control plane takes every question and answers none."""

    def page(request: MetaRequest) -> MetaReply:
        return MetaReply("another question", found=False)

    world.source.page = page
    world.source.chunk = lambda number, chunk: []


def _kill_broker(world: World) -> None:
    world.broker.stop()
    world.is_broker_gone = True


class _Unreliable:
    """Publishes for the control plane, and loses, repeats or delays messages; what was acknowledged (QoS 1) is not lost.

    A message that waits goes out behind the next one, or soon.
    """

    LATE_S = 0.05

    def __init__(self, publish: Callable[..., Any], lose: float, repeat: float, late: float) -> None:
        self._publish, self._chance = publish, random.Random(4)
        self._lose, self._repeat, self._late = lose, repeat, late

    def __call__(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        if qos == 0 and self._chance.random() < self._lose:
            return
        if self._chance.random() < self._late:
            threading.Timer(self.LATE_S, self._publish, (topic, payload, qos, retain)).start()
            return
        for _ in range(1 + (self._chance.random() < self._repeat)):
            self._publish(topic, payload, qos, retain)


def _shuffle(lose: float = 0.0, repeat: float = 0.0, late: float = 0.0) -> Act:
    def strike(world: World) -> None:
        client = world.source.client
        client.publish = _Unreliable(client.publish, lose, repeat, late)  # type: ignore[method-assign,assignment]

    return strike


def _set_clock(moment: datetime) -> Act:
    def strike(world: World) -> None:
        world.wall = lambda: moment

    return strike


def _run_ahead(world: World) -> None:
    world.wall = lambda: world.right_wall() + timedelta(days=5 * 365)


def _lose_power(moment: datetime | None) -> Act:
    """The device starts again, without a battery for its clock; at rest as well as amid its work."""

    def strike(world: World) -> None:
        if moment is not None:
            world.wall = lambda: moment
        if world.state.phase in (Phase.IDLE, Phase.COMMITTED, Phase.FAILED, Phase.ROLLED_BACK):
            world.reboot()
        else:
            raise PowerCut

    return strike


def _starve(world: World) -> None:
    """There is no memory for a probe."""
    world.probe_fails = True
    world.probes = 0


def _want(version: str) -> Fault:
    """The next wish is for a package whose model fails; over when the device has refused it."""

    def is_over(world: World) -> bool:
        desired = world.state.desired
        return world.state.phase is Phase.FAILED and desired is not None and desired.version == version

    said = {"crash": "crash in the runtime", "hang": "hang in the runtime", "leak": "OOM in the runtime"}
    return Fault(said[version], lambda world: world.want(version), lasts_s=20.0, is_over=is_over)


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FAR = datetime(2100, 1, 1, tzinfo=UTC)

FAULTS = (
    Fault("corrupt chunks", _corrupt),
    Fault("wrong signature (metadata)", _forge),
    Fault("wrong signature (wish)", _forge_wish, is_wish=True),
    Fault("old metadata", _be_old),
    Fault("control plane hangs", _hang),
    Fault("broker killed", _kill_broker),
    Fault("link cut", lambda world: world.proxy.cut()),
    Fault("link down", lambda world: world.proxy.refuse()),
    Fault("half-open connection", lambda world: world.proxy.silence(), lasts_s=SILENT_S),
    Fault("messages lost", _shuffle(lose=0.3), for_ever=True),
    Fault("messages duplicated", _shuffle(repeat=0.5), for_ever=True),
    Fault("messages reordered", _shuffle(late=0.3), for_ever=True),
    Fault("clock at 1970", _set_clock(EPOCH), for_ever=True),
    Fault("clock at 2100", _set_clock(FAR), for_ever=True),
    Fault("clock five years ahead", _run_ahead),
    Fault("power cut", _lose_power(None)),
    Fault("power cut, clock at 1970", _lose_power(EPOCH), for_ever=True),
    Fault("power cut, clock at 2100", _lose_power(FAR), for_ever=True),
    _want("crash"),
    _want("hang"),
    _want("leak"),
    Fault("no memory for the probe", _starve, lasts_s=2.0, is_over=lambda world: world.probes > 1),
)


def lasts(world: World, fault: Fault) -> None:
    """Let the device live with it."""
    end = time.monotonic() + fault.lasts_s
    world.run(
        lambda: fault.is_over(world) or time.monotonic() > end, f"{fault.name} is over", fault.lasts_s + 5
    )
