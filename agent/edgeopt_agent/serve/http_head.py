# SPDX-License-Identifier: Apache-2.0
"""The head of an HTTP/1.1 request: bytes to a value, and the head of an answer: values to bytes. Pure.

Rule: the two ways in which a body's length can lie are refused: both Content-Length and Transfer-Encoding, or two
lengths.

Source: RFC 9112 sections 3, 5 and 6.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import responses

from edgeopt_agent.serve.refusals import BadRequest, NotImplementedHere

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT")


@dataclass(frozen=True)
class Head:
    """A request's line and headers (names in lower case)."""

    method: str
    path: str
    headers: Mapping[str, str]
    length: int
    """Of the body; -1 where it is chunked."""
    is_kept: bool

    @property
    def expects(self) -> bool:
        """Whether the sender waits for "100 Continue"."""
        return self.headers.get("expect", "").lower() == "100-continue"


def parse_head(raw: bytes) -> Head:
    """Read a request's head, without the empty line that ends it.

    Raises:
        BadRequest: It is none of HTTP/1.x, or its length lies.
    """
    lines = raw.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise BadRequest(f"expected a request line of HTTP/1.1, found {lines[0][:80]!r}")
    if words[0] not in _METHODS:
        raise NotImplementedHere(f"unknown method {words[0][:20]!r}")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        key = name.lower()
        if not colon or not name or name != name.strip():
            raise BadRequest(f"{line[:80]!r} is no header")
        if key in headers and key in ("content-length", "transfer-encoding", "host"):
            raise BadRequest(f"the header {name} stands twice")
        headers[key] = value.strip()
    connection = headers.get("connection", "").lower()
    is_kept = connection == "keep-alive" if words[2] == "HTTP/1.0" else connection != "close"
    return Head(words[0], words[1], headers, _length(headers), is_kept)


def answer_head(status: int, length: int, headers: Mapping[str, str], *, is_kept: bool) -> bytes:
    """The bytes before an answer's body."""
    return _answer_head(status, length, tuple(headers.items()), is_kept)


@functools.lru_cache(maxsize=64)
def _answer_head(status: int, length: int, headers: tuple[tuple[str, str], ...], is_kept: bool) -> bytes:
    lines = [f"HTTP/1.1 {status} {responses.get(status, 'Error')}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if not is_kept:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _length(headers: Mapping[str, str]) -> int:
    coding = headers.get("transfer-encoding")
    text = headers.get("content-length")
    if coding is not None:
        if text is not None:
            raise BadRequest("a body has a Content-Length or is chunked, not both")
        if coding.lower() != "chunked":
            raise NotImplementedHere(f"Transfer-Encoding {coding[:40]!r}; only chunked is read")
        return -1
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BadRequest(f"Content-Length is a number, found {text[:40]!r}")
    return int(text)
