# SPDX-License-Identifier: Apache-2.0
"""A paho client as a device needs it: TLS judged by trusted time, and a socket that notices a dead peer.

Rules:
- paho never reconnects: it would come back at once, for ever, and resend its whole backlog.
- The chain of the broker's certificate is checked as ever. Its dates are checked by trusted time, because OpenSSL
  knows the wall clock only: with that at 1970 no board without a battery would ever connect.
- What was sent and not acknowledged by the peer's kernel for `DEAD_S` ends the connection (TCP_USER_TIMEOUT,
  RFC 5482); Linux alone goes on for about 15 minutes.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from edgeopt_agent.trusted_time import TrustedClock

_log = logging.getLogger(__name__)

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python's ssl has no name for."""

DEAD_S = 30.0
MAX_IN_FLIGHT = 16
"""Messages at QoS 1 that may wait for the broker's word at once, fewer where it says so (Receive Maximum)."""

TAKEN_OVER = 0x8E
"""MQTT 5 reason code: another connection uses this client id."""


def make_client(
    name: str, will: tuple[str, bytes], tls: ssl.SSLContext | None, in_flight: int = MAX_IN_FLIGHT
) -> Any:
    """A client that speaks MQTT 5, with a will (topic, payload); callbacks are the caller's."""
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    client = mqtt.Client(
        CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5, reconnect_on_failure=False
    )
    client.on_socket_open = _tune
    client.max_inflight_messages_set(in_flight)
    topic, payload = will
    client.will_set(topic, payload, qos=1, retain=True)
    if tls is not None:
        client.tls_set_context(tls)
    return client


def make_tls(
    ca: str, certificate: str, key: str, clock: TrustedClock | None, *, is_behind: bool = False
) -> ssl.SSLContext | None:
    """What checks the broker and proves us to it; None where no authority is given.

    `is_behind`: the wall clock is known to be behind, though it could be right by itself.

    Raises:
        OSError: A file cannot be read, or is no certificate or key.
    """
    if not ca:
        return None
    context = ssl.create_default_context(cafile=ca)
    if clock is not None and (is_behind or not clock.is_wall_plausible):
        context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    if certificate:
        context.load_cert_chain(certificate, key or None)
    return context


def certificate_problem(client: Any, clock: TrustedClock | None) -> str:
    """Why the broker's certificate is not valid at the trusted moment; empty if it is, or if there is no TLS."""
    found = client.socket()
    if clock is None or not isinstance(found, ssl.SSLSocket):
        return ""
    ends = (found.getpeercert() or {}).get("notAfter")
    if not isinstance(ends, str) or ssl.cert_time_to_seconds(ends) >= clock.now().timestamp():
        return ""
    return f"the broker's certificate ended on {ends}; give it another"


def is_nobody_there(error: Exception) -> bool:
    """Whether no program took the connection: no route, no name, no listener, or no answer to TCP itself."""
    if isinstance(error, ConnectionResetError | BrokenPipeError | ConnectionAbortedError | ssl.SSLError):
        return False
    return "handshake" not in str(error)


def hang_up(client: Any, wait: Callable[[float], Any], grace_s: float = 1.0) -> None:
    """Disconnect; a peer that does not take the good-bye within `grace_s` is left without.

    paho's thread would wait for ever to write what a silent peer does not read.
    """
    client.disconnect()
    waited = 0.0
    while client.socket() is not None and waited < grace_s:
        wait(0.05)
        waited += 0.05
    sock = client.socket()
    if sock is not None:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            _log.debug("the connection was over: %s", error)
    client.loop_stop()


def _tune(_client: Any, _user: Any, sock: Any) -> None:
    if not isinstance(sock, socket.socket):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEAD_S * 1000))
