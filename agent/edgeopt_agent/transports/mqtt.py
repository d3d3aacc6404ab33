# SPDX-License-Identifier: Apache-2.0
"""MQTT 5: desired documents come retained, metadata in pages, packages in chunks that the device asks for.

Rules:
- Callbacks only enqueue. Nothing is expected from a broker's session: clean start, everything is asked for again.
- Chunks travel at QoS 0, window owned here; what does not arrive is asked for again, so a lost message, a broker that
  was killed and one that forgot everything all look the same.
- Reconnecting is ours: full jitter up to `MAX_DELAY_S`, reset only after a session that lasted; a broker that accepts
  and then kicks counts as one that refuses. Every reconnect takes a new client: paho would resend its whole backlog.
- Plain TCP goes to loopback only, unless the configuration says `insecure`.
"""

from __future__ import annotations

import base64
import binascii
import logging
import queue
import random
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeopt_agent.pulling import MAX_WRONG_CHUNKS, Blobs, check_rate, runs
from edgeopt_agent.transports import MAX_FILE_BYTES, Acknowledged, Identity, Inbox, Message, Online, Wanted
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire import topics
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError, ForgedError, NotOfferedError, RecipeError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import (
    MAX_META_PAGE_BYTES,
    Ack,
    EventBatch,
    MetaReply,
    MetaRequest,
    Presence,
    Pull,
    PullRefused,
    Reported,
)

_log = logging.getLogger(__name__)

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python's ssl has no name for."""

