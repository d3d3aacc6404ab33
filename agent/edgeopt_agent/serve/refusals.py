# SPDX-License-Identifier: Apache-2.0
"""Why a request is not answered, and what the protocol says then: one class a status code.

An error of the caller is 4xx, of this device 5xx. `UnsupportedError` (something is not installed here) is 501,
`RuntimeFailure` and everything else of ours 500.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeopt_wire.errors import EdgeoptError, RecipeError, UnsupportedError


class Refused(RecipeError):
    """A request that is refused; `status` is what HTTP calls it, `headers` go with the answer."""

    status = 400
    must_close = False
    is_silent = False

    def __init__(self, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.headers = dict(headers or {})


class NotFound(Refused):
    """No such path, model, version or region."""

    status = 404


class NotReady(Refused):
    """Some model does not serve that should. The protocol wants no words; `repository/index` has them."""

    is_silent = True


class NotServing(NotFound):
    """The model or version that was asked after does not serve. No words either."""

    is_silent = True


class NotAllowed(Refused):
    """The path is there, for another method."""

    status = 405


class Forbidden(Refused):
    """This caller may not do that here."""

    status = 403


class TooLarge(Refused):
    """The body is longer than what is read."""

    status = 413


class BadRequest(Refused):
    """The bytes are no HTTP that we read; what follows them on the connection cannot be trusted either."""

    must_close = True


class HeadTooLarge(BadRequest):
    """The request line and headers are longer than what is read."""

    status = 431


class NotImplementedHere(BadRequest):
    """A method or coding that HTTP knows and this server does not."""

    status = 501


class TooSlow(BadRequest):
    """The request did not arrive in time."""

    status = 408


class Busy(Refused):
    """No room: the queue, the connections or the memory are full. `Retry-After` says when to come again."""

    status = 503

    def __init__(self, text: str, retry_after_s: int = 1) -> None:
        super().__init__(text, {"Retry-After": str(retry_after_s)})


class Expired(Refused):
    """The request's own deadline passed while it waited."""

    status = 504


def status_of(error: EdgeoptError) -> int:
    """The HTTP status that says `error`."""
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, RecipeError):
        return 400
    return 501 if isinstance(error, UnsupportedError) else 500
