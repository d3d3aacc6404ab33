# SPDX-License-Identifier: Apache-2.0
"""What a device is asked to do while something goes wrong, and what must be true afterwards."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import device_lives
import numpy as np
from device_lives import serves
from publishing import Publisher

from edgeopt_agent.loop import Agent

NAMES = ("update", "first", "wrong", "forget", "back")
PADDING_BYTES = 150_000
"""So that a package has three chunks. It is the same in every version: an update comes as a delta, the first whole."""


@dataclass(frozen=True)
class Scenario:
    """A wish. `allowed` are the versions that may serve after a fault, None where nothing may; `final` comes in the end."""

    name: str
    before: tuple[str, ...]
    wanted: tuple[str, ...]
    allowed: frozenset[str | None]
    final: str | None


SCENARIOS = {
    entry.name: entry
    for entry in (
        Scenario("update", ("1",), ("2",), frozenset({"1", "2"}), "2"),
        Scenario("first", (), ("1",), frozenset({None, "1"}), "1"),
        Scenario("wrong", ("1",), ("3",), frozenset({"1"}), "1"),
        Scenario("forget", ("1",), (), frozenset({"1", None}), None),
        Scenario("back", ("1", "2"), ("1",), frozenset({"1", "2"}), "1"),
    )
}


class Site:
    """A repository with three versions of a model (the third computes wrong), and the state before each scenario."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.publisher = Publisher(folder / "publisher")
        for version, failure in (("1", "none"), ("2", "none"), ("3", "wrong")):
            work = folder / "publisher" / f"package-{version}"
            work.mkdir(parents=True)
            noise = np.random.default_rng(0).bytes(PADDING_BYTES)
            (work / "padding.bin").write_bytes(noise)
            self.publisher.add(version, failure=failure)
        self._before: dict[tuple[str, ...], Path] = {}

    def envelope(self, scenario: Scenario) -> Path:
        """The signed wish of a scenario."""
        path = self.folder / f"{scenario.name}.json"
        if not path.is_file():
            path.write_bytes(self.publisher.desire(len(scenario.before) + 1, *scenario.wanted))
        return path

    def before(self, scenario: Scenario) -> Path:
        """The state directory that a scenario begins with, made by an agent to which nothing happens."""
        if scenario.before not in self._before:
            state = self.folder / f"before-{'-'.join(scenario.before) or 'nothing'}"
            state.mkdir()
            for revision, version in enumerate(scenario.before, 1):
                agent = self.agent(state)
                device_lives.live(agent, self.publisher.desire(revision, version))
                assert serves(agent) == version
            self._before[scenario.before] = state
        return self._before[scenario.before]

    def copy(self, scenario: Scenario, target: Path) -> Path:
        """A fresh copy of that."""
        return Path(shutil.copytree(self.before(scenario), target, symlinks=True))

    def agent(self, state: Path) -> Agent:
        return device_lives.make(state, self.publisher.root, self.publisher.repository)

    def arguments(self, state: Path, scenario: Scenario) -> list[str]:
        """What `device_lives.py` is called with."""
        return [
            str(place)
            for place in (state, self.publisher.root, self.publisher.repository, self.envelope(scenario))
        ]

    def check(self, state: Path, scenario: Scenario) -> None:
        """After a fault: what is allowed serves at once, and once the fault is gone the wish comes true.

        Raises:
            AssertionError: It does not.
        """
        agent = self.agent(state)
        seconds = [0.0]
        agent._monotonic = lambda: seconds[0]
        agent.start()
        found = serves(agent)
        assert found in scenario.allowed, f"after the fault {found} serves"
        device_lives.wish(agent, self.envelope(scenario).read_bytes(), seconds)
        found = serves(agent)
        said = {name: (entry.phase.value, entry.error) for name, entry in agent.states.items()}
        assert found == scenario.final, f"without the fault {found} serves: {said}"
