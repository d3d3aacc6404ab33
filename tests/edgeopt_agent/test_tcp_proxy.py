# SPDX-License-Identifier: Apache-2.0
"""The proxy that tests put between a device and its broker does what it says."""

import random
import socket
import threading
from collections.abc import Iterator

import pytest
from tcp_proxy import DOWN, UP, Shuffle, TcpProxy, id_of, kind_of, split, topic_of, with_id

HELLO = b"\x30\x07\x00\x03a/bhi"
PING = b"\xc0\x00"
LONG = b"\x30\xc9\x01\x00\x03a/b" + b"x" * 196


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                end, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(end,), daemon=True).start()

    def answer(end: socket.socket) -> None:
        with end:
            try:
                while content := end.recv(4096):
                    end.sendall(content)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def test_bytes_pass_and_are_counted_until_the_link_is_cut(echo: int) -> None:
    with TcpProxy(echo) as proxy, connect(proxy) as end:
        end.sendall(b"hello")
        assert end.recv(9) == b"hello"
        assert proxy.bytes == {UP: 5, DOWN: 5}
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            end.recv(9)
        with connect(proxy) as again:
            again.sendall(b"x")
            assert again.recv(9) == b"x"


def test_refused_link_lets_nobody_through_until_it_is_up_again(echo: int) -> None:
    with TcpProxy(echo) as proxy:
        proxy.refuse()
        with connect(proxy) as end:
            assert end.recv(9) == b""
        proxy.accept()
        with connect(proxy) as end:
            end.sendall(b"x")
            assert end.recv(9) == b"x"
        assert len(proxy.connects) == 2


def test_silent_link_says_nothing_and_loses_nothing(echo: int) -> None:
    with TcpProxy(echo) as proxy, connect(proxy) as end:
        end.sendall(b"a")
        assert end.recv(9) == b"a"
        proxy.silence()
        end.sendall(b"b")
        end.settimeout(0.2)
        with pytest.raises(TimeoutError):
            end.recv(9)
        proxy.speak()
        end.settimeout(5)
        assert end.recv(9) == b"b"


def test_packets_are_told_apart_however_the_stream_is_cut() -> None:
    assert split(HELLO + PING + LONG + HELLO[:3]) == ([HELLO, PING, LONG], HELLO[:3])
    assert split(LONG[:2]) == ([], LONG[:2])
    assert [kind_of(packet) for packet in (HELLO, PING)] == [3, 12]
    assert [topic_of(packet) for packet in (HELLO, LONG)] == ["a/b", "a/b"]


def test_shuffle_loses_repeats_and_swaps_what_is_published_and_nothing_else() -> None:
    assert Shuffle(random.Random(1), lose=1.0)(UP, HELLO) == []
    assert Shuffle(random.Random(1), repeat=1.0)(UP, HELLO) == [HELLO, HELLO]
    assert Shuffle(random.Random(1), lose=1.0, repeat=1.0)(UP, PING) == [PING]
    swap = Shuffle(random.Random(1), swap=1.0)
    assert swap(UP, HELLO) == []
    assert swap(DOWN, LONG) == []
    assert swap(UP, LONG) == [LONG, HELLO]


def test_shuffle_leaves_the_order_of_acknowledgements_to_the_broker() -> None:
    first, second = (b"\x32\x09\x00\x03a/b\x00" + bytes([number]) + b"hi" for number in (1, 2))
    swap = Shuffle(random.Random(1), swap=1.0)
    assert swap(UP, first + b"") == []
    assert [id_of(packet) for packet in swap(UP, second)] == [1, 2]
    repeat = Shuffle(random.Random(1), repeat=1.0)
    again = repeat(UP, first)[1]
    assert id_of(again) >= 60_000
    assert with_id(again, 1) == first
    assert repeat(DOWN, b"\x40\x02" + id_of(again).to_bytes(2, "big")) == []
    assert repeat(DOWN, b"\x40\x02\x00\x01") != []


def test_filter_sees_whole_packets_of_a_stream_in_pieces(echo: int) -> None:
    with TcpProxy(echo) as proxy, connect(proxy) as end:
        seen: list[tuple[str, bytes]] = []

        def note(direction: str, packet: bytes) -> list[bytes]:
            seen.append((direction, packet))
            return [packet]

        proxy.filter = note
        end.sendall(HELLO[:4])
        end.sendall(HELLO[4:] + PING)
        got = b""
        while len(got) < len(HELLO + PING):
            got += end.recv(99)
        assert seen == [(UP, HELLO), (UP, PING), (DOWN, HELLO), (DOWN, PING)]
