# SPDX-License-Identifier: Apache-2.0
"""`edgeopt-agent serve`: local inference alone. What is installed is served; nothing is fetched, nothing reported."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.drift import Drift
from edgeopt_agent.loads import Loads
from edgeopt_agent.serve.http import LocalServer
from edgeopt_agent.serve.models import Models
from edgeopt_agent.service import CONDITION_S, Service
from edgeopt_agent.store import Store
from edgeopt_agent.surroundings import Surroundings
from edgeopt_wire.errors import RecipeError

_log = logging.getLogger(__name__)


def load_models(store: Store, models: Models) -> list[str]:
    """Serve every active package of the store; return the names of those that serve. One that fails is logged.

    One that took too many starts along is not loaded; `run` goes to the previous package then.
    """
    served, loads = [], Loads(store.folder)
    found = {name: active for name in store.models() if (active := store.load_state(name).active)}
    for name, active in sorted(found.items(), key=lambda entry: loads.deaths(*entry)):
        if why := loads.why(name, active):
            _log.error("%s: %s", name, why)
            models.leave(name, active.version, why)
            continue
        try:
            with loads.counted(name, active):
                models.activate(name, active)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises, the others serve
            _log.error("%s: the active package cannot be served: %s", name, error)
            continue
        served.append(name)
    return served


def serve(config: AgentConfig, stop: threading.Event | None = None) -> None:
    """Serve until SIGTERM or SIGINT (or until `stop`, which then takes no signals).

    Raises:
        StoreError: The state directory cannot be used, or another agent uses it.
        RecipeError: No model is installed that can be served.
    """
    from edgeopt_agent.main import only_one, utc_now

    store = Store(config.folder)
    with only_one(store):
        drift = Drift(config.drift, store.folder / "drift.json")
        service = Service(utc_now, surroundings=Surroundings().look, drift=drift)
        models = Models(store, config.serving, service)
        if not load_models(store, models):
            raise RecipeError(f"no model of {config.folder} can be served; install one first")
        if stop is None:
            stop = _stop_at_signal()
        server = LocalServer(config.socket_path, models, config.http)
        server.start()
        _log.info("serving %s on %s", ", ".join(models.names()), config.socket_path)
        try:
            while not stop.wait(CONDITION_S):
                service.look_around()
                drift.take()
        finally:
            server.stop()


def _stop_at_signal() -> threading.Event:
    stop = threading.Event()

    def end(number: int, _frame: Any) -> None:
        _log.info("signal %d: ending after what is in hand", number)
        stop.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    return stop
