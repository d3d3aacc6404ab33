# SPDX-License-Identifier: Apache-2.0
"""The commands of `edgeopt fleet` about who belongs to it: authority, tokens, certificates, revocation, broker files."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from edgeopt.cli._output import emit, json_option
from edgeopt.cli._table import table
from edgeopt.cli.keys import ask_passphrase, new_passphrase, passphrase_option
from edgeopt.fleet.client import call, fleet_option

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
pair_option = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write certificate and key into, readable by its owner alone.",
)
REASONS = ("keyCompromise", "cessationOfOperation", "superseded")


def add_to(group: click.Group) -> None:
    """Add these commands to `edgeopt fleet`."""
    for command in (ca, broker, token, tokens, revoke_token, certificates, revoke):
        group.add_command(command)


@click.group("ca")
def ca() -> None:
    """The fleet's certificate authority: one folder, whose key signs for every device."""


@ca.command("create")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="edgeopt fleet", show_default=True, help="Its common name.")
@passphrase_option
@json_option
def create(folder: Path, name: str, passphrase: bool, as_json: bool) -> None:
    """Make an authority in FOLDER: ca.pem to hand out, ca.key (mode 0600) to keep."""
    from edgeopt.fleet.authority import create_authority

    made = create_authority(folder, name, _now(), new_passphrase(passphrase))
    _show(folder, made.certificate, as_json)


@ca.command("show")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@json_option
def show(folder: Path, as_json: bool) -> None:
    """Show the fingerprint that devices pin, and until when the authority lives."""
    from edgeopt.fleet.authority import read_authority

    _show(folder, read_authority(folder), as_json)


@ca.command("issue-server")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@pair_option
@json_option
def issue_server(folder: Path, names: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Write a server's certificate and key for host NAMEs or addresses, for a broker that is not Mosquitto."""
    from edgeopt.fleet.authority import open_authority

    certificate, key = open_authority(folder, ask_passphrase).issue_server(names, _now())
    _write_pair(output, certificate, key, as_json)


@ca.command("issue-control")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@pair_option
@json_option
def issue_control(folder: Path, output: Path, as_json: bool) -> None:
    """Write the control plane's certificate and key (common name edgeopt-control)."""
    from edgeopt.fleet.authority import open_authority

    certificate, key = open_authority(folder, ask_passphrase).issue_control(_now())
    _write_pair(output, certificate, key, as_json)


@ca.command("crl")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write.",
)
@fleet_option
@json_option
def crl(output: Path, url: str, as_json: bool) -> None:
    """Write the signed revocation list of a running fleet; it ends after 30 days, so fetch it daily."""
    from edgeopt_agent.files import write_durably

    document = call(url, "GET", "crl")
    write_durably(output, document["pem"].encode("ascii"))
    text = f"{output}: {document['revoked']} revoked, signed until {document['next_update']}"
    emit({**document, "file": str(output)}, as_json, _line(text))


@click.command("broker")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--authority", required=True, type=click.Path(path_type=Path, file_okay=False), help="Its folder."
)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    required=True,
    help="A name or address that devices reach the broker by; repeatable.",
)
@click.option(
    "--port",
    default=8883,
    show_default=True,
    type=click.IntRange(1, 65535),
    help="The TLS port it listens on.",
)
@click.option("--tenant", default="default", show_default=True, help="Whose devices it lets in.")
@json_option
def broker(
    folder: Path, *, authority: Path, hosts: tuple[str, ...], port: int, tenant: str, as_json: bool
) -> None:
    """Write a folder for Mosquitto 2: TLS with client certificates, access list, revocation list."""
    from edgeopt.fleet.authority import open_authority
    from edgeopt.fleet.mosquitto import MosquittoFolder

    opened = open_authority(authority, ask_passphrase)
    MosquittoFolder.create(folder, opened, names=hosts, port=port, tenant=tenant, now=_now())
    document = {"schema": "edgeopt.broker-files/1", "folder": str(folder), "hosts": list(hosts), "port": port}
    text = (
        f"run it: mosquitto -c {folder}/mosquitto.conf\nand the fleet: edgeopt fleet up --authority {authority} "
        f"--broker mqtts://{hosts[0]}:{port} --broker-files {folder} ..."
    )
    emit(document, as_json, _line(text))


