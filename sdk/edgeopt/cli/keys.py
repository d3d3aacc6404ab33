# SPDX-License-Identifier: Apache-2.0
"""`edgeopt keys`: make the signing keys, show their public ids."""

from __future__ import annotations

from pathlib import Path

import click

from edgeopt.cli._output import emit, json_option


@click.group("keys")
def command() -> None:
    """Signing keys: one file a role, readable by you alone."""


@command.command("create")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--passphrase", is_flag=True, help="Ask for a passphrase ($EDGEOPT_KEY_PASSPHRASE answers).")
@json_option
def create(folder: Path, passphrase: bool, as_json: bool) -> None:
    """Make root, targets, snapshot, timestamp and director keys in FOLDER."""
    import os

    from edgeopt.keys import PASSPHRASE_VARIABLE, create_keys

    secret = ""
    if passphrase:
        secret = os.environ.get(PASSPHRASE_VARIABLE, "") or click.prompt(
            "passphrase", hide_input=True, confirmation_prompt=True, err=True
        )
    _emit(folder, dict(create_keys(folder, secret)), as_json)
    if not as_json:
        click.echo(
            "Move root.pem and targets.pem to a machine that is not on the network, and keep a copy.",
            err=True,
        )


@command.command("show")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@json_option
def show(folder: Path, as_json: bool) -> None:
    """Show the public ids of the keys in FOLDER."""
    from edgeopt.keys import ROLES, key_path, load_signer

    there = [role for role in ROLES if key_path(folder, role).exists()]
    _emit(
        folder, {role: load_signer(folder, role, ask_passphrase).public_key.keyid for role in there}, as_json
    )


def ask_passphrase(path: str) -> str:
    """Ask on the terminal for the passphrase of a key file."""
    return str(click.prompt(f"passphrase of {path}", hide_input=True, err=True))


def _emit(folder: Path, found: dict[str, str], as_json: bool) -> None:
    document = {"schema": "edgeopt.keys/1", "folder": str(folder), "keys": found}
    lines = "\n".join(f"{role:<10} {keyid}" for role, keyid in found.items())
    emit(document, as_json, lambda console: console.print(lines, soft_wrap=True, highlight=False))
