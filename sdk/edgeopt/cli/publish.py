# SPDX-License-Identifier: Apache-2.0
"""`edgeopt publish`: sign a package into a repository that devices pull from."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from edgeopt.cli._output import emit, json_option
from edgeopt.cli.keys import ask_passphrase


@click.command("publish")
@click.argument("package", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--repository", required=True, type=click.Path(path_type=Path, file_okay=False), help="Made if not there."
)
@click.option(
    "--keys",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of signing keys; may be repeated, the first that has a key counts.",
)
@click.option("--team", default="", help="Sign as this team, see `edgeopt keys delegate`.")
@click.option(
    "--deltas",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="From how many earlier versions devices may come by what differs.",
)
@json_option
def command(
    package: Path, repository: Path, keys: tuple[Path, ...], *, team: str, deltas: int, as_json: bool
) -> None:
    """Verify PACKAGE and publish it with signed metadata (The Update Framework).

    Publishing the same package again changes nothing; the same version with other bytes is refused. Devices that have
    one of the last versions pull what differs; where that is not less than nine tenths of the package, all of it.
    """
    from edgeopt.publish import publish
    from edgeopt_wire.index import deltas_of

    done = publish(
        package,
        repository,
        keys,
        now=datetime.now(UTC).replace(microsecond=0),
        ask=ask_passphrase,
        team=team,
        deltas=deltas,
    )
    smaller = [delta.size_bytes for delta in deltas_of(done.index).values()]
    document = {
        "schema": "edgeopt.publish/1",
        "target": done.target,
        "sha256": done.index.sha256,
        "size_bytes": done.index.size_bytes,
        "chunks": len(done.index.chunks),
        "deltas": [
            {"base": base, "sha256": delta.sha256, "size_bytes": delta.size_bytes}
            for base, delta in deltas_of(done.index).items()
        ],
        "is_new": done.is_new,
        "waits": done.waits,
    }
    word = "published" if done.is_new else "was published before"
    text = f"{word}: {done.target}, {done.index.size_bytes / 1e6:.2f} MB in {len(done.index.chunks)} chunks"
    if smaller:
        text += f"; as a delta {min(smaller) / 1e6:.2f} MB"
    if done.waits:
        text += "; devices see it once the snapshot is signed, which a running `edgeopt fleet up` does in a minute"
    emit(document, as_json, lambda console: console.print(text, soft_wrap=True, highlight=False))
