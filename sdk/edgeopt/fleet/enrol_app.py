# SPDX-License-Identifier: Apache-2.0
"""The enrolment endpoint: the one part of the control plane that devices reach over the network, HTTPS only.

Rules:
- It has four routes and no other; page and API stay on loopback, in another application on another port.
- A body is cut off at its limit, parsed strictly, and judged by `Enrolment`; a refusal says why and is logged.
"""

# no postponed annotations here: FastAPI reads them when the routes are made

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from edgeopt.fleet.enrolment import Enrolment
from edgeopt_wire.document import canonical_bytes, from_bytes, to_bytes
from edgeopt_wire.enrolment import (
    AUTHORITY_PATH,
    CONFIRM_PATH,
    ENROL_PATH,
    MAX_BODY_BYTES,
    RENEW_PATH,
    Confirm,
    Enrolled,
    EnrolRequest,
    RenewRequest,
)
from edgeopt_wire.errors import DocumentError, EdgeoptError, RecipeError, TrustError

_log = logging.getLogger(__name__)

T = TypeVar("T")

Connection = Callable[[], dict[str, Any]]


def make_enrol_app(enrolment: Enrolment, connection: Connection) -> FastAPI:
    """Make the application. `connection` tells how a device reaches the broker, and the root of trust in base64."""
    app = FastAPI(title="edgeopt enrolment", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(AUTHORITY_PATH)
    def authority() -> Response:
        return Response(enrolment.authority.pem, media_type="application/x-pem-file")

    @app.post(ENROL_PATH)
    async def enrol(request: Request) -> Response:
        return await _answer(request, EnrolRequest, lambda found: _enrol(enrolment, connection, found))

    @app.post(RENEW_PATH)
    async def renew(request: Request) -> Response:
        return await _answer(request, RenewRequest, lambda found: to_bytes(enrolment.renew(found)))

    @app.post(CONFIRM_PATH)
    async def confirm(request: Request) -> Response:
        def note(found: Confirm) -> bytes:
            enrolment.confirm(found)
            return canonical_bytes({"schema": "edgeopt.confirmed/1"})

        return await _answer(request, Confirm, note)

    return app


def _enrol(enrolment: Enrolment, connection: Connection, request: EnrolRequest) -> bytes:
    facts = connection()
    device, certificate = enrolment.enrol(request)
    return to_bytes(
        Enrolled(
            tenant=enrolment.tenant,
            device=device.id,
            device_class=device.device_class,
            stand_in=device.stand_in,
            certificate=certificate,
            ca=enrolment.authority.pem,
            root=facts["root"],
            mqtt_host=facts["mqtt_host"],
            mqtt_port=facts["mqtt_port"],
        )
    )


async def _answer(request: Request, cls: type[T], work: Callable[[T], bytes]) -> Response:
    who = request.client.host if request.client else "?"
    try:
        document = from_bytes(cls, await _body(request))
        return Response(await run_in_threadpool(work, document), media_type="application/json")
    except (DocumentError, RecipeError) as error:
        return _refusal(422, who, error)
    except TrustError as error:
        return _refusal(403, who, error)
    except EdgeoptError as error:
        return _refusal(500, who, error)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise DocumentError(f"a request has at most {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _refusal(status: int, who: str, error: Exception) -> Response:
    _log.warning("%s is refused: %s", who, error)
    body = canonical_bytes({"schema": "edgeopt.error/1", "error": str(error)})
    return Response(body, status_code=status, media_type="application/json")
