# SPDX-License-Identifier: Apache-2.0
"""`edgeopt keys`: make the signing keys, replace them, let teams sign their own models."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from edgeopt.cli._output import emit, json_option

passphrase_option = click.option(
    "--passphrase", is_flag=True, help="Ask for a passphrase ($EDGEOPT_KEY_PASSPHRASE answers)."
)
repository_option = click.option(
    "--repository",
    required=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The signed repository.",
)
keys_option = click.option(
    "--keys",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of signing keys; may be repeated, the first that has a key counts.",
)


@click.group("keys")
def command() -> None:
    """Signing keys: one file a role, readable by you alone."""


@command.command("create")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@passphrase_option
@click.option(
    "--root-keys",
    type=click.IntRange(1, 9),
    default=1,
    show_default=True,
    help="How many root keys; more than half of them must sign whatever changes the keys.",
)
@json_option
def create(folder: Path, passphrase: bool, root_keys: int, as_json: bool) -> None:
    """Make root, targets, snapshot, timestamp, director and builder keys in FOLDER."""
    from edgeopt.keys import create_keys

    _emit(folder, dict(create_keys(folder, new_passphrase(passphrase), root_keys=root_keys)), as_json)
    if not as_json:
        several = ", each to another place and person" if root_keys > 1 else ""
        click.echo(
            f"Move the root keys and targets.pem to machines that are not on the network{several}, and keep a copy.",
            err=True,
        )


@command.command("show")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@json_option
def show(folder: Path, as_json: bool) -> None:
    """Show the public ids of the keys in FOLDER."""
    from edgeopt.keys import load_signer

    there = sorted(path.stem for path in folder.glob("*.pem"))
    _emit(
        folder, {role: load_signer(folder, role, ask_passphrase).public_key.keyid for role in there}, as_json
    )


@command.command("rotate")
@click.argument("roles", nargs=-1, metavar="[ROLE]...")
@repository_option
@keys_option
@click.option(
    "--new",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the new keys, made if not there.",
)
@click.option(
    "--root-keys", type=click.IntRange(1, 9), help="With root: how many root keys. [default: as many]"
)
@passphrase_option
@json_option
def rotate(
    roles: tuple[str, ...],
    *,
    repository: Path,
    keys: tuple[Path, ...],
    new: Path | None,
    root_keys: int | None,
    passphrase: bool,
    as_json: bool,
) -> None:
    """Replace the keys of ROLEs (root, targets, snapshot, timestamp, director); devices follow by themselves.

    Without a ROLE the same keys sign the root for another year. A rotation needs more than half of the root keys, of
    which each may lie in another folder: repeat --keys. A rotation of director alone needs no root key.
    """
    from edgeopt.rotate import RotationRequest
    from edgeopt.rotate import rotate as rotated

    request = RotationRequest(repository, keys, new, roles, root_keys or 0, new_passphrase(passphrase))
    done = rotated(request, now=_now(), ask=ask_passphrase)
    document = {
        "schema": "edgeopt.rotation/1",
        "root_version": done.root_version,
        "root_expires": done.root_expires.isoformat(),
        "root_threshold": done.root_threshold,
        "root_keys": list(done.root_keys),
        "replaced": {role: list(ids) for role, ids in done.replaced.items()},
    }
    lines = [f"{role:<10} {keyid}" for role, ids in done.replaced.items() for keyid in ids]
    lines.append(
        f"root {done.root_version}: {done.root_threshold} of {len(done.root_keys)} keys, until {done.root_expires:%Y-%m-%d}"
    )
    emit(document, as_json, lambda console: console.print("\n".join(lines), soft_wrap=True, highlight=False))


@command.command("delegate")
@click.argument("team")
@click.option(
    "--models", multiple=True, metavar="NAME", help="A model's name, or a beginning with *; may be repeated."
)
@repository_option
@keys_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for the team's key."
)
@click.option("--revoke", is_flag=True, help="Take the team's models from it instead.")
@passphrase_option
@json_option
def delegate(
    team: str,
    *,
    models: tuple[str, ...],
    repository: Path,
    keys: tuple[Path, ...],
    output: Path | None,
    revoke: bool,
    passphrase: bool,
    as_json: bool,
) -> None:
    """Let TEAM sign its own models and no others.

    Needs the keys of targets, snapshot and timestamp. Called again for the same team it replaces the team's key and
    models. The team publishes with `edgeopt publish --team TEAM --keys ITS-FOLDER`.
    """
    from edgeopt import teams
    from edgeopt.keys import ensure_key, find_signer
    from edgeopt.repository import Repository

    store = Repository(repository, {}, _now())
    named = store.newest("root").signed.roles
    store.signers = {
        role: find_signer(keys, role, named[role].keyids, ask_passphrase)
        for role in ("targets", "snapshot", "timestamp")
    }
    found = {}
    if revoke:
        teams.revoke(store, team)
    elif output is None:
        raise click.UsageError("say with -o in which folder the team's key is to be made")
    else:
        teams.check(team, models)
        signer = ensure_key(output, team, passphrase=new_passphrase(passphrase))
        teams.delegate(store, team, models, signer)
        found[team] = signer.public_key.keyid
    _emit(output or repository, found, as_json)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def new_passphrase(wanted: bool) -> str:
    """A passphrase for a new key where one is wanted, else nothing."""
    import os

    from edgeopt.keys import PASSPHRASE_VARIABLE

    if not wanted:
        return ""
    return os.environ.get(PASSPHRASE_VARIABLE, "") or click.prompt(
        "passphrase", hide_input=True, confirmation_prompt=True, err=True
    )


def ask_passphrase(path: str) -> str:
    """Ask on the terminal for the passphrase of a key file."""
    return str(click.prompt(f"passphrase of {path}", hide_input=True, err=True))


def _emit(folder: Path, found: dict[str, str], as_json: bool) -> None:
    document = {"schema": "edgeopt.keys/1", "folder": str(folder), "keys": found}
    lines = "\n".join(f"{role:<10} {keyid}" for role, keyid in found.items())
    emit(document, as_json, lambda console: console.print(lines, soft_wrap=True, highlight=False))
