# SPDX-License-Identifier: Apache-2.0
"""`edgeopt rollout`: offer a published version to devices, wave by wave, and watch."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from edgeopt.cli._output import emit, json_option
from edgeopt.fleet.client import call, fleet_option

POLL_S = 0.5
ENDED = ("succeeded", "halted", "aborted", "superseded")


@click.group("rollout")
def command() -> None:
    """Rollouts: they widen, halt and end on what devices report."""


@command.command("create")
@click.option("--model", required=True, help="Name of a published model.")
@click.option("--version", required=True, help="Which published version of it.")
@click.option("--class", "classes", multiple=True, help="Only devices of this class; may be repeated.")
@click.option("--device", "devices", multiple=True, help="Only this device; may be repeated.")
@click.option(
    "--waves", default="100", show_default=True, help="Cumulative percents of each class, e.g. 10,50,100."
)
@click.option(
    "--deadline",
    default="10m",
    show_default=True,
    help="A device silent for longer has failed: 90s, 10m, 2h.",
)
@click.option(
    "--max-failures", default=0, show_default=True, help="More failures than this halt the rollout."
)
@fleet_option
@json_option
def create(waves: str, deadline: str, url: str, as_json: bool, **named: Any) -> None:
    """Offer a published version of a model to every device that it fits, or to those named."""
    body = {
        **{key: list(value) if isinstance(value, tuple) else value for key, value in named.items()},
        "waves": _percents(waves),
        "deadline_s": _seconds(deadline),
    }
    document = call(url, "POST", "rollouts", body)
    text = f"rollout {document['id']}: {document['model']} {document['version']} to {len(document['devices'])} devices"
    emit(document, as_json, lambda console: console.print(text, highlight=False))


@command.command("watch")
@click.argument("rollout", type=int)
@fleet_option
@json_option
def watch(rollout: int, url: str, as_json: bool) -> None:
    """Watch ROLLOUT until it ends. Exit code 1 if it was halted, aborted or superseded."""
    from rich.console import Console
    from rich.live import Live

    document = call(url, "GET", f"rollouts/{rollout}")
    with Live(_table(document), console=Console(stderr=as_json), refresh_per_second=4) as live:
        while document["status"] not in ENDED:
            time.sleep(POLL_S)
            document = call(url, "GET", f"rollouts/{rollout}")
            live.update(_table(document))
    if as_json:
        emit(document, as_json, lambda _: None)
    if document["status"] != "succeeded":
        click.echo(f"rollout {rollout} was {document['status']}: {document['reason']}", err=True)
        sys.exit(1)


@command.command("list")
@fleet_option
@json_option
def list_rollouts(url: str, as_json: bool) -> None:
    """List rollouts, the newest first."""
    document = call(url, "GET", "rollouts")
    tables = [_table(row) for row in document["rollouts"]]
    emit(document, as_json, lambda console: console.print(*tables, sep="\n"))


@command.command("show")
@click.argument("rollout", type=int)
@fleet_option
@json_option
def show(rollout: int, url: str, as_json: bool) -> None:
    """Show ROLLOUT, device by device."""
    document = call(url, "GET", f"rollouts/{rollout}")
    emit(document, as_json, lambda console: console.print(_table(document)))


@command.command("abort")
@click.argument("rollout", type=int)
@fleet_option
@json_option
def abort(rollout: int, url: str, as_json: bool) -> None:
    """End ROLLOUT: devices that have not finished keep what they run."""
    document = call(url, "POST", f"rollouts/{rollout}/abort")
    emit(document, as_json, lambda console: console.print(f"rollout {rollout} aborted", highlight=False))


def _table(document: dict[str, Any]) -> Any:
    from rich.table import Table

    title = f"rollout {document['id']}: {document['model']} {document['version']}, {document['status']}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), header_style="underline")
    for heading in ("device", "wave", "status", "note"):
        table.add_column(heading)
    colours = {"succeeded": "green", "failed": "red", "rolled_back": "red", "timed_out": "red"}
    for device in document["devices"]:
        colour = colours.get(device["status"], "cyan")
        table.add_row(
            device["id"], str(device["wave"] + 1), f"[{colour}]{device['status']}[/]", device["error"]
        )
    return table


def _percents(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"expected percents such as 10,50,100, found {text!r}", param_hint="--waves"
        ) from error


def _seconds(text: str) -> int:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if text[:-1].isdigit() and text[-1] in units:
        return int(text[:-1]) * units[text[-1]]
    raise click.BadParameter(
        f"expected a time such as 90s, 10m or 2h, found {text!r}", param_hint="--deadline"
    )
