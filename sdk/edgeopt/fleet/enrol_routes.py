# SPDX-License-Identifier: Apache-2.0
"""The operator's side of enrolment in the REST API: tokens, certificates, revocation. Loopback, as all of that API."""

# no postponed annotations here: FastAPI reads them when the routes are made

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from edgeopt.fleet.enrolment import Enrolment
from edgeopt_wire.errors import RecipeError


class NewToken(BaseModel):
    """What a token is for."""

    model_config = ConfigDict(extra="forbid")

    device: str = Field("", max_length=64)
    device_class: str = Field(max_length=100)
    stand_in: bool = False
    ttl_s: int = Field(24 * 3600, ge=1)


class Revocation(BaseModel):
    """Why a device is shut out."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field("cessationOfOperation", max_length=40)


def add_enrolment(app: FastAPI, enrolment: Enrolment | None, endpoint: Callable[[], dict[str, Any]]) -> None:
    """Add the routes. `endpoint` tells where devices enrol; without an authority each answer says what is missing."""

    def open_() -> Enrolment:
        if enrolment is None:
            raise RecipeError(
                "this fleet has no certificate authority: make one with `edgeopt fleet ca create FOLDER` and start the "
                "fleet with `edgeopt fleet up --authority FOLDER`"
            )
        return enrolment

    @app.get("/api/v1/tokens")
    def tokens() -> dict[str, Any]:
        return open_().tokens()

    @app.post("/api/v1/tokens", status_code=201)
    def make_token(token: NewToken) -> dict[str, Any]:
        made = open_().make_token(
            device=token.device,
            device_class=token.device_class,
            stand_in=token.stand_in,
            ttl=timedelta(seconds=token.ttl_s),
        )
        return {"schema": "edgeopt.enrol-token/1", **made, **endpoint()}

    @app.post("/api/v1/tokens/{number}/revoke")
    def revoke_token(number: int) -> dict[str, Any]:
        open_().revoke_token(number)
        return {"schema": "edgeopt.token-revoked/1", "id": number}

    @app.get("/api/v1/certificates")
    def certificates(device: str = "") -> dict[str, Any]:
        return open_().certificates(device)

    @app.get("/api/v1/crl")
    def revocation_list() -> dict[str, Any]:
        return open_().revocation_list()

    @app.post("/api/v1/devices/{device}/revoke")
    def revoke(device: str, revocation: Revocation) -> dict[str, Any]:
        serials = open_().revoke(device, revocation.reason)
        return {"schema": "edgeopt.device-revoked/1", "device": device, "serials": serials}
