# SPDX-License-Identifier: Apache-2.0
"""`edgeopt verify`: is this file a whole package?"""

from __future__ import annotations

from pathlib import Path

import click

from edgeopt.cli._output import emit, json_option
from edgeopt.cli._provenance import describe, say


@click.command("verify")
@click.argument("package", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--builder",
    "builders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A builder's public key (builder.pub, or its folder): one of these must have signed the provenance.",
)
@json_option
def command(package: Path, builders: tuple[Path, ...], as_json: bool) -> None:
    """Check every byte of PACKAGE against its manifest, and how it came to be, offline.

    This finds damage, and with --builder another builder's package. Which packages a device takes is a matter of
    signed metadata: see `edgeopt publish`.
    """
    from edgeopt.provenance import load_builder, read_provenance
    from edgeopt_wire.archive import PackageReader

    with PackageReader(package) as reader:
        digest = reader.verify()
        manifest = reader.manifest
        provenance = read_provenance(reader, [load_builder(path) for path in builders])
    document = {
        "schema": "edgeopt.verify/1",
        "package": str(package),
        "sha256": digest,
        "name": manifest.name,
        "version": manifest.version,
        "device": manifest.device,
        "files": len(manifest.files),
        "provenance": describe(provenance),
    }
    emit(
        document,
        as_json,
        lambda console: console.print(
            f"{manifest.title}: whole, {len(manifest.files)} files, sha256 {digest}\n{say(provenance)}",
            soft_wrap=True,
            highlight=False,
        ),
    )
