# SPDX-License-Identifier: Apache-2.0
"""Packages from a web server by HTTP range requests: a mirror, a CDN, an object store in front of `repository/blobs`.

Rules:
- A server is trusted with nothing: each chunk is checked by its signed digest, as those from a broker are.
- What a server does not give (away, slow, wrong, no such file) comes from the broker; the log says why.
- HTTPS, unless the server is this machine or the configuration says `insecure`. Redirects are followed to HTTPS only.

Source: RFC 9110 section 14 (range requests).
"""

from __future__ import annotations

import http.client
import logging
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urljoin, urlsplit

from edgeopt_agent.pulling import MAX_WRONG_CHUNKS, check_rate, runs
from edgeopt_wire.errors import RecipeError, TransportError
from edgeopt_wire.index import PackageIndex

_log = logging.getLogger(__name__)

TIMEOUT_S = 15.0
MAX_REDIRECTS = 3
CHUNKS_A_REQUEST = 256
"""16 MiB: a request that is cut costs no more than what is on its way."""
_LOCAL = ("127.0.0.1", "::1", "localhost")
_MOVED = (301, 302, 303, 307, 308)


class _Fault(Exception):
    """The server does not give what was asked for."""


class WebBlobs:
    """`<url>/<sha256>` is a package. `ca` signed the server's certificate (empty: the system's authorities).

    Raises:
        RecipeError: The address is none, or not safe.
    """

    def __init__(self, url: str, ca: str = "", *, insecure: bool = False) -> None:
        self._url = url.rstrip("/") + "/"
        self._ca = ca
        self._insecure = insecure
        if not self._is_safe(self._url):
            raise RecipeError(
                f"transport: blobs {url!r} must be https://...; http is for this machine only, or with insecure"
            )

    def pull(
        self, index: PackageIndex, missing: Sequence[int], keep: Callable[[int, bytes], bool]
    ) -> list[int]:
        """Get chunks; returns those that did not come right. What `keep` raises goes through."""
        left = set(missing)
        try:
            self._fill(index, left, keep)
        except (OSError, http.client.HTTPException, ValueError, _Fault) as error:
            _log.warning("%s gives no %s: %s; the broker is asked", self._url, index.sha256[:12], error)
        return sorted(left)

    def _fill(self, index: PackageIndex, left: set[int], keep: Callable[[int, bytes], bool]) -> None:
        """Get what is left, as long as it comes right and fast enough."""
        wrong, kept, started = 0, 0, time.monotonic()
        for first, count in _requests(sorted(left)):
            for number, chunk in self._chunks(index, first, count):
                if number not in left:
                    continue
                if keep(number, chunk):
                    left.discard(number)
                    kept += len(chunk)
                else:
                    wrong += 1
                _check(wrong, kept, time.monotonic() - started)

    def _chunks(self, index: PackageIndex, first: int, count: int) -> Iterator[tuple[int, bytes]]:
        begin = first * index.chunk_bytes
        end = min((first + count) * index.chunk_bytes, index.size_bytes)
        connection, answer = self._ask(urljoin(self._url, index.sha256), f"bytes={begin}-{end - 1}")
        try:
            number = first
            if (
                answer.status == 200
            ):  # it knows no ranges and sends everything: what comes before is passed over
                number = 0
            elif answer.getheader("Content-Range", "").split("/")[0] != f"bytes {begin}-{end - 1}":
                raise _Fault(f"it answered another range: {answer.getheader('Content-Range')!r:.80}")
            while number < first + count:
                chunk = answer.read(index.chunk_length(number))
                if len(chunk) != index.chunk_length(number):
                    raise _Fault(f"it stopped in chunk {number}")
                yield number, chunk
                number += 1
        finally:
            connection.close()

    def _ask(self, url: str, range_: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            connection = self._connect(parts.scheme, parts.hostname or "", parts.port)
            target = f"{parts.path}?{parts.query}" if parts.query else parts.path
            connection.request("GET", target, headers={"Range": range_, "Accept-Encoding": "identity"})
            answer = connection.getresponse()
            if answer.status in (200, 206):
                return connection, answer
            connection.close()
            url = urljoin(url, answer.getheader("Location", ""))
            if answer.status not in _MOVED or not self._is_safe(url):
                raise _Fault(f"it answered {answer.status}")
        raise _Fault(f"more than {MAX_REDIRECTS} redirects")

    def _connect(self, scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
        if scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        context = ssl.create_default_context(cafile=self._ca or None)
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)

    def _is_safe(self, url: str) -> bool:
        parts = urlsplit(url)
        if parts.scheme == "http":
            return self._insecure or parts.hostname in _LOCAL
        return parts.scheme == "https" and bool(parts.hostname)


def _check(wrong: int, kept: int, seconds: float) -> None:
    if wrong > MAX_WRONG_CHUNKS:
        raise _Fault(f"{wrong} chunks are not what was signed")
    try:
        check_rate("the package", kept, seconds)
    except TransportError as error:
        raise _Fault(str(error)) from error


def _requests(missing: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of chunks, none longer than a request may be."""
    for first, count in runs(missing):
        for begin in range(first, first + count, CHUNKS_A_REQUEST):
            yield begin, min(CHUNKS_A_REQUEST, first + count - begin)
