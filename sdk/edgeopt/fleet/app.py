# SPDX-License-Identifier: Apache-2.0
"""The control plane on HTTP: a REST API below /api/v1 and the page, on loopback.

Rules:
- A request must name a host that is ours: a page of the web that has its own name lead to 127.0.0.1 gets nothing.
- A request that a browser sends for another site's page changes nothing: its Origin must be the host that it names.
"""

# no postponed annotations here: FastAPI reads them when the routes are made

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from edgeopt.fleet.control import Control
from edgeopt.fleet.queries import Queries
from edgeopt_wire import __version__
from edgeopt_wire.errors import EdgeoptError, RecipeError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class NewDevice(BaseModel):
    """What enrols a device."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=64)
    device_class: str = Field(max_length=100)
    stand_in: bool = False


class NewRollout(BaseModel):
    """What starts a rollout."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=100)
    version: str = Field(max_length=100)
    classes: list[str] = []
    devices: list[str] = []
    waves: list[int] = [100]
    deadline_s: int = Field(600, ge=1, le=30 * 24 * 3600)
    max_failures: int = Field(0, ge=0)


def make_app(  # noqa: C901 - one small function a route, all in sight
    control: Control,
    queries: Queries,
    connection: Callable[[], dict[str, Any]],
    hosts: tuple[str, ...] = (),
) -> FastAPI:
    """Make the application.

    `connection` tells how a device reaches the broker and whether the broker is there; `hosts` are names beside
    those of loopback that it is reached by.
    """
    app = FastAPI(title="edgeopt fleet", version=__version__, docs_url=None, redoc_url=None)
    page = resources.files("edgeopt.fleet").joinpath("page.html").read_text(encoding="utf-8")

    @app.exception_handler(RecipeError)
    async def wrong_input(request: Request, error: RecipeError) -> JSONResponse:  # noqa: ARG001
        return JSONResponse({"schema": "edgeopt.error/1", "error": str(error)}, status_code=422)

    @app.exception_handler(EdgeoptError)
    async def failed(request: Request, error: EdgeoptError) -> JSONResponse:  # noqa: ARG001
        return JSONResponse({"schema": "edgeopt.error/1", "error": str(error)}, status_code=500)

    @app.middleware("http")
    async def harden(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        refusal = _refusal(request, (*LOOPBACK, *hosts))
        if refusal:
            return JSONResponse({"schema": "edgeopt.error/1", "error": refusal}, status_code=403)
        response = await call(request)
        response.headers["Content-Security-Policy"] = (
            "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/", response_class=HTMLResponse)
    def show_page() -> str:
        return page

    @app.get("/api/v1/health")
    def health() -> dict[str, Any]:
        return {"schema": "edgeopt.fleet-health/1", "version": __version__, **connection()}

    @app.get("/api/v1/devices")
    def devices() -> dict[str, Any]:
        return queries.devices()

    @app.post("/api/v1/devices", status_code=201)
    def enrol(device: NewDevice) -> dict[str, Any]:
        control.enrol(device.id, device.device_class, stand_in=device.stand_in)
        return {"schema": "edgeopt.enrolled/1", "id": device.id, **connection()}

    @app.get("/api/v1/packages")
    def packages() -> dict[str, Any]:
        return queries.packages()

    @app.get("/api/v1/measurements")
    def measurements(
        device: str = "", model: str = "", limit: Annotated[int, Query(ge=1, le=10_000)] = 500
    ) -> dict[str, Any]:
        return queries.measurements(device=device, model=model, limit=limit)

    @app.get("/api/v1/rollouts")
    def rollouts() -> dict[str, Any]:
        return queries.rollouts()

    @app.post("/api/v1/rollouts", status_code=201)
    def create(rollout: NewRollout) -> dict[str, Any]:
        number = control.create_rollout(**rollout.model_dump())
        return _found(queries.rollout(number), number)

    @app.get("/api/v1/rollouts/{number}")
    def rollout(number: int) -> dict[str, Any]:
        return _found(queries.rollout(number), number)

    @app.post("/api/v1/rollouts/{number}/abort")
    def abort(number: int) -> dict[str, Any]:
        control.abort(number)
        return _found(queries.rollout(number), number)

    return app


def _refusal(request: Request, hosts: tuple[str, ...]) -> str:
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if _name(f"//{host}") not in hosts:
        return f"the request names the host {host!r}, and this fleet is {', '.join(hosts)}; add names with --host"
    is_foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
    if request.method not in ("GET", "HEAD") and is_foreign:
        return f"a page of {origin} may change nothing here"
    return ""


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _found(document: dict[str, Any] | None, number: int) -> dict[str, Any]:
    if document is None:
        raise HTTPException(404, f"there is no rollout {number}")
    return document
