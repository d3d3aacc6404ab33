# SPDX-License-Identifier: Apache-2.0
"""MQTT 5: desired documents come retained, metadata in pages, packages in chunks that the device asks for.

Rules:
- Callbacks only enqueue. Nothing is expected from a broker's session: clean start, everything is asked for again.
- Pages and chunks are asked for by `mqtt_pull`, on the line that this module keeps.
- Reconnecting is ours: full jitter up to `MAX_DELAY_S`, reset only after a session that lasted; a broker that accepts
  and then kicks counts as one that refuses. Every reconnect takes a new client: paho would resend its whole backlog.
- Plain TCP goes to loopback only, unless the configuration says `insecure`.
"""

from __future__ import annotations

import logging
import queue
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeopt_agent.mqtt_pull import CHUNK_TIMEOUT_S, REPLY_TIMEOUT_S, Answers, Puller
from edgeopt_agent.pulling import Blobs
from edgeopt_agent.transports import MAX_FILE_BYTES, Acknowledged, Identity, Inbox, Message, Online, Wanted
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire import topics
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError, RecipeError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import (
    Ack,
    EventBatch,
    Presence,
    Reported,
)

_log = logging.getLogger(__name__)

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python's ssl has no name for."""

KEEPALIVE_S = 30
FIRST_DELAY_S, MAX_DELAY_S = 1.0, 60.0
SETTLED_S = 60.0
"""A session that lasted this long resets the delay."""
CONNECT_TIMEOUT_S = 15.0
ANSWERS_LENGTH = 512


@dataclass(frozen=True)
class MqttOptions:
    """Where the broker is, and what proves who we are to it."""

    host: str
    port: int = 8883
    ca: str = ""
    certificate: str = ""
    key: str = ""
    insecure: bool = False
    blobs: str = ""
    blobs_ca: str = ""

    def __post_init__(self) -> None:
        if not self.ca and not self.insecure and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise RecipeError(
                f"transport: {self.host} is not this machine and there is no `ca`; MQTT without TLS shows everything to "
                "the network. Give ca, certificate and key, or set insecure to true if you know better"
            )


