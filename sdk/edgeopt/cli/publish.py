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
    "--keys", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of signing keys."
)
@json_option
def command(package: Path, repository: Path, keys: Path, as_json: bool) -> None:
    """Verify PACKAGE and publish it with signed metadata (The Update Framework).

    Publishing the same package again changes nothing; the same version with other bytes is refused.
    """
    from edgeopt.publish import publish

    done = publish(
        package, repository, keys, now=datetime.now(UTC).replace(microsecond=0), ask=ask_passphrase
    )
    document = {
        "schema": "edgeopt.publish/1",
        "target": done.target,
        "sha256": done.index.sha256,
        "size_bytes": done.index.size_bytes,
        "chunks": len(done.index.chunks),
        "is_new": done.is_new,
    }
    word = "published" if done.is_new else "was published before"
    text = f"{word}: {done.target}, {done.index.size_bytes / 1e6:.2f} MB in {len(done.index.chunks)} chunks"
    emit(document, as_json, lambda console: console.print(text, soft_wrap=True, highlight=False))
