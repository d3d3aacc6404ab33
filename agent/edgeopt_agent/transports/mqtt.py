# SPDX-License-Identifier: Apache-2.0
"""MQTT 5: desired documents come retained, metadata in pages, packages in chunks that the device asks for.

Rules:
- Callbacks only enqueue. Nothing is expected from a broker's session: clean start, everything is asked for again.
- Pages and chunks are asked for by `mqtt_pull`, on the line that this module keeps.
- Reconnecting is ours, at the pace of `reconnecting`. Every reconnect takes a new client: paho would resend its whole
  backlog.
- A broker that owes its word on a message for `ANSWER_S` is gone, whatever TCP believes.
- Plain TCP goes to loopback only, unless the configuration says `insecure`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeopt_agent.allowance import Allowance, read_allowance
from edgeopt_agent.mqtt_chunks import Answers
from edgeopt_agent.mqtt_client import (
    MAX_IN_FLIGHT,
    TAKEN_OVER,
    certificate_problem,
    hang_up,
    is_nobody_there,
    make_client,
    make_tls,
)
from edgeopt_agent.mqtt_pull import CHUNK_TIMEOUT_S, REPLY_TIMEOUT_S, Puller
from edgeopt_agent.pulling import Blobs
from edgeopt_agent.reconnecting import End, Pace, Reconnecting
from edgeopt_agent.transports import (
    MAX_FILE_BYTES,
    Acknowledged,
    Identity,
    Inbox,
    Message,
    Online,
    Trouble,
    Wanted,
)
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

FIRST_DELAY_S, MAX_DELAY_S = 5.0, 300.0
AWAY_DELAY_S = 60.0
SETTLED_S = 60.0
CONNECT_TIMEOUT_S = 15.0
ANSWER_S = 30.0
"""A modem at 4 kB/s takes 16 s for the largest batch."""
WATCH_S = 2.0
DATES_ARE_AHEAD = 9
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID: this machine's clock is behind."""
ANSWERS_LENGTH = 512
MIN_KEEPALIVE_S, MAX_KEEPALIVE_S = 10, 3600


_DISPLACED = (
    "another client connected to the broker as {name}: two devices have one identity, or it was stolen; enrol this "
    "device again or find the other. The next attempt is in {minutes:.0f} minutes"
)


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
    keepalive_s: int = 120
    pull_kib_s: int = 0
    tell_kib_s: int = 0
    budget_mib_day: float = 0.0
    budget_mib_month: float = 0.0
    windows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not MIN_KEEPALIVE_S <= self.keepalive_s <= MAX_KEEPALIVE_S:
            raise RecipeError(
                f"transport: keepalive_s must be {MIN_KEEPALIVE_S} to {MAX_KEEPALIVE_S}, found {self.keepalive_s}"
            )
        for key in ("pull_kib_s", "tell_kib_s"):
            if getattr(self, key) < 0:
                raise RecipeError(
                    f"transport: {key} must be 0 (no limit) or more, found {getattr(self, key)}"
                )
        _ = self.allowance
        if not self.ca and not self.insecure and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise RecipeError(
                f"transport: {self.host} is not this machine and there is no `ca`; MQTT without TLS shows everything to "
                "the network. Give ca, certificate and key, or set insecure to true if you know better"
            )

    @property
    def allowance(self) -> Allowance:
        """Budgets and windows."""
        return read_allowance(self.budget_mib_day, self.budget_mib_month, self.windows)


