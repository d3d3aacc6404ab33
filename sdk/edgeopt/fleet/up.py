# SPDX-License-Identifier: Apache-2.0
"""`edgeopt fleet up`: broker, control plane and page in one process group, until it is told to stop."""

from __future__ import annotations

import base64
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeopt.fleet.broker import EmbeddedBroker, free_port
from edgeopt.keys import Ask, load_signer
from edgeopt.repository import Repository
from edgeopt_wire.errors import RecipeError, StoreError, TransportError

_log = logging.getLogger(__name__)

SHUTDOWN_S = 5
"""How long requests in hand may take when the fleet is told to end."""


@dataclass(frozen=True)
class FleetOptions:
    """How to run a fleet. Without `broker` the embedded one is started on loopback."""

    folder: Path
    repository: Path
    keys: Path
    http_port: int = 8765
    mqtt_port: int = 0
    broker: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    database: str = ""
    tenant: str = "default"
    hosts: tuple[str, ...] = ()
    authority: Path | None = None
    enrol_listen: str = "127.0.0.1"
    enrol_port: int = 8443
    enrol_hosts: tuple[str, ...] = ("localhost", "127.0.0.1")
    broker_files: Path | None = None
    broker_reload: str = ""
    grace_days: int = 180
    certificate_life_s: int = 90 * 24 * 3600


def run_fleet(options: FleetOptions, *, ask: Ask | None, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """Run until SIGINT or SIGTERM; `on_ready` is told the addresses once everything listens.

    Raises:
        StoreError: The fleet's folder or a key cannot be used.
        TransportError: No broker, or a port is taken.
    """
    import uvicorn

    from edgeopt.fleet.app import make_app
    from edgeopt.fleet.catalog import Catalog
    from edgeopt.fleet.control import Control
    from edgeopt.fleet.database import engine_of, open_database, sqlite_url
    from edgeopt.fleet.enrol_routes import add_enrolment
    from edgeopt.fleet.enrol_server import endpoint_facts, start_enrolment
    from edgeopt.fleet.queries import Queries
    from edgeopt.fleet.worker import BrokerAddress, Worker

    check_port(options.http_port, "--http-port")
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write {options.folder}: {error.strerror}") from error
    director = load_signer(options.keys, "director", ask)
    freshen = _freshener(options, ask)
    freshen()
    with ExitStack() as stack:
        address = _address(options, stack, BrokerAddress)
        sessions = open_database(options.database or sqlite_url(options.folder))
        stack.callback(engine_of(sessions).dispose)
        catalog = Catalog(options.repository)
        control = Control(sessions, catalog, director, utc_now)
        enrolment = start_enrolment(options, sessions, address, stack, ask)
        worker = Worker(control, address, options.tenant, freshen)
        worker.start()
        stack.callback(worker.stop)

        def connection() -> dict[str, Any]:
            root = Repository(options.repository, {}, utc_now()).trusted_root()
            return {
                "tenant": options.tenant,
                "mqtt_host": address.host,
                "mqtt_port": address.port,
                "broker_connected": worker.is_connected,
                "root": base64.b64encode(root).decode("ascii"),
            }

        app = make_app(control, Queries(sessions, catalog), connection, options.hosts)
        add_enrolment(
            app, enrolment.enrolment if enrolment else None, lambda: endpoint_facts(options, enrolment)
        )
        config = uvicorn.Config(
            app,
            host="127.0.0.1",
            port=options.http_port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        server = uvicorn.Server(config)
        endpoint = enrolment.listen(connection, stack) if enrolment else ""
        with _stopped_by_signals(server):
            on_ready(
                {
                    "http": f"http://127.0.0.1:{options.http_port}",
                    "mqtt": f"mqtt{'s' if address.ca else ''}://{address.host}:{address.port}",
                    "enrolment": endpoint,
                }
            )
            server.run()


def utc_now() -> datetime:
    """This moment, whole seconds, UTC."""
    return datetime.now(UTC).replace(microsecond=0)


@contextmanager
def _stopped_by_signals(server: Any) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the server and nothing else.

    uvicorn raises them again after its own clean-up, and the default would end the process before ours.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:  # noqa: ARG001 - the signature of a signal handler
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _address(options: FleetOptions, stack: ExitStack, make: Any) -> Any:
    if not options.broker:
        broker = EmbeddedBroker(options.folder, options.mqtt_port or free_port())
        broker.start()
        stack.callback(broker.stop)
        return make("127.0.0.1", broker.port)
    from urllib.parse import urlsplit

    parts = urlsplit(options.broker)
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise RecipeError(
            f"--broker must look like mqtt://host:1883 or mqtts://host:8883, found {options.broker!r}"
        )
    ca, certificate = options.ca, options.certificate
    if options.broker_files is not None:
        ca = ca or str(options.broker_files / "ca.pem")
        certificate = certificate or str(options.broker_files / "control.pem")
    if parts.scheme == "mqtts" and not ca:
        raise RecipeError(
            "mqtts needs --ca, the certificate of the authority that signed the broker's, or --broker-files"
        )
    default = 8883 if parts.scheme == "mqtts" else 1883
    ca = ca if parts.scheme == "mqtts" else ""
    return make(parts.hostname, parts.port or default, ca, certificate, options.key)


def _freshener(options: FleetOptions, ask: Ask | None) -> Callable[[], None]:
    """What signs the timestamp again if it ends soon; nothing where its keys are not here."""
    from edgeopt.keys import key_path

    if not all(key_path(options.keys, role).exists() for role in ("snapshot", "timestamp")):
        _log.warning(
            "%s has no snapshot and timestamp keys: keep the repository fresh elsewhere, or devices refuse it",
            options.keys,
        )
        return lambda: None
    signers = {role: load_signer(options.keys, role, ask) for role in ("snapshot", "timestamp")}

    def freshen() -> None:
        repository = Repository(options.repository, signers, utc_now())
        if repository.exists and repository.freshen():
            _log.info("snapshot and timestamp were signed again")

    return freshen


def check_port(port: int, option: str, host: str = "127.0.0.1") -> None:
    """Whether a port can be listened on.

    Raises:
        TransportError: It cannot; `option` is what chooses another.
    """
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TransportError(
                f"port {port} is taken ({error.strerror}); choose another with {option}"
            ) from error
