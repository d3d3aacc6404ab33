# SPDX-License-Identifier: Apache-2.0
"""`edgeopt fleet`: run a small fleet on this machine, enrol devices, read the ledger."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from edgeopt.cli._enrolment import add_to, span_s
from edgeopt.cli._output import emit, json_option
from edgeopt.cli._table import table
from edgeopt.cli.keys import ask_passphrase
from edgeopt.fleet.client import call, fleet_option


@click.group("fleet")
def command() -> None:
    """A fleet: embedded broker, control plane, page; devices, packages and what was measured."""


@command.command("up")
@click.option(
    "--dir", "folder", required=True, type=click.Path(path_type=Path, file_okay=False), help="Its database."
)
@click.option(
    "--repository",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Published packages.",
)
@click.option(
    "--keys", required=True, type=click.Path(path_type=Path, file_okay=False), help="Needs director.pem."
)
@click.option("--http-port", default=8765, show_default=True, help="Port of API and page, on loopback.")
@click.option(
    "--mqtt-port", default=0, help="Port of the embedded broker, on loopback.  [default: a free one]"
)
@click.option(
    "--broker", default="", metavar="URL", help="Use this MQTT 5 broker instead: mqtt://host or mqtts://host."
)
@click.option("--ca", default="", help="For mqtts: the authority's certificate.")
@click.option("--certificate", default="", help="For mqtts: our certificate.")
@click.option("--key", default="", help="For mqtts: our private key.")
@click.option("--database", default="", metavar="URL", help="SQLAlchemy URL.  [default: SQLite in --dir]")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    help="A name beside localhost that page and API are reached by; repeatable.",
)
@click.option(
    "--authority",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the fleet's certificate authority: devices enrol with tokens, over HTTPS.",
)
@click.option(
    "--enrol-listen", default="127.0.0.1", show_default=True, help="Address on which devices may enrol."
)
@click.option("--enrol-port", default=8443, show_default=True, help="Port on which devices may enrol.")
@click.option(
    "--enrol-host",
    "enrol_hosts",
    multiple=True,
    default=("localhost", "127.0.0.1"),
    help="A name or address that devices reach it by; the first is told to them.  [default: localhost]",
)
@click.option(
    "--broker-files",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of `edgeopt fleet broker`: its access and revocation lists are kept here.",
)
@click.option(
    "--broker-reload", default="", metavar="COMMAND", help="Makes the broker read them.  [default: SIGHUP]"
)
@click.option(
    "--grace-days",
    default=180,
    show_default=True,
    type=click.IntRange(0, 3650),
    help="For so long an expired certificate can be renewed.",
)
@click.option(
    "--certificate-life", default="90d", show_default=True, help="How long a device's certificate lives."
)
@json_option
def up(as_json: bool, **options: Any) -> None:
    """Run broker, control plane and page until Ctrl-C."""
    from edgeopt.fleet.up import FleetOptions, run_fleet

    def ready(addresses: dict[str, Any]) -> None:
        if as_json:
            click.echo(json.dumps({"schema": "edgeopt.fleet/1", **addresses}))
        else:
            enrolment = f", enrolment {addresses['enrolment']}" if addresses["enrolment"] else ""
            click.echo(
                f"page and API {addresses['http']}, broker {addresses['mqtt']}{enrolment}; Ctrl-C ends it"
            )

    life = span_s(options.pop("certificate_life"), "--certificate-life")
    run_fleet(FleetOptions(**options, certificate_life_s=life), ask=ask_passphrase, on_ready=ready)


@command.command("add-device")
@click.argument("device")
@click.option("--class", "device_class", required=True, help="Its device class, see `edgeopt devices`.")
@click.option(
    "--stand-in", is_flag=True, help="A process of another machine plays this board; every figure says so."
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Its agent.json."
)
@click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Where the agent keeps models.  [default: beside it]"
)
@fleet_option
@json_option
def add_device(device: str, output: Path, url: str, as_json: bool, **named: Any) -> None:
    """Enrol DEVICE and write the configuration of its agent, with the root of trust beside it."""
    from edgeopt_profiles.profile import load_profile
    from edgeopt_wire.errors import StoreError

    device_class, stand_in, state_dir = named["device_class"], named["stand_in"], named["state_dir"]
    load_profile(device_class)
    body = {"id": device, "device_class": device_class, "stand_in": stand_in}
    answer = call(url, "POST", "devices", body)
    folder = output.parent
    config = {
        "schema": "edgeopt.agent/1",
        "tenant": answer["tenant"],
        "device": device,
        "device_class": device_class,
        "state_dir": str((state_dir or folder / "state").absolute()),
        "root": str((folder / "root.json").absolute()),
        "stand_in": stand_in,
        "transport": {"kind": "mqtt", "host": answer["mqtt_host"], "port": answer["mqtt_port"]},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "root.json").write_bytes(base64.b64decode(answer["root"]))
        output.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.chmod(output, 0o600)  # noqa: PTH101 - it may hold the paths of keys
    except OSError as error:
        raise StoreError(f"cannot write {output}: {error.strerror}") from error
    document = {"schema": "edgeopt.add-device/1", "device": device, "config": str(output)}
    text = f"enrolled {device}; start its agent: edgeopt-agent run --config {output}"
    emit(document, as_json, lambda console: console.print(text, soft_wrap=True, highlight=False))


@command.command("devices")
@fleet_option
@json_option
def devices(url: str, as_json: bool) -> None:
    """List enrolled devices and what they run."""
    document = call(url, "GET", "devices")
    rows = [
        [
            device["id"],
            device["device_class"] + (" (stand-in)" if device["stand_in"] else ""),
            "shut out" if device.get("shut_out") else "online" if device["online"] else "offline",
            _until(device.get("certificate")),
            ", ".join(f"{m['name']} {m['version']} [{m['variant']}] {m['phase']}" for m in device["models"]),
        ]
        for device in document["devices"]
    ]
    emit(
        document,
        as_json,
        lambda console: console.print(table(("device", "class", "state", "certificate until", "runs"), rows)),
    )


@command.command("packages")
@fleet_option
@json_option
def packages(url: str, as_json: bool) -> None:
    """List published packages."""
    document = call(url, "GET", "packages")
    rows = [
        [p["name"], p["version"], p["device"], f"{p['size_bytes'] / 1e6:.2f}"] for p in document["packages"]
    ]
    emit(document, as_json, lambda console: console.print(table(("model", "version", "for", "MB"), rows)))


@command.command("measurements")
@click.option("--device", default="", help="Only this device's.")
@click.option("--model", default="", help="Only this model's.")
@click.option(
    "--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="At most this many rows."
)
@fleet_option
@json_option
def measurements(device: str, model: str, limit: int, url: str, as_json: bool) -> None:
    """Show the ledger: what devices measured, the newest first."""
    query = urlencode({"device": device, "model": model, "limit": limit})
    document = call(url, "GET", f"measurements?{query}")
    rows = []
    for row in document["measurements"]:
        found = row["measurement"]
        timing = found["timing"] or {}
        rows.append(
            [
                found["device_id"],
                found["conditions"]["stand_in_for"] or "-",
                f"{found['model']} {found['version']}",
                found["variant"],
                *(
                    f"{timing[name] / 1e6:.2f}" if timing.get(name) else "-"
                    for name in ("p50_ns", "p90_ns", "p99_ns")
                ),
                "ok" if found["golden_ok"] else "-",
                found["error"],
            ]
        )
    heads = ("device", "stands in for", "model", "variant", "p50 ms", "p90 ms", "p99 ms", "golden", "note")
    emit(document, as_json, lambda console: console.print(table(heads, rows)))


def _until(certificate: dict[str, Any] | None) -> str:
    return "-" if certificate is None else certificate["expires_at"][:10]


add_to(command)
