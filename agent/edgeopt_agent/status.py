# SPDX-License-Identifier: Apache-2.0
"""What this device runs, read from its state directory; works whether or not the agent runs."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import Any

from edgeopt_agent.certificate_status import certificate_status
from edgeopt_agent.config import AgentConfig, mqtt_options
from edgeopt_agent.drift import read_memories, summary
from edgeopt_agent.housekeeping import Housekeeper
from edgeopt_agent.loads import Loads
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.schedule import degraded
from edgeopt_agent.serve.http import ask
from edgeopt_agent.spending import SPENDING, Spending
from edgeopt_agent.store import Store
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire import __version__
from edgeopt_wire.errors import EdgeoptError, StoreError

_log = logging.getLogger(__name__)


def describe(config: AgentConfig) -> dict[str, Any]:
    """The status as one JSON-like document.

    Raises:
        StoreError: The state directory cannot be used.
    """
    store = Store(config.folder)
    keeper = Housekeeper(store, config.disk_quota)
    outbox = Outbox(config.folder / "outbox", config.device)
    models = []
    for name in store.models():
        state = store.load_state(name)
        active, candidate = state.active, state.candidate
        models.append(
            {
                "name": name,
                "phase": state.phase.value,
                "version": active.version if active else "",
                "variant": active.variant if active else "",
                "package_sha256": active.package_sha256 if active else "",
                "slot": active.slot if active else "",
                "candidate": candidate.version if candidate else "",
                "previous": state.previous.version if state.previous else "",
                "error": state.error,
            }
        )
    return {
        "schema": "edgeopt.status/1",
        "device": config.device,
        "device_class": config.device_class,
        "stand_in": config.stand_in,
        "agent_version": __version__,
        "running": is_running(config),
        "desired_revision": _revision(store),
        "models": models,
        "degraded": {**degraded(config.folder / "upkeep.json"), **_unserved(store)},
        "drift": {
            name: summary(entry) for name, entry in read_memories(config.folder / "drift.json").items()
        },
        "events_waiting": len(outbox),
        "events_dropped": outbox.dropped,
        "transfer": _transfer(config, store),
        "disk_free_bytes": store.free_bytes(),
        "disk_used_bytes": keeper.used_bytes(),
        "disk_quota_bytes": keeper.quota_bytes(),
        "certificate": _certificate(config, store),
    }


def _unserved(store: Store) -> dict[str, str]:
    """Models that took the agent along too often to be loaded, and why."""
    loads = Loads(store.folder)
    found: dict[str, str] = {}
    for name in store.models():
        active = store.load_state(name).active
        why = loads.why(name, active) if active is not None else ""
        found |= {name: why} if why else {}
    return found


def _revision(store: Store) -> int:
    """The newest revision that was obeyed; 0 where the record cannot be read, which the log says."""
    try:
        return store.load_device().revision
    except StoreError as error:
        _log.error("%s", error)
        return 0


def _transfer(config: AgentConfig, store: Store) -> dict[str, Any] | None:
    """What was sent and fetched, and what is allowed; None where packages come from a folder.

    Between two notes of a running agent the sums are at most a step (1 MiB, or a 64th of a budget) too high.
    """
    if config.transport.get("kind") != "mqtt":
        return None
    allowance = mqtt_options(config).allowance
    clock = TrustedClock(lambda: datetime.now(timezone.utc), store.newest_moment)
    return Spending(store.folder / SPENDING, clock, lambda: allowance).to_json()


def _certificate(config: AgentConfig, store: Store) -> dict[str, Any] | None:
    found = certificate_status(config)
    clock = TrustedClock(lambda: datetime.now(timezone.utc), store.newest_moment)
    return None if found is None else found.to_json(clock.now())


def is_running(config: AgentConfig) -> bool:
    """Whether an agent answers here now."""
    try:
        ask(config.socket_path, "GET", "/v2/health/live")
    except EdgeoptError:
        return False
    return True
