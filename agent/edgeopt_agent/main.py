# SPDX-License-Identifier: Apache-2.0
"""Putting an agent together from its configuration, and running it as a process."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeopt_agent.config import AgentConfig, make_transport
from edgeopt_agent.loop import Agent
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.probe import run_probe
from edgeopt_agent.serve.http import LocalServer
from edgeopt_agent.serve.models import Models
from edgeopt_agent.store import Store
from edgeopt_agent.transports import INBOX_LENGTH, Inbox, Transport
from edgeopt_agent.trust import Trust, read_root
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.errors import StoreError

_log = logging.getLogger(__name__)


def make_agent(config: AgentConfig, store: Store, transport: Transport, inbox: Inbox) -> Agent:
    """Make an agent on a store and a transport.

    Raises:
        StoreError: The root of trust cannot be read.
        TrustError: The root of trust is none.
    """
    clock = TrustedClock(utc_now, lambda: store.load_device().newest_moment)
    trust = Trust(
        store.folder / "metadata",
        read_root(Path(config.root)),
        transport.fetch,
        clock,
        needs_time=transport.tells_time,
    )
    outbox = Outbox(store.folder / "outbox", config.device)
    models = Models(store)
    session = uuid.uuid4().hex
    return Agent(
        config,
        store,
        transport,
        inbox,
        trust=trust,
        outbox=outbox,
        models=models,
        probe=run_probe,
        now=clock.now,
        session=session,
    )


def run_agent(config: AgentConfig, *, once: bool = False) -> None:
    """Run until SIGTERM or SIGINT; with `once`, until nothing is left to do.

    Raises:
        StoreError: The state directory cannot be used, or another agent uses it.
        RecipeError: The configuration is wrong.
    """
    store = Store(config.folder)
    with only_one(store):
        inbox: Inbox = queue.Queue(INBOX_LENGTH)
        agent = make_agent(config, store, make_transport(config, inbox), inbox)
        server = LocalServer(config.socket_path, agent.models)
        server.start()

        def stop(number: int, _frame: Any) -> None:
            _log.info("signal %d: ending after what is in hand", number)
            agent.stop()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        try:
            if once:
                run_once(agent)
            else:
                agent.run()
        finally:
            server.stop()


def run_once(agent: Agent) -> None:
    """Run until no work is left, e.g. after an installation from a folder."""
    agent.start()
    agent.tick()
    while agent.is_busy:
        agent.tick(0.1)
    agent.transport.close()


@contextmanager
def only_one(store: Store) -> Iterator[None]:
    """Hold the state directory's lock; the kernel frees it when the process ends, however it ends.

    Raises:
        StoreError: Another agent holds it.
    """
    path = store.folder / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StoreError(
            f"another agent uses {store.folder}; stop it first, or give this one another state_dir"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def utc_now() -> datetime:
    """This moment, UTC, whole seconds."""
    return datetime.now(timezone.utc).replace(microsecond=0)
