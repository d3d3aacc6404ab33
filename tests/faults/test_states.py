# SPDX-License-Identifier: Apache-2.0
"""Every fault in every state: at each moment the old or the new version answers, whole, and the new one in the end.

A real agent on a real broker through a proxy that can be cut; repository, signatures, chunks, disk and runtime are the
real ones. `make test` takes a sample, `make test-all` every fault at every moment.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults import FAULTS, Fault, lasts
from moments import MOMENTS, Moment, Striker, come_to_rest
from notes import note
from world import Watch, World

from edgeopt_agent import machine
from edgeopt_agent.transports import mqtt as transport_module
from edgeopt_wire.messages import Phase

pytestmark = pytest.mark.flow

FASTER = {
    "FIRST_DELAY_S": 0.1, "MAX_DELAY_S": 0.3, "AWAY_DELAY_S": 0.3, "CONNECT_TIMEOUT_S": 1.0,
    "REPLY_TIMEOUT_S": 0.4, "CHUNK_TIMEOUT_S": 0.1, "ANSWER_S": 1.0, "WATCH_S": 0.1,
}  # fmt: skip
"""Pauses and time-outs of the transport, all in the same proportion or shorter."""
STRIDE = 61
"""Every so many-th case is what `make test` takes; prime, so that faults and moments both change."""
CASES = [(fault, moment) for fault in FAULTS for moment in MOMENTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FASTER.items():
            patch.setattr(transport_module, name, value)
        made = World(tmp_path_factory.mktemp("world"))
        yield made
        made.close()


def _suffer(world: World, fault: Fault, moment: Moment) -> None:
    """One case, from a device at rest to version 2."""
    come_to_rest(world, Phase.IDLE if moment.part else moment.phase)
    with Watch(world) as watch:
        try:
            _strike(world, fault, moment)
            if not fault.for_ever:
                lasts(world, fault)
                fault.mend(world)
                world.source.wait()
                world.want("2")
            world.run(lambda: world.is_settled, "version 2 serves and nothing is left to do")
        finally:
            fault.mend(world)
            world.source.wait()
    assert not watch.wrong, watch.wrong[:3]
    assert watch.answers > 3
    world.run_for(0.05)
    assert world.serves() == "2"


def _strike(world: World, fault: Fault, moment: Moment) -> None:
    if not moment.part:
        fault.strike(world)
        if not fault.is_wish:
            world.want("2")
        return
    striker = Striker(world, moment, lambda: fault.strike(world))
    world.want("2")
    world.run(lambda: striker.has_struck, f"{moment} is reached")


def _check(world: World, fault: Fault, moment: Moment) -> None:
    is_well = False
    try:
        _suffer(world, fault, moment)
        is_well = True
    finally:
        world.end()
        note("states", [(fault.name, str(moment), is_well)])


def _named(part: Fault | Moment) -> str:
    return part.name if isinstance(part, Fault) else str(part)


@pytest.mark.parametrize(("fault", "moment"), CASES[::STRIDE], ids=_named)
def test_a_fault_in_a_state(world: World, fault: Fault, moment: Moment) -> None:
    _check(world, fault, moment)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "moment"), CASES, ids=_named)
def test_every_fault_in_every_state(world: World, fault: Fault, moment: Moment) -> None:
    _check(world, fault, moment)


def test_every_state_that_the_machine_can_be_in_is_in_the_table() -> None:
    reached = set(machine.WORK) | set(machine.NEXT.values())
    assert reached <= {moment.phase for moment in MOMENTS}
    assert {moment.phase for moment in MOMENTS} == set(Phase) - {Phase.ROLLING_BACK}
