# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy between a device and its broker that can be cut, silenced, and can drop, repeat or reorder MQTT packets.

proxy = TcpProxy(broker_port)     # devices connect to proxy.port
proxy.cut()                       # every connection ends with RST; new ones are taken
proxy.refuse() / proxy.accept()   # the link is down: nobody gets through / again
proxy.silence() / proxy.speak()   # half-open: connections stay, new ones too, no byte moves / moves again
proxy.filter = Shuffle(random)    # what becomes of each MQTT packet, see `Filter`
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

UP, DOWN = "up", "down"
"""From the device to the broker, and back."""

PUBLISH, PUBACK = 3, 4
OWN_IDS = 60_000
"""Packet identifiers from here on are the proxy's own, for messages that it repeats."""
Filter = Callable[[str, bytes], list[bytes]]
"""Gets the direction and one whole MQTT packet; returns the packets that go on in its place."""


class TcpProxy:
    """Forwards connections of loopback to `target_port`; counts bytes and connections."""

    def __init__(self, target_port: int, port: int = 0) -> None:
        self.target_port = target_port
        self.filter: Filter | None = None
        self.bytes: dict[str, int] = {UP: 0, DOWN: 0}
        self.connects: list[float] = []
        """When a connection came, monotonic seconds."""
        self._open = threading.Event()
        self._open.set()
        self._moving = threading.Event()
        self._moving.set()
        self._guard = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._take, daemon=True).start()

    def cut(self) -> None:
        """End every connection at once, with RST to both ends."""
        with self._guard:
            sockets, self._sockets = self._sockets, set()
        for end in sockets:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RD)  # wakes whoever reads it, and sends no FIN
            end.close()

    def refuse(self) -> None:
        """Cut, and end new connections as soon as they come."""
        self._open.clear()
        self.cut()

    def accept(self) -> None:
        """Let connections through again."""
        self._open.set()

    def silence(self) -> None:
        """Stop moving bytes, both ways; no end hears of it."""
        self._moving.clear()

    def speak(self) -> None:
        """Move bytes again, those that waited first."""
        self._moving.set()

    def close(self) -> None:
        """Stop listening and cut."""
        self._closed = True
        self._listener.close()
        self._moving.set()
        self.cut()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connects.append(time.monotonic())
            if not self._open.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target_port), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._guard:
                self._sockets |= {near, far}
            threading.Thread(target=self._pump, args=(near, far, UP), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, DOWN), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        rest = b""
        try:
            while content := source.recv(65536):
                self._moving.wait()
                if self.filter is not None or rest:
                    packets, rest = split(rest + content)
                    kept = [k for p in packets for k in (self.filter(direction, p) if self.filter else [p])]
                    content = b"".join(kept)
                self.bytes[direction] += len(content)
                sink.sendall(content)
        except OSError:
            pass
        finally:
            with self._guard:
                ended = {source, sink} & self._sockets  # none of them if they were cut
                self._sockets -= ended
            for end in ended:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def split(stream: bytes) -> tuple[list[bytes], bytes]:
    """Whole MQTT packets at the start of a stream, and what is left (MQTT 5, 2.1.4: length in groups of 7 bits)."""
    packets = []
    while (size := _size(stream)) and len(stream) >= size:
        packets.append(stream[:size])
        stream = stream[size:]
    return packets, stream


def kind_of(packet: bytes) -> int:
    """The type of a packet: 1 CONNECT, 3 PUBLISH, 4 PUBACK, 12 PINGREQ (MQTT 5, 2.1.2)."""
    return packet[0] >> 4


def topic_of(packet: bytes) -> str:
    """The topic of a PUBLISH packet."""
    at = 2
    while packet[at - 1] & 0x80:
        at += 1
    (length,) = struct.unpack_from(">H", packet, at)
    return packet[at + 2 : at + 2 + length].decode()


def _size(stream: bytes) -> int:
    """How long the first packet is; 0 while that cannot be told."""
    length, shift = 0, 0
    for at in range(1, min(len(stream), 5)):
        length |= (stream[at] & 0x7F) << shift
        shift += 7
        if not stream[at] & 0x80:
            return at + 1 + length
    return 0


class Shuffle:
    """A filter that loses, repeats and swaps PUBLISH packets by chance, as a broker may; acknowledgements stay in order.

    A repeated message has an identifier of its own, whose PUBACK stops here: a real broker ends a connection on which
    it is acknowledged what it did not send. Two messages that change places keep the order of their identifiers.
    """

    def __init__(
        self, chance: random.Random, *, lose: float = 0.0, repeat: float = 0.0, swap: float = 0.0
    ) -> None:
        self._chance = chance
        self._lose, self._repeat, self._swap = lose, repeat, swap
        self._waiting: dict[tuple[str, int], bytes] = {}
        self._repeated = 0
        self.done = {"lost": 0, "repeated": 0, "swapped": 0}

    def __call__(self, direction: str, packet: bytes) -> list[bytes]:
        if kind_of(packet) == PUBACK and struct.unpack_from(">H", packet, 2)[0] >= OWN_IDS:
            return []
        if kind_of(packet) != PUBLISH:
            return [packet]
        return list(self._publish(direction, packet))

    def _publish(self, direction: str, packet: bytes) -> Iterator[bytes]:
        earlier = self._waiting.pop((direction, qos_of(packet)), None)
        if earlier is not None:
            self.done["swapped"] += 1
            yield with_id(packet, id_of(earlier))
            yield with_id(earlier, id_of(packet))
            return
        dice = self._chance.random()
        if dice < self._lose:
            self.done["lost"] += 1
        elif dice < self._lose + self._swap:
            self._waiting[direction, qos_of(packet)] = packet
        else:
            yield packet
            if dice > 1 - self._repeat:
                self.done["repeated"] += 1
                self._repeated += 1
                yield with_id(packet, OWN_IDS + self._repeated % 5000)


def qos_of(packet: bytes) -> int:
    """The quality of service of a PUBLISH packet."""
    return packet[0] >> 1 & 3


def id_of(packet: bytes) -> int:
    """The identifier of a PUBLISH packet; 0 at QoS 0, which has none."""
    return int(struct.unpack_from(">H", packet, _id_at(packet))[0]) if qos_of(packet) else 0


def with_id(packet: bytes, number: int) -> bytes:
    """A PUBLISH packet with another identifier."""
    if not qos_of(packet):
        return packet
    at = _id_at(packet)
    return packet[:at] + struct.pack(">H", number) + packet[at + 2 :]


def _id_at(packet: bytes) -> int:
    at = 2
    while packet[at - 1] & 0x80:
        at += 1
    return at + 2 + int(struct.unpack_from(">H", packet, at)[0])