@click.command("token")
@click.option("--class", "device_class", required=True, help="Its device class, see `edgeopt devices`.")
@click.option("--device", default="", help="Its name.  [default: it names itself, and must be new]")
@click.option("--ttl", default="24h", show_default=True, help="How long the token may be used: 30m, 24h, 7d.")
@click.option("--stand-in", is_flag=True, help="A process of another machine plays this board.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the token here, mode 0600."
)
@fleet_option
@json_option
def token(output: Path | None, url: str, as_json: bool, **named: Any) -> None:
    """Make a token that enrols one device once. It is shown now and never again."""
    from edgeopt_profiles.profile import load_profile

    load_profile(named["device_class"])
    body = {
        "device": named["device"],
        "device_class": named["device_class"],
        "stand_in": named["stand_in"],
        "ttl_s": span_s(named["ttl"], "--ttl"),
    }
    document = call(url, "POST", "tokens", body)
    if output is not None:
        _write_secret(output, document["token"] + "\n")
    name = "" if named["device"] else " --device NAME"
    document["command"] = (
        f"edgeopt-agent enroll --config agent.json --server {document['server']} "
        f"--fingerprint {document['fingerprint']} --token-file {output or 'FILE'}{name}"
    )
    shown = f"written to {output}" if output else document["token"]
    text = f"token {document['id']} until {document['expires_at']}: {shown}\non the device: {document['command']}"
    emit(document, as_json, _line(text))


@click.command("tokens")
@fleet_option
@json_option
def tokens(url: str, as_json: bool) -> None:
    """List enrolment tokens; the tokens themselves are kept by nobody."""
    document = call(url, "GET", "tokens")
    heads = ("id", "device", "class", "state", "until", "used by")
    rows = [
        [
            str(t["id"]),
            t["device"] or "(any new)",
            t["device_class"],
            t["state"],
            t["expires_at"],
            t["used_by"],
        ]
        for t in document["tokens"]
    ]
    emit(document, as_json, lambda console: console.print(table(heads, rows)))


@click.command("revoke-token")
@click.argument("number", type=int)
@fleet_option
@json_option
def revoke_token(number: int, url: str, as_json: bool) -> None:
    """Make a token that was not used worthless."""
    emit(call(url, "POST", f"tokens/{number}/revoke"), as_json, _line(f"token {number} is revoked"))


@click.command("certificates")
@click.option("--device", default="", help="Only this device's.")
@fleet_option
@json_option
def certificates(device: str, url: str, as_json: bool) -> None:
    """List every certificate that was issued, the newest first."""
    document = call(url, "GET", f"certificates?{urlencode({'device': device})}")
    heads = ("device", "serial", "by", "until", "confirmed", "revoked")
    rows = [
        [
            c["device"],
            c["serial"][:16],
            c["by"],
            c["expires_at"],
            c["confirmed_at"] or "-",
            f"{c['revoked_at']} {c['reason']}" if c["revoked_at"] else "-",
        ]
        for c in document["certificates"]
    ]
    emit(document, as_json, lambda console: console.print(table(heads, rows)))


@click.command("revoke")
@click.argument("device")
@click.option(
    "--reason",
    type=click.Choice(REASONS),
    default="cessationOfOperation",
    show_default=True,
    help="For the list.",
)
@fleet_option
@json_option
def revoke(device: str, reason: str, url: str, as_json: bool) -> None:
    """Revoke all certificates of DEVICE: it is thrown out, and stays out until it is enrolled with a new token."""
    document = call(url, "POST", f"devices/{device}/revoke", {"reason": reason})
    emit(
        document,
        as_json,
        _line(f"{device} is shut out; {len(document['serials'])} certificates were revoked"),
    )


def _show(folder: Path, certificate: Any, as_json: bool) -> None:
    from edgeopt.fleet.authority import fingerprint_of

    until = certificate.not_valid_after_utc
    document = {
        "schema": "edgeopt.fleet-authority/1",
        "folder": str(folder),
        "name": certificate.subject.rfc4514_string(),
        "fingerprint": fingerprint_of(certificate),
        "expires_at": until.isoformat(),
    }
    text = f"{document['name']}, until {until:%Y-%m-%d}\nSHA-256 {document['fingerprint']}"
    emit(document, as_json, _line(text))


def _write_pair(output: Path, certificate: str, key: bytes, as_json: bool) -> None:
    _write_secret(output, certificate + key.decode("ascii"))
    document = {"schema": "edgeopt.issued/1", "file": str(output)}
    emit(document, as_json, _line(f"{output}: certificate and key, for 90 days"))


def _write_secret(path: Path, text: str) -> None:
    from edgeopt_agent.files import write_durably

    write_durably(path, text.encode("ascii"))
    os.chmod(path, 0o600)  # noqa: PTH101 - whoever reads it is the device


def _line(text: str) -> Any:
    return lambda console: console.print(text, soft_wrap=True, highlight=False, markup=False)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def span_s(text: str, option: str) -> int:
    """Seconds of a time such as 90s, 30m, 24h or 7d."""
    if text[-1:] in _UNITS and text[:-1].isdigit() and int(text[:-1]) > 0:
        return int(text[:-1]) * _UNITS[text[-1]]
    raise click.BadParameter(f"expected a time such as 30m, 24h or 7d, found {text!r}", param_hint=option)