class MqttTransport:
    """One device on one broker."""

    tells_time = True

    def __init__(
        self, options: MqttOptions, identity: Identity, inbox: Inbox, blobs: Blobs | None = None
    ) -> None:
        self._options = options
        self.allowance = options.allowance
        """Budgets of bytes, and windows for what is bulky."""
        self._blobs = blobs
        self._identity = identity
        self._inbox = inbox
        self._answers: Answers = queue.Queue(ANSWERS_LENGTH)
        self._online = threading.Event()
        self._lost = threading.Event()
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._displaced = False
        self._is_behind = False
        self._in_flight = MAX_IN_FLIGHT
        self._accepted_at: float | None = None
        self._owed: deque[tuple[Any, float]] = deque()
        self._client: Any = None
        self._max_packet = 0
        self._first_subscription = 0
        self._is_telling = False
        self._clock: TrustedClock | None = None
        self._last_report: bytes | None = None
        pace = Pace(FIRST_DELAY_S, MAX_DELAY_S, AWAY_DELAY_S, SETTLED_S)
        self._reconnecting = Reconnecting(pace, time.monotonic)
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
        self.allowance = options.allowance
        self._hurry.set()
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
        puller = Puller(self, self._answers, silence_s=CHUNK_TIMEOUT_S)
        puller.pull(index, waiting, keep, limit_bytes_s=self._options.pull_kib_s * 1024)

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
        self._is_telling = True
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
        self._hurry.set()
        self._lost.set()
        if self._thread.is_alive():
            self._thread.join(5)

    @property
    def is_online(self) -> bool:
        """Whether what is published now is handed over."""
        return self._online.is_set()

    @property
    def tell_bytes_s(self) -> int:
        """At most so many bytes of events a second, urgent ones aside; 0: no limit."""
        return self._options.tell_kib_s * 1024

    @property
    def is_telling(self) -> bool:
        """Whether events were sent and are not acknowledged yet."""
        return self._is_telling

    def listen(self, kib_s: int, sha256: str) -> int:
        """Subscribe to a lane of a blob; its number comes back among the answers, under the word `lane`."""
        filter_ = f"{topics.lane(self._identity.tenant, kib_s, sha256)}/#"
        return (self._client.subscribe(filter_, qos=0)[1] or 0) if self._online.is_set() else 0

    def stop_listening(self, kib_s: int, sha256: str) -> None:
        """End such a subscription."""
        if self._online.is_set():
            self._client.unsubscribe(f"{topics.lane(self._identity.tenant, kib_s, sha256)}/#")

    def require_online(self) -> None:
        """Wait a little for the broker; TransportError if it stays away."""
        if not self._online.wait(REPLY_TIMEOUT_S):
            raise TransportError(f"the broker {self._options.host}:{self._options.port} is away")

    def publish(self, what: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> bool:
        """Hand a message over; False where nobody listens."""
        if not self._online.is_set():
            return False
        info = self._client.publish(self._topic(what), payload, qos=qos, retain=retain)
        if info.rc != 0:
            return False
        if qos:
            self._owed.append((info, time.monotonic()))
        return True

    def _keep_connected(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            end = End.LOST
            self._accepted_at, self._displaced = None, False
            try:
                self._connect_once()
            except (OSError, ValueError) as error:
                end = self._judge(error)
            session_s = time.monotonic() - self._accepted_at if self._accepted_at is not None else 0.0
            pause = self._reconnecting.pause_s(End.DISPLACED if self._displaced else end, began, session_s)
            if self._displaced:
                self._tell(Trouble(_DISPLACED.format(name=self._client_id(), minutes=pause / 60)))
            elif pause > SETTLED_S:
                _log.info("connecting again in %.0f s", pause)
            if self._hurry.wait(pause):
                self._hurry.clear()
                self._reconnecting.soon()

    def _judge(self, error: Exception) -> End:
        _log.warning("cannot reach the broker %s:%d: %s", self._options.host, self._options.port, error)
        verdict = getattr(error, "verify_code", None)
        if (
            verdict is not None
        ):  # this end hung up; the wall clock may be wrong, and as soon as it is right, we are back
            self._is_behind = verdict == DATES_ARE_AHEAD
            return End.AWAY
        return End.AWAY if is_nobody_there(error) else End.LOST

    def _connect_once(self) -> None:
        """Connect and stay until the connection is lost."""
        self._lost.clear()
        if self._stopping.is_set():
            return
        client = self._client = self._make_client()
        client.connect(
            self._options.host, self._options.port, keepalive=self._options.keepalive_s, clean_start=True
        )
        self._owed.clear()
        client.loop_start()
        try:
            if not self._lost.wait(CONNECT_TIMEOUT_S) and not self._online.is_set():
                raise ConnectionAbortedError(
                    f"it took the connection and said nothing for {CONNECT_TIMEOUT_S:.0f} s"
                )
            while not self._lost.wait(WATCH_S):
                if self._owed_for_s() > ANSWER_S:
                    _log.warning("the broker owes an answer for %.0f s; connecting anew", ANSWER_S)
                    return
        finally:
            self._online.clear()
            hang_up(client, time.sleep)

    def _owed_for_s(self) -> float:
        """How long the broker owes its word on the oldest message; 0 if it owes none."""
        while self._owed and self._owed[0][0].is_published():
            self._owed.popleft()
        return time.monotonic() - self._owed[0][1] if self._owed else 0.0

    def _make_client(self) -> Any:
        options = self._options
        tls = make_tls(options.ca, options.certificate, options.key, self._clock, is_behind=self._is_behind)
        will = (self._topic("presence"), self._presence(online=False))
        client = make_client(self._client_id(), will, tls, self._in_flight)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_published
        return client

    def _on_connect(self, client: Any, _user: Any, _flags: Any, reason: Any, properties: Any) -> None:
        from paho.mqtt.subscribeoptions import SubscribeOptions

        if reason.is_failure:
            _log.error("the broker refused this device: %s", reason)
            self._lost.set()
            return
        self._accepted_at = time.monotonic()
        problem = certificate_problem(client, self._clock)
        if problem:
            _log.error("%s", problem)
            self._lost.set()
            return
        self._max_packet = getattr(properties, "MaximumPacketSize", 0) or 0
        if (receives := getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT)) < self._in_flight:
            _log.info("the broker takes %d messages at once; connecting anew with that", receives)
            self._in_flight = receives  # paho lets nobody change it on a connection
            self._hurry.set()
            self._lost.set()
            return
        wanted = [("desired", 1), ("ack", 1), ("refused", 1), ("meta-reply", 1)]
        filters = [(self._topic(what), SubscribeOptions(qos=qos)) for what, qos in wanted]
        filters.append((f"{self._topic('chunk')}/#", SubscribeOptions(qos=0)))
        self._is_telling = False
        self._first_subscription = client.subscribe(filters)[1]

    def _on_subscribe(self, client: Any, _user: Any, mid: Any, reasons: Any, _properties: Any) -> None:
        """Online counts from here: what is asked before could be answered into nothing."""
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if mid != self._first_subscription:
            self._answer("lane", (str(mid),), ", ".join(refused).encode())
            return
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
        self._displaced = self._displaced or getattr(reason, "value", 0) == TAKEN_OVER
        self._online.clear()
        self._lost.set()

    def _on_published(self, _client: Any, _user: Any, _mid: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            _log.error("the broker refused a message of this device: %s", reason)

    def _on_message(self, _client: Any, _user: Any, message: Any) -> None:
        try:
            _, device, what, rest = topics.parse(message.topic)
            if what == topics.BLOB and device == topics.SHARED:
                self._answer(what, rest, bytes(message.payload))
            elif device != self._identity.device:
                return
            elif what == "desired":
                if message.payload:
                    self._tell(Wanted(bytes(message.payload)))
            elif what == "ack":
                self._is_telling = False
                self._tell(Acknowledged(from_bytes(Ack, bytes(message.payload))))
            else:
                self._answer(what, rest, bytes(message.payload))
        except DocumentError as error:
            _log.warning("a message on %s is ignored: %s", message.topic, error)

    def _answer(self, what: str, rest: tuple[str, ...], payload: bytes) -> None:
        try:
            self._answers.put_nowait((what, rest, payload))
        except queue.Full:
            _log.debug("an answer (%s) is dropped; it is asked for again", what)

    def _tell(self, message: Message) -> None:
        try:
            self._inbox.put_nowait(message)
        except queue.Full:
            _log.warning("too many messages wait; one is dropped, it comes again")

    def _client_id(self) -> str:
        return topics.client_id(self._identity.tenant, self._identity.device)

    def _topic(self, what: str) -> str:
        return topics.topic(self._identity.tenant, self._identity.device, what)

    def _presence(self, *, online: bool) -> bytes:
        who = self._identity
        return to_bytes(Presence(who.device, online, who.session, who.agent_version))
