# SPDX-License-Identifier: Apache-2.0
"""`edgeopt verify`: is this file a whole package?"""

from __future__ import annotations

from pathlib import Path

import click

from edgeopt.cli._output import emit, json_option


@click.command("verify")
@click.argument("package", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def command(package: Path, as_json: bool) -> None:
    """Check every byte of PACKAGE against its manifest.

    This finds damage. Who made the package is a matter of signed metadata: see `edgeopt publish`.
    """
    from edgeopt_wire.archive import PackageReader

    with PackageReader(package) as reader:
        digest = reader.verify()
        manifest = reader.manifest
    document = {
        "schema": "edgeopt.verify/1",
        "package": str(package),
        "sha256": digest,
        "name": manifest.name,
        "version": manifest.version,
        "device": manifest.device,
        "files": len(manifest.files),
    }
    emit(
        document,
        as_json,
        lambda console: console.print(
            f"{manifest.title}: whole, {len(manifest.files)} files, sha256 {digest}",
            soft_wrap=True,
            highlight=False,
        ),
    )