class MqttTransport:
    """One device on one broker."""

    tells_time = True

    def __init__(
        self, options: MqttOptions, identity: Identity, inbox: Inbox, blobs: Blobs | None = None
    ) -> None:
        self._options = options
        self._blobs = blobs
        self._identity = identity
        self._inbox = inbox
        self._answers: Answers = queue.Queue(ANSWERS_LENGTH)
        self._online = threading.Event()
        self._lost = threading.Event()
        self._stopping = threading.Event()
        self._client: Any = None
        self._max_packet = 0
        self._clock: TrustedClock | None = None
        self._last_report: bytes | None = None
        self._thread = threading.Thread(target=self._keep_connected, name="mqtt", daemon=True)

    def use_clock(self, clock: TrustedClock) -> None:
        """Judge the broker's certificate by trusted time: OpenSSL knows the wall clock only."""
        self._clock = clock

    def start(self) -> None:
        """Begin to connect in the background."""
        self._thread.start()

    def reload(self, options: MqttOptions) -> None:
        """Connect anew with other options, or with the same whose files changed; certificates are read again."""
        self._options = options
        self._lost.set()

    def fetch(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes | None:
        """Ask for a file page by page; every page has its own request and an explicit answer."""
        return Puller(self, self._answers, reply_s=REPLY_TIMEOUT_S).fetch(name, max_bytes)

    def pull(self, index: PackageIndex, missing: Sequence[int], keep: Callable[[int, bytes], bool]) -> None:
        """Get chunks from the web server where one is configured, what it does not give from the broker."""
        waiting = list(missing)
        if self._blobs is not None:
            waiting = self._blobs.pull(index, waiting, keep)
        self.require_online()
        Puller(self, self._answers, silence_s=CHUNK_TIMEOUT_S).pull(index, waiting, keep)

    def report(self, reported: Reported) -> None:
        """Publish the state, retained; the newest is published again after every reconnect."""
        self._last_report = to_bytes(reported)
        self.publish("reported", self._last_report, retain=True)

    def send(self, batch: EventBatch) -> bool:
        """Publish a batch; too large a one for this broker is not handed over."""
        payload = to_bytes(batch)
        if self._max_packet and len(payload) + 256 > self._max_packet:
            _log.error(
                "a batch of %d bytes does not fit the broker's limit of %d", len(payload), self._max_packet
            )
            return False
        return self.publish("event", payload)

    def close(self) -> None:
        """Say offline and end."""
        self._stopping.set()
        if self._online.is_set():
            info = self._client.publish(
                self._topic("presence"), self._presence(online=False), qos=1, retain=True
            )
            try:
                info.wait_for_publish(2)
            except (ValueError, RuntimeError):
                _log.debug("the good-bye was not sent")
        self._lost.set()
        if self._thread.is_alive():
            self._thread.join(5)

    @property
    def is_online(self) -> bool:
        """Whether what is published now is handed over."""
        return self._online.is_set()

    def require_online(self) -> None:
        """Wait a little for the broker; TransportError if it stays away."""
        if not self._online.wait(REPLY_TIMEOUT_S):
            raise TransportError(f"the broker {self._options.host}:{self._options.port} is away")

    def publish(self, what: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand a message over at QoS 1; False where nobody listens."""
        if not self._online.is_set():
            return False
        return bool(self._client.publish(self._topic(what), payload, qos=1, retain=retain).rc == 0)

    def _keep_connected(self) -> None:
        delay = FIRST_DELAY_S
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._connect_once()
            except (OSError, ValueError) as error:
                _log.warning(
                    "cannot reach the broker %s:%d: %s", self._options.host, self._options.port, error
                )
            delay = FIRST_DELAY_S if time.monotonic() - started > SETTLED_S else min(MAX_DELAY_S, 2 * delay)
            self._stopping.wait(random.uniform(0.1, delay))

    def _connect_once(self) -> None:
        """Connect and stay until the connection is lost."""
        self._lost.clear()
        if self._stopping.is_set():
            return
        self._client = self._make_client()
        self._client.connect(self._options.host, self._options.port, keepalive=KEEPALIVE_S, clean_start=True)
        self._client.loop_start()
        try:
            if not self._lost.wait(CONNECT_TIMEOUT_S):
                if not self._online.is_set():
                    raise TimeoutError(
                        f"it took the connection and said nothing for {CONNECT_TIMEOUT_S:.0f} s"
                    )
                self._lost.wait()
        finally:
            self._online.clear()
            self._client.disconnect()
            self._client.loop_stop()

    def _make_client(self) -> Any:
        import paho.mqtt.client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        name = topics.client_id(self._identity.tenant, self._identity.device)
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5, reconnect_on_failure=False
        )
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_socket_open = _no_delay
        client.will_set(self._topic("presence"), self._presence(online=False), qos=1, retain=True)
        if self._options.ca:
            context = ssl.create_default_context(cafile=self._options.ca)
            if self._clock is not None and not self._clock.is_wall_plausible:
                # the wall clock is at 1970, say: the chain is checked as ever, its dates by `_check_certificate`
                context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
            if self._options.certificate:
                context.load_cert_chain(self._options.certificate, self._options.key or None)
            client.tls_set_context(context)
        return client

    def _on_connect(self, client: Any, _user: Any, _flags: Any, reason: Any, properties: Any) -> None:
        from paho.mqtt.subscribeoptions import SubscribeOptions

        if reason.is_failure:
            _log.error("the broker refused this device: %s", reason)
            self._lost.set()
            return
        if not self._check_certificate(client):
            self._lost.set()
            return
        self._max_packet = getattr(properties, "MaximumPacketSize", 0) or 0
        wanted = [("desired", 1), ("ack", 1), ("refused", 1), ("meta-reply", 1)]
        filters = [(self._topic(what), SubscribeOptions(qos=qos)) for what, qos in wanted]
        client.subscribe([*filters, (f"{self._topic('chunk')}/#", SubscribeOptions(qos=0))])

    def _check_certificate(self, client: Any) -> bool:
        """Whether the broker's certificate is valid at the trusted moment; nothing was sent over it yet but a name."""
        found = client.socket()
        if self._clock is None or not isinstance(found, ssl.SSLSocket):
            return True
        ends = (found.getpeercert() or {}).get("notAfter")
        now = self._clock.now().timestamp()
        if not isinstance(ends, str) or ssl.cert_time_to_seconds(ends) >= now:
            return True
        _log.error("the broker's certificate ended on %s; give it another", ends)
        return False

    def _on_subscribe(self, client: Any, _user: Any, _mid: Any, reasons: Any, _properties: Any) -> None:
        """Online counts from here: what is asked before could be answered into nothing."""
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            _log.error("the broker refused a subscription of this device: %s", ", ".join(refused))
            self._lost.set()
            return
        client.publish(self._topic("presence"), self._presence(online=True), qos=1, retain=True)
        if self._last_report is not None:
            client.publish(self._topic("reported"), self._last_report, qos=1, retain=True)
        self._online.set()
        self._tell(Online())

    def _on_disconnect(self, _client: Any, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not self._stopping.is_set():
            _log.warning("the connection to the broker is gone: %s", reason)
        self._online.clear()
        self._lost.set()

    def _on_message(self, _client: Any, _user: Any, message: Any) -> None:
        try:
            _, device, what, rest = topics.parse(message.topic)
            if device != self._identity.device:
                return
            if what == "desired":
                if message.payload:
                    self._tell(Wanted(bytes(message.payload)))
            elif what == "ack":
                self._tell(Acknowledged(from_bytes(Ack, bytes(message.payload))))
            else:
                self._answers.put_nowait((what, rest, bytes(message.payload)))
        except DocumentError as error:
            _log.warning("a message on %s is ignored: %s", message.topic, error)
        except queue.Full:
            _log.debug("an answer on %s is dropped; it is asked for again", message.topic)

    def _tell(self, message: Message) -> None:
        try:
            self._inbox.put_nowait(message)
        except queue.Full:
            _log.warning("too many messages wait; one is dropped, it comes again")

    def _topic(self, what: str) -> str:
        return topics.topic(self._identity.tenant, self._identity.device, what)

    def _presence(self, *, online: bool) -> bytes:
        who = self._identity
        return to_bytes(Presence(who.device, online, who.session, who.agent_version))


def _no_delay(_client: Any, _user: Any, sock: Any) -> None:
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
