# SPDX-License-Identifier: Apache-2.0
"""One life of an agent on a state directory: start, take one wish, work until nothing is left.

`python device.py STATE ROOT REPOSITORY ENVELOPE` is that life as a process, which may be killed or lied to at any
system call. Keys, repository, trust, store, archive, probe process and null runtime are the real ones.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import sys
from pathlib import Path
from typing import Any

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.loop import Agent
from edgeopt_agent.main import make_agent
from edgeopt_agent.probe import ProbeRequest, run_probe
from edgeopt_agent.store import Store
from edgeopt_agent.transports import Inbox, Wanted
from edgeopt_agent.transports.folder import FolderTransport
from edgeopt_wire.measurement import Measurement

HOUR_S = 3600.0
TICKS = 40
"""More than any installation takes; every tick is an hour later, so that every pause is over."""


def make(state: Path, root: Path, repository: Path) -> Agent:
    """An agent that has not started; its clock for pauses stands until `live` moves it."""
    inbox: Inbox = queue.Queue()
    config = AgentConfig("d1", "host", str(state), str(root), {"kind": "folder", "path": str(repository)})
    agent = make_agent(config, Store(state), FolderTransport(repository), inbox)
    agent.installer.probe = _probe
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


def _probe(request: ProbeRequest, **options: Any) -> Measurement:
    """The real child process, with three runs instead of a second of them."""
    short = dataclasses.replace(request, warmup_ns=0, minimum_runs=3, minimum_ns=0, maximum_ns=10**9)
    return run_probe(short, **options)


def main() -> None:
    """Live once; whatever is raised ends the process with a traceback, which a test sees."""
    state, root, repository, envelope = map(Path, sys.argv[1:])
    live(make(state, root, repository), envelope.read_bytes())


if __name__ == "__main__":
    main()
