# SPDX-License-Identifier: Apache-2.0
"""Putting an agent together from its configuration, and running it as a process."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.allowance import Allowance
from edgeopt_agent.config import AgentConfig, load_config, make_transport, mqtt_options
from edgeopt_agent.drift import Drift
from edgeopt_agent.loop import Agent
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.past import past_of
from edgeopt_agent.probe import run_probe
from edgeopt_agent.serve.http import LocalServer
from edgeopt_agent.serve.models import Models
from edgeopt_agent.service import Service
from edgeopt_agent.spending import SPENDING, Spending
from edgeopt_agent.store import Store
from edgeopt_agent.surroundings import Surroundings
from edgeopt_agent.systemd import Pulse, notify
from edgeopt_agent.transports import INBOX_LENGTH, Happened, Inbox, Transport
from edgeopt_agent.trust import Trust, read_root
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_agent.upkeep import look_after
from edgeopt_wire.errors import EdgeoptError, RecipeError, StoreError

if TYPE_CHECKING:
    from edgeopt_agent.renewing import Renewing

_log = logging.getLogger(__name__)


def make_agent(
    config: AgentConfig,
    store: Store,
    transport: Transport,
    inbox: Inbox,
    *,
    progress: Callable[[], None] = lambda: None,
    clock: TrustedClock | None = None,
) -> Agent:
    """Make an agent on a store and a transport; `progress` is told whenever its loop got somewhere.

    Raises:
        StoreError: The root of trust cannot be read.
        TrustError: The root of trust is none.
    """
    clock = clock or TrustedClock(utc_now, store.newest_moment)
    transport.use_clock(clock)
    spending = make_spending(store, transport, clock)
    trust = Trust(
        store.folder / "metadata",
        read_root(Path(config.root)),
        partial(spending.fetch, transport.fetch),
        clock,
        needs_time=transport.tells_time,
        past=lambda: past_of(store),
        complain=store.complain,
    )
    outbox = Outbox(store.folder / "outbox", config.device)
    service = Service(
        clock.now,
        store.folder / "service.json",
        config.service_report_s,
        surroundings=Surroundings().look,
        drift=Drift(config.drift, store.folder / "drift.json"),
    )
    models = Models(store, config.serving, service)
    session = uuid.uuid4().hex
    agent = Agent(
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
        progress=progress,
        spending=spending,
    )
    look_after(agent, clock.now)
    facts = agent.facts
    agent.facts = lambda: {**facts(), **({"transfer": spending.to_json()} if spending.is_limited else {})}
    return agent


def make_spending(store: Store, transport: Transport, clock: TrustedClock) -> Spending:
    """What counts a transport's bytes and keeps to what its configuration allows; a folder is no network."""
    if not hasattr(transport, "allowance"):
        return Spending(None, clock)
    return Spending(store.folder / SPENDING, clock, lambda: getattr(transport, "allowance", Allowance()))


def run_agent(config: AgentConfig, *, once: bool = False, path: Path | None = None) -> None:
    """Run until SIGTERM or SIGINT; with `once`, until nothing is left to do.

    SIGHUP reads the configuration at `path` again. systemd is told what it asks for.

    Raises:
        StoreError: The state directory cannot be used, or another agent uses it.
        RecipeError: The configuration is wrong.
    """
    store = Store(config.folder)
    with only_one(store):
        inbox: Inbox = queue.Queue(INBOX_LENGTH)
        transport, pulse = make_transport(config, inbox), Pulse()
        clock = TrustedClock(utc_now, store.newest_moment)
        agent = make_agent(config, store, transport, inbox, progress=pulse.mark, clock=clock)
        renewing = make_renewing(config, path, agent, inbox, clock)
        server = LocalServer(config.socket_path, agent.models, config.http)
        server.start()

        def stop(number: int, _frame: Any) -> None:
            _log.info("signal %d: ending after what is in hand", number)
            notify("STOPPING=1")
            agent.stop()

        def hang_up(_number: int, _frame: Any) -> None:
            # not here: a signal comes in the middle of anything
            threading.Thread(target=reload_config, args=(config, path, transport), daemon=True).start()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGHUP, hang_up)
        pulse.start()
        if renewing is not None:
            renewing.start()
        notify("READY=1")
        try:
            if once:
                run_once(agent)
            else:
                agent.run()
        finally:
            server.stop()
            pulse.stop()
            if renewing is not None:
                renewing.stop()


def reload_config(running: AgentConfig, path: Path | None, transport: Transport) -> bool:
    """Read the configuration again and use what may change while the agent runs: the transport's keys.

    A configuration that is wrong, or that makes this another device, changes nothing; the log says why. Returns
    whether it is in use. A new connection reads certificates anew, so this is also what renewal ends with.
    """
    from edgeopt_agent.transports.mqtt import MqttTransport

    notify("RELOADING=1")
    try:
        fresh = load_config(path) if path is not None else running
        kept = ("device", "device_class", "tenant", "state_dir", "root", "socket", "stand_in")
        changed = [key for key in kept if getattr(fresh, key) != getattr(running, key)]
        if changed or fresh.transport.get("kind") != running.transport.get("kind"):
            raise RecipeError(f"{', '.join(changed) or 'the kind of transport'} changes only with a restart")
        if isinstance(transport, MqttTransport):
            transport.reload(mqtt_options(fresh))
    except EdgeoptError as error:
        _log.error("the configuration is not used: %s", error)
        return False
    finally:
        notify("READY=1")
    _log.info("the configuration was read again")
    return True


def make_renewing(
    config: AgentConfig, path: Path | None, agent: Agent, inbox: Inbox, clock: TrustedClock
) -> Renewing | None:
    """What renews this device's certificate while it runs; None where it did not come by enrolment, or may not."""
    from edgeopt_agent.renewing import Renewing, Session, is_ours, make_renewal

    if not is_ours(config) or not config.enrolment.renew:
        return None

    def tell(body: dict[str, Any]) -> None:
        try:
            inbox.put_nowait(Happened("certificate", body))
        except queue.Full:
            _log.warning("too many messages wait; %s is not told", body)

    transport = agent.transport
    session = Session(
        is_online=lambda: bool(getattr(transport, "is_online", False)),
        is_busy=lambda: agent.is_busy,
        reconnect=lambda: reload_config(config, path, transport),
    )
    return Renewing(make_renewal(config, clock.certain, tell), clock, session)


def run_once(agent: Agent) -> None:
    """Run until no work is left, e.g. after an installation from a folder."""
    agent.start()
    agent.tick()
    while agent.is_busy:
        agent.tick(0.1)
    agent.close()


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
