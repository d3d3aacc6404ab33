# SPDX-License-Identifier: Apache-2.0
"""How every command answers: one documented JSON object with `--json`, a table for people without."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Add `--json` as the parameter `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(function)


def emit(document: Mapping[str, Any], as_json: bool, human: Callable[[Console], None]) -> None:
    """Print the result: `document` as JSON, which must have a `schema`, or whatever `human` draws."""
    if as_json:
        click.echo(json.dumps(document, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False))
    else:
        human(Console())


def console_err() -> Console:
    """The console for progress and problems: stderr, so that stdout stays clean for results."""
    return Console(stderr=True)
