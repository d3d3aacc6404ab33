# SPDX-License-Identifier: Apache-2.0
"""The command line's way to a running fleet: its REST API, with errors that say what to do."""

from __future__ import annotations

from typing import Any

import click

from edgeopt_wire.errors import RecipeError, TransportError, UnsupportedError

DEFAULT_URL = "http://127.0.0.1:8765"
TIMEOUT_S = 15.0

fleet_option = click.option(
    "--fleet",
    "url",
    default=DEFAULT_URL,
    show_default=True,
    envvar="EDGEOPT_FLEET",
    help="Address of the fleet.",
)
"""Which fleet a command talks to."""


def call(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Call the fleet's API and return its document.

    Raises:
        TransportError: Nobody answers at `url`, or something that is no fleet.
        RecipeError: The fleet refused what was asked; its own words.
    """
    try:
        import httpx
    except ImportError as error:
        raise UnsupportedError("this needs the fleet extra: pip install 'edgeopt[fleet]'") from error
    try:
        answer = httpx.request(method, f"{url.rstrip('/')}/api/v1/{path}", json=body, timeout=TIMEOUT_S)
        document = answer.json()
    except httpx.HTTPError as error:
        raise TransportError(
            f"no fleet answers at {url}: start one with `edgeopt fleet up`, or give --fleet"
        ) from error
    except ValueError as error:
        raise TransportError(f"{url} answers something that is no fleet") from error
    if answer.is_success:
        found: dict[str, Any] = document
        return found
    text = document.get("error") or document.get("detail") or answer.text
    if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise TransportError(f"the fleet at {url} failed: {text}")
    raise RecipeError(str(text))
