# SPDX-License-Identifier: Apache-2.0
"""Lives of an agent on a state directory: start, take a wish, work until nothing is left; and what serves then.

`python device_lives.py STATE ROOT REPOSITORY ENVELOPE` is one life as a process. Keys, repository, trust, store,
archive, probe and null runtime are the real ones. In that process the probe is a process too, as on a device; elsewhere
the same code measures inside, which saves most of the time of a thousand lives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.loop import Agent
from edgeopt_agent.main import make_agent
from edgeopt_agent.probe import ProbeRequest, run_probe
from edgeopt_agent.probe_child import probe
from edgeopt_agent.store import Store
from edgeopt_agent.transports import Inbox, Wanted
from edgeopt_agent.transports.folder import FolderTransport
from edgeopt_wire.measurement import Measurement

HOUR_S = 3600.0
TICKS = 40
"""More than any installation takes; every tick is an hour later, so that every pause is over."""


def quick(request: ProbeRequest) -> ProbeRequest:
    """Three runs instead of a second of them."""
    return dataclasses.replace(request, warmup_ns=0, minimum_runs=3, minimum_ns=0, maximum_ns=10**9)


def quick_probe(request: ProbeRequest) -> Measurement:
    """The probe's own code, in this process."""
    return probe(quick(request))


def quick_probe_process(request: ProbeRequest, **options: Any) -> Measurement:
    """The real child process."""
    return run_probe(quick(request), **options)


def make(state: Path, root: Path, repository: Path) -> Agent:
    """An agent that has not started; its clock for pauses stands until `live` moves it."""
    inbox: Inbox = queue.Queue()
    config = AgentConfig("d1", "host", str(state), str(root), {"kind": "folder", "path": str(repository)})
    agent = make_agent(config, Store(state), FolderTransport(repository), inbox)
    agent.installer.probe = quick_probe
    return agent


def live(agent: Agent, envelope: bytes) -> None:
    """Start, take the wish, and work until nothing is left or the time is up."""
    seconds = [0.0]
    agent._monotonic = lambda: seconds[0]
    agent.start()
    wish(agent, envelope, seconds)


def wish(agent: Agent, envelope: bytes, seconds: list[float]) -> None:
    """Take a wish and work it off."""
    agent._inbox.put(Wanted(envelope))
    for _ in range(TICKS):
        seconds[0] += HOUR_S
        try:
            agent.tick()
        except Exception:
            logging.getLogger(__name__).exception("unexpected")
        if not agent.is_busy:
            return


def serves(agent: Agent) -> str | None:
    """The version that answers a real inference now, its slot whole to the last byte; None where nothing does."""
    if "tiny" not in agent.models.names():
        return None
    image = np.ones((1, 2, 4, 4), np.float32)
    loaded, outputs = agent.models.infer("tiny", {"image": image})
    assert np.array_equal(outputs["scores"], np.ones((1, 4), np.float32)), "a wrong answer"
    active = agent.states["tiny"].active
    assert active is not None
    assert active.version == loaded.manifest.version
    slot = agent.store.slot("tiny", active.slot)
    for entry in loaded.manifest.files:
        assert hashlib.sha256((slot / entry.path).read_bytes()).hexdigest() == entry.sha256, entry.path
    return loaded.manifest.version


def main() -> None:
    """Live once; whatever is raised ends the process with a traceback, which a test sees."""
    state, root, repository, envelope = map(Path, sys.argv[1:])
    agent = make(state, root, repository)
    agent.installer.probe = quick_probe_process
    live(agent, envelope.read_bytes())


if __name__ == "__main__":
    main()