KEEPALIVE_S = 30
FIRST_DELAY_S, MAX_DELAY_S = 1.0, 60.0
SETTLED_S = 60.0
"""A session that lasted this long resets the delay."""
REPLY_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 15.0
ANSWERS_LENGTH = 512
FIRST_WINDOW, MAX_WINDOW = 4, 32
CHUNK_TIMEOUT_S = 5.0
"""Silence after which what is missing of the window is asked for again."""
MAX_SILENT_ROUNDS = 6
"""Rounds of silence, each with half the window, before the pull is put off."""


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
        self._answers: queue.Queue[tuple[str, tuple[str, ...], bytes]] = queue.Queue(ANSWERS_LENGTH)
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
        content = bytearray()
        started = time.monotonic()
        while True:
            reply = self._ask_page(name, len(content))
            if not reply.found:
                return None
            try:
                page = base64.b64decode(reply.data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise TransportError(f"the answer for {name} is not base64") from error
            content += page
            if reply.total_bytes > max_bytes or len(content) > reply.total_bytes:
                raise ForgedError(
                    f"{name} is said to have {reply.total_bytes} bytes and goes on; at most {max_bytes} are read"
                )
            if len(content) == reply.total_bytes:
                return bytes(content)
            if not page:
                raise TransportError(
                    f"the answer for {name} stopped at {len(content)} of {reply.total_bytes} bytes"
                )
            check_rate(name, len(content), time.monotonic() - started)

    def pull(self, index: PackageIndex, missing: Sequence[int], keep: Callable[[int, bytes], bool]) -> None:
        """Get chunks from the web server where one is configured, what it does not give from the broker.

        There the window of what is asked for grows while chunks come and is halved by silence.
        """
        waiting = list(missing)
        if self._blobs is not None:
            waiting = self._blobs.pull(index, waiting, keep)
        self._require_online()
        asked: set[int] = set()
        window, silent, wrong, kept = FIRST_WINDOW, 0, 0, 0
        started = time.monotonic()
        self._drain()
        while waiting or asked:
            while waiting and len(asked) < window:
                fresh = waiting[: window - len(asked)]
                del waiting[: len(fresh)]
                asked.update(fresh)
                self._request(index, fresh)
            check_rate(f"the package {index.sha256[:12]}", kept, time.monotonic() - started)
            number, chunk = self._next_chunk(index)
            if number is None:
                silent += 1
                if silent > MAX_SILENT_ROUNDS or not self._online.is_set():
                    raise TransportError(
                        f"the package stopped arriving, {len(waiting) + len(asked)} chunks are missing"
                    )
                window = max(1, window // 2)
                waiting = sorted({*asked, *waiting})
                asked.clear()
            elif number in asked:
                silent = 0
                asked.discard(number)
                if keep(number, chunk):
                    kept += len(chunk)
                    window = min(MAX_WINDOW, window + 1)
                else:
                    _log.warning(
                        "chunk %d of %s is not what was signed; asked for again", number, index.sha256[:12]
                    )
                    wrong += 1
                    waiting.append(number)
                    if wrong > MAX_WRONG_CHUNKS:
                        raise TransportError(
                            f"{wrong} chunks of {index.sha256[:12]} came wrong, the last is {number}; later again"
                        )

    def report(self, reported: Reported) -> None:
        """Publish the state, retained; the newest is published again after every reconnect."""
        self._last_report = to_bytes(reported)
        self._publish("reported", self._last_report, retain=True)

    def send(self, batch: EventBatch) -> bool:
        """Publish a batch; too large a one for this broker is not handed over."""
        payload = to_bytes(batch)
        if self._max_packet and len(payload) + 256 > self._max_packet:
            _log.error(
                "a batch of %d bytes does not fit the broker's limit of %d", len(payload), self._max_packet
            )
            return False
        return self._publish("event", payload)

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

    def _ask_page(self, name: str, offset: int) -> MetaReply:
        self._require_online()
        request = MetaRequest(uuid.uuid4().hex, name, offset)
        self._drain()
        if not self._publish("meta", to_bytes(request)):
            raise TransportError("the broker is away")
        deadline = time.monotonic() + REPLY_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                what, _, payload = self._answers.get(timeout=min(left, 1.0))
            except queue.Empty:
                if not self._online.is_set():
                    break
                continue
            if what != "meta-reply" or len(payload) > 2 * MAX_META_PAGE_BYTES:
                continue
            try:
                reply = from_bytes(MetaReply, payload)
            except DocumentError as error:
                raise TransportError(f"the answer for {name} is none: {error}") from error
            if reply.id == request.id:
                return reply
        raise TransportError(f"no answer for {name} within {REPLY_TIMEOUT_S:.0f} s")

    def _request(self, index: PackageIndex, numbers: Sequence[int]) -> None:
        if not self._publish("pull", to_bytes(Pull(index.sha256, runs(numbers)))):
            raise TransportError("the broker is away")

    def _next_chunk(self, index: PackageIndex) -> tuple[int | None, bytes]:
        deadline = time.monotonic() + CHUNK_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0 and self._online.is_set():
            try:
                what, rest, payload = self._answers.get(timeout=min(left, 0.5))
            except queue.Empty:
                continue
            if what == "refused":
                reason = _refusal(payload, index)
                if reason:
                    raise NotOfferedError(f"the package is refused: {reason}")
            elif what == "chunk" and len(rest) == 2 and rest[0] == index.sha256[:16] and rest[1].isdigit():
                return int(rest[1]), payload
        return None, b""

    def _drain(self) -> None:
        while not self._answers.empty():
            self._answers.get_nowait()

    def _require_online(self) -> None:
        if not self._online.wait(REPLY_TIMEOUT_S):
            raise TransportError(f"the broker {self._options.host}:{self._options.port} is away")

    def _publish(self, what: str, payload: bytes, *, retain: bool = False) -> bool:
        if not self._online.is_set():
            return False
        return bool(self._client.publish(self._topic(what), payload, qos=1, retain=retain).rc == 0)

    def _topic(self, what: str) -> str:
        return topics.topic(self._identity.tenant, self._identity.device, what)

    def _presence(self, *, online: bool) -> bytes:
        who = self._identity
        return to_bytes(Presence(who.device, online, who.session, who.agent_version))


def _refusal(payload: bytes, index: PackageIndex) -> str:
    """Why this package is refused; empty if it is not, or if what came cannot be read."""
    try:
        refused = from_bytes(PullRefused, payload)
    except DocumentError as error:
        _log.warning("a refusal is ignored: %s", error)
        return ""
    return (refused.reason or "no reason given") if refused.sha256 == index.sha256 else ""


def _no_delay(_client: Any, _user: Any, sock: Any) -> None:
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
