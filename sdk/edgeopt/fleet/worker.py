# SPDX-License-Identifier: Apache-2.0
"""The control plane on MQTT: takes what devices publish, answers on their own topics, sends signed desired documents.

Rules:
- Callbacks only enqueue; one thread works. An acknowledgement is sent after the database has committed.
- A broker may forget what it retained: after every connect all desired documents are published again, and a device
  that reports an old revision gets its document again.
- Packages' bytes are the business of `courier`, on the same connection.
- The device in a topic must be the device in the document; an answer goes to that device's topics only.
"""

from __future__ import annotations

import base64
import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from edgeopt.fleet.control import Control
from edgeopt.fleet.courier import Courier
from edgeopt_wire import topics
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError, EdgeoptError, StoreError, TransportError
from edgeopt_wire.messages import EventBatch, MetaReply, MetaRequest, Presence, Pull, PullRefused, Reported

_log = logging.getLogger(__name__)

T = TypeVar("T")

QUEUE_LENGTH = 10_000
STEP_EVERY_S = 0.5
FRESHEN_EVERY_S = 60.0
"""The timestamp is signed again two days before it ends, and what a team signed shows within this time."""
CONNECT_TIMEOUT_S = 15.0
MAX_MESSAGE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker is, and what proves who we are to it."""

    host: str
    port: int
    ca: str = ""
    certificate: str = ""
    key: str = ""


class Worker:
    """One connection to the broker and one thread that serves devices."""

    def __init__(
        self,
        control: Control,
        address: BrokerAddress,
        tenant: str = "default",
        freshen: Callable[[], None] = lambda: None,
        freshen_every_s: float = FRESHEN_EVERY_S,
    ) -> None:
        self._control = control
        self._address = address
        self._tenant = tenant
        self._freshen = freshen
        self._freshen_every_s = freshen_every_s
        self._inbox: queue.Queue[tuple[str, bytes]] = queue.Queue(QUEUE_LENGTH)
        self._connected = threading.Event()
        self._resend = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fleet-worker", daemon=True)
        self._tls: ssl.SSLContext | None = None
        self._client = self._make_client()
        self._courier = Courier(tenant, control, control.catalog.chunk, self._send_chunk)
        self._handlers: dict[str, Callable[[str, bytes], None]] = {
            "presence": self._presence,
            "reported": self._reported,
            "event": self._event,
            "pull": self._pull,
            "meta": self._meta,
        }

    @property
    def is_connected(self) -> bool:
        """Whether the broker is there now."""
        return self._connected.is_set()

    def start(self) -> None:
        """Connect and begin to serve.

        Raises:
            TransportError: The broker is not there, or refused us.
        """
        where = f"{self._address.host}:{self._address.port}"
        try:
            self._client.connect(self._address.host, self._address.port, keepalive=30, clean_start=True)
        except (OSError, ValueError) as error:
            raise TransportError(
                f"no MQTT broker at {where}: {error}; start one, or leave --broker out to use the embedded one"
            ) from error
        self._client.loop_start()
        if not self._connected.wait(CONNECT_TIMEOUT_S):
            self._client.loop_stop()
            raise TransportError(
                f"the broker at {where} did not accept the connection within {CONNECT_TIMEOUT_S:.0f} s"
            )
        self._courier.start()
        self._thread.start()

    def stop(self) -> None:
        """Finish the message in hand and disconnect."""
        self._stopping.set()
        self._courier.stop()
        if self._thread.is_alive():
            self._thread.join(10)
        self._client.disconnect()
        self._client.loop_stop()

    def _make_client(self) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=f"edgeopt-control-{self._tenant}", protocol=mqtt.MQTTv5
        )
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_socket_open = _no_delay
        client.reconnect_delay_set(1, 30)
        if self._address.ca:
            self._tls = ssl.create_default_context(cafile=self._address.ca)
            self._read_certificate()
            client.tls_set_context(self._tls)
        return client

    def _read_certificate(self) -> None:
        """Use the certificate that lies there now from the next connection on: it is made anew every two months."""
        if self._tls is None or not self._address.certificate:
            return
        try:
            self._tls.load_cert_chain(self._address.certificate, self._address.key or None)
        except OSError as error:
            raise StoreError(f"cannot use the certificate {self._address.certificate}: {error}") from error

    def _on_connect(self, client: mqtt.Client, _user: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            _log.error("the broker refused the control plane: %s", reason)
            return
        client.subscribe(
            [(topics.every_device(self._tenant, what), SubscribeOptions(qos=1)) for what in topics.UP]
        )
        self._courier.connected(getattr(properties, "MaximumPacketSize", 0) or 0)
        self._resend.set()
        self._connected.set()

    def _on_disconnect(
        self, _client: mqtt.Client, _user: Any, _flags: Any, reason: Any, _properties: Any
    ) -> None:
        self._connected.clear()
        try:
            self._read_certificate()
        except StoreError as error:
            _log.error("%s; the one before is used", error)
        if not self._stopping.is_set():
            _log.warning("the broker is gone (%s); reconnecting", reason)

    def _on_message(self, _client: mqtt.Client, _user: Any, message: mqtt.MQTTMessage) -> None:
        try:
            self._inbox.put_nowait((message.topic, bytes(message.payload)))
        except queue.Full:
            _log.error("too many messages wait; dropped one on %s, its device sends again", message.topic)

    def _work(self) -> None:
        next_step = 0.0
        next_freshen = time.monotonic() + self._freshen_every_s
        while not self._stopping.is_set():
            try:
                topic, payload = self._inbox.get(timeout=STEP_EVERY_S)
            except queue.Empty:
                pass
            else:
                self._handle(topic, payload)
            if self._resend.is_set() and self._connected.is_set():
                self._resend.clear()
                self._guarded(
                    "publishing desired documents", lambda: self._publish_desired(self._control.device_ids())
                )
            if time.monotonic() >= next_freshen:
                next_freshen = time.monotonic() + self._freshen_every_s
                self._guarded("keeping the repository fresh", self._freshen)
            if time.monotonic() >= next_step:
                next_step = time.monotonic() + STEP_EVERY_S
                self._guarded("stepping rollouts", lambda: self._publish_desired(self._control.step()))

    def _handle(self, topic: str, payload: bytes) -> None:
        def handle() -> None:
            if len(payload) > MAX_MESSAGE_BYTES:
                raise DocumentError(f"{len(payload)} bytes on {topic}, at most {MAX_MESSAGE_BYTES} are read")
            _, device, what, _ = topics.parse(topic)
            self._handlers[what](device, payload)

        self._guarded(f"a message on {topic}", handle)

    def _guarded(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except EdgeoptError as error:
            _log.warning("%s: %s", what, error)
        except Exception:  # noqa: BLE001 - the outermost loop of this thread: one bad message must not end the fleet
            _log.exception("%s failed", what)

    def _publish_desired(self, devices: list[str]) -> None:
        for device in devices:
            envelope = self._control.envelope(device)
            if envelope is not None:
                self._send(device, "desired", envelope, retain=True)

    def _presence(self, device: str, payload: bytes) -> None:
        if payload:
            presence = _own(Presence, device, payload)
            self._control.take_presence(presence)
            if not presence.online:
                self._courier.gone(device)

    def _reported(self, device: str, payload: bytes) -> None:
        if self._control.take_report(_own(Reported, device, payload)):
            self._publish_desired([device])

    def _event(self, device: str, payload: bytes) -> None:
        ack = self._control.take_events(_own(EventBatch, device, payload))
        if ack is not None:
            self._send(device, "ack", to_bytes(ack))

    def _pull(self, device: str, payload: bytes) -> None:
        pull = from_bytes(Pull, payload)
        offer = self._courier.ask(device, pull)
        if offer is not None and offer.refusal:
            self._send(device, "refused", to_bytes(PullRefused(pull.sha256, offer.refusal)))
        elif offer is not None and offer.lanes is not None:
            topic = topics.offer(self._tenant, device, pull.sha256)
            self._client.publish(topic, to_bytes(offer.lanes), qos=1)

    def _meta(self, device: str, payload: bytes) -> None:
        request = from_bytes(MetaRequest, payload)
        if request.name.startswith("time/"):
            signed = self._control.signed_time(request.name.removeprefix("time/"))
            text = base64.b64encode(signed).decode("ascii")
            self._send(device, "meta-reply", to_bytes(MetaReply(request.id, True, 0, len(signed), text)))
            return
        self._send(device, "meta-reply", to_bytes(self._control.catalog.answer(request)))

    def _send_chunk(self, topic: str, content: bytes) -> mqtt.MQTTMessageInfo | None:
        receipt = self._client.publish(topic, content, qos=0)
        return receipt if receipt.rc == mqtt.MQTT_ERR_SUCCESS else None

    def _send(self, device: str, what: str, payload: bytes, *, retain: bool = False) -> None:
        self._client.publish(topics.topic(self._tenant, device, what), payload, qos=1, retain=retain)


def _own(cls: type[T], device: str, payload: bytes) -> T:
    """Read a document that must be about the device on whose topic it came."""
    document: Any = from_bytes(cls, payload)
    if document.device != device:
        raise DocumentError(f"a document of {document.device} came on the topic of {device}")
    found: T = document
    return found


def _no_delay(client: mqtt.Client, userdata: Any, sock: Any) -> None:  # noqa: ARG001 - paho's signature
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
