# SPDX-License-Identifier: Apache-2.0
"""The enrolment endpoint as part of a running fleet: opens the authority, listens with TLS in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from edgeopt.fleet.admission import Admission
from edgeopt.fleet.authority import open_authority
from edgeopt.fleet.enrolment import Enrolment
from edgeopt.fleet.kick import kick
from edgeopt.fleet.mosquitto import MosquittoFolder
from edgeopt.fleet.up import FleetOptions, check_port, utc_now
from edgeopt.keys import Ask
from edgeopt_wire.errors import RecipeError, TransportError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, sessionmaker

    from edgeopt.fleet.worker import BrokerAddress

_log = logging.getLogger(__name__)

START_S = 10.0
MAX_AT_ONCE = 64
"""Connections beyond this are answered 503: enrolling is rare, and a device tries again."""


class EnrolServer:
    """Enrolment, what keeps its lists, and the listener."""

    def __init__(self, options: FleetOptions, enrolment: Enrolment, admission: Admission) -> None:
        self.enrolment = enrolment
        self._options = options
        self._admission = admission

    def listen(self, connection: Callable[[], dict[str, Any]], stack: ExitStack) -> str:
        """Listen until the stack unwinds; returns the address for people.

        Raises:
            TransportError: The port is taken.
            StoreError: The endpoint's certificate cannot be written.
        """
        import uvicorn

        from edgeopt.fleet.enrol_app import make_enrol_app

        config = uvicorn.Config(
            make_enrol_app(self.enrolment, connection),
            host=self._options.enrol_listen,
            port=self._options.enrol_port,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_AT_ONCE,
            timeout_keep_alive=5,
            ssl_certfile=self._admission.server_file(),
        )
        config.load()
        self._admission.use_context(config.ssl)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, name="enrolment", daemon=True)
        thread.start()
        deadline = time.monotonic() + START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise TransportError("the enrolment endpoint did not start; see the log")
            time.sleep(0.02)

        def stop() -> None:
            server.should_exit = True
            thread.join(10)

        stack.callback(stop)
        return f"https://{self._options.enrol_hosts[0]}:{self._options.enrol_port}"


def start_enrolment(
    options: FleetOptions,
    sessions: sessionmaker[Session],
    address: BrokerAddress,
    stack: ExitStack,
    ask: Ask | None,
) -> EnrolServer | None:
    """Open the authority and begin to keep the broker's lists; None without an authority.

    Raises:
        RecipeError: The broker's files are given and no authority.
        StoreError: The authority or the broker's folder cannot be read.
        TrustError: The authority's passphrase is wrong.
        TransportError: The endpoint's port is taken.
    """
    if options.authority is None:
        if options.broker_files is not None:
            raise RecipeError("--broker-files needs --authority: its lists are signed by the authority's key")
        return None
    check_port(options.enrol_port, "--enrol-port", options.enrol_listen)
    if not options.enrol_hosts:
        raise RecipeError(
            "say with --enrol-host by which name or address devices reach the enrolment endpoint"
        )
    authority = open_authority(options.authority, ask)
    enrolment = Enrolment(
        sessions,
        authority,
        options.tenant,
        utc_now,
        grace=timedelta(days=options.grace_days),
        life=timedelta(seconds=options.certificate_life_s),
    )
    broker = None
    if options.broker_files is not None:
        broker = MosquittoFolder(options.broker_files, authority, options.broker_reload)
    admission = Admission(
        enrolment,
        options.folder,
        options.enrol_hosts,
        utc_now,
        broker=broker,
        kick=lambda client_id: _kick(address, client_id),
    )
    admission.start()
    stack.callback(admission.stop)
    return EnrolServer(options, enrolment, admission)


def endpoint_facts(options: FleetOptions, server: EnrolServer | None) -> dict[str, Any]:
    """Where devices enrol, and the fingerprint that they pin; nothing without an authority."""
    if server is None:
        return {}
    return {
        "server": f"https://{options.enrol_hosts[0]}:{options.enrol_port}",
        "fingerprint": server.enrolment.authority.fingerprint,
        "ca": server.enrolment.authority.pem,
    }


def _kick(address: BrokerAddress, client_id: str) -> None:
    kick(address, client_id)
