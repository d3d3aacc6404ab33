# SPDX-License-Identifier: Apache-2.0
"""The compressed parts of a delta, written whole and read as streams of bounded memory; see `delta.py`."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from typing import IO

from edgeopt_wire.errors import DocumentError

PIECE_BYTES = 256 * 1024
"""What is held of a part at a time."""

_MEMORY_LIMIT = 64 * 1024 * 1024
XZ, DEFLATE = 0, 1
_CODES = bytes([0, 1, 255, 128])
"""What a code adds; 128 stands for an escape while codes are unpacked."""
_UNPACKED = [bytes(_CODES[byte >> shift & 3] for shift in (0, 2, 4, 6)) for byte in range(256)]
_ESCAPE = 3


def add_bytes(first: bytes, second: bytes) -> bytes:
    """Add byte by byte modulo 256, as one large integer: seven bits add without a carry, the eighth is exclusive or."""
    count = len(first)
    low = int.from_bytes(b"\x7f" * count, "little")
    a, b = int.from_bytes(first, "little"), int.from_bytes(second, "little")
    return (((a & low) + (b & low)) ^ ((a ^ b) & ~low & ((1 << (8 * count)) - 1))).to_bytes(count, "little")


class Differences:
    """The differences, from their codes and escapes."""

    def __init__(self, codes: Part, escapes: Part) -> None:
        self._codes, self._escapes = codes, escapes
        self._left = b""

    def read(self, count: int) -> bytes:
        """Exactly `count` differences."""
        needed = -(-(count - len(self._left)) // 4)
        if needed > 0:
            packed = self._codes.read(needed)
            self._left += self._with_escapes(bytearray(b"".join(map(_UNPACKED.__getitem__, packed))))
        found, self._left = self._left[:count], self._left[count:]
        return found

    def _with_escapes(self, differences: bytearray) -> bytearray:
        count = differences.count(_CODES[_ESCAPE])
        at = -1
        for value in self._escapes.read(count):
            at = differences.index(_CODES[_ESCAPE], at + 1)
            differences[at] = value
        return differences


class Part:
    """One compressed part of a delta, unpacked as it is asked for and never beyond `limit` bytes."""

    def __init__(self, file: IO[bytes], start: int, stored: int, limit: int) -> None:
        self._file, self._at, self._end = file, start, start + stored
        self._left = limit
        self._unpack: Callable[[int], bytes] | None = None

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        found = bytearray()
        while len(found) < count:
            piece = self._more(count - len(found))
            if not piece:
                raise DocumentError("a part of the delta ends too early")
            found += piece
        return bytes(found)

    def read_all(self) -> bytes:
        """What is left."""
        found = bytearray()
        while piece := self._more(PIECE_BYTES):
            found += piece
        return bytes(found)

    def _more(self, count: int) -> bytes:
        if self._unpack is None:
            method = self._stored(1)
            if method not in (bytes([XZ]), bytes([DEFLATE])):
                raise DocumentError("a part of the delta is packed in an unknown way")
            self._unpack = self._xz() if method == bytes([XZ]) else self._deflate()
        try:
            piece = self._unpack(count)
        except (lzma.LZMAError, zlib.error, EOFError) as error:
            raise DocumentError(f"a part of the delta cannot be unpacked: {error}") from error
        self._left -= len(piece)
        if self._left < 0:
            raise DocumentError("a part of the delta is larger than it may be")
        return piece

    def _stored(self, count: int) -> bytes:
        self._file.seek(self._at)
        found = self._file.read(max(0, min(count, self._end - self._at)))
        self._at += len(found)
        return found

    def _xz(self) -> Callable[[int], bytes]:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_LIMIT)

        def unpack(count: int) -> bytes:
            piece = b""
            while not piece and not unpacker.eof:
                packed = self._stored(PIECE_BYTES) if unpacker.needs_input else b""
                if unpacker.needs_input and not packed:
                    raise EOFError("it is cut off")
                piece = unpacker.decompress(packed, max_length=count)
            return piece

        return unpack

    def _deflate(self) -> Callable[[int], bytes]:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)

        def unpack(count: int) -> bytes:
            piece = b""
            while not piece and not unpacker.eof:
                packed = unpacker.unconsumed_tail or self._stored(PIECE_BYTES)
                piece = unpacker.decompress(packed, count)
                if not packed and not piece and not unpacker.eof:
                    raise EOFError("it is cut off")
            return piece

        return unpack


def compressed(raw: bytes) -> bytes:
    """By xz, or by Huffman codes alone where those are shorter."""
    by_xz = bytes([XZ]) + lzma.compress(raw, preset=6)
    maker = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    by_huffman = bytes([DEFLATE]) + maker.compress(raw) + maker.flush()
    return min(by_xz, by_huffman, key=len)


def coded(differences: bytes) -> tuple[bytes, bytes]:
    """Codes, four a byte, and escapes."""
    known = {_CODES[code]: code for code in range(_ESCAPE)}
    table = bytes(known.get(value, _ESCAPE) for value in range(256))
    codes = differences.translate(table)
    codes += bytes(-len(codes) % 4)
    packed = bytes(
        a | b << 2 | c << 4 | d << 6
        for a, b, c, d in zip(codes[::4], codes[1::4], codes[2::4], codes[3::4], strict=True)
    )
    return packed, differences.translate(None, bytes(known))
