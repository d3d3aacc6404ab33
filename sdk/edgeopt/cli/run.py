# SPDX-License-Identifier: Apache-2.0
"""`edgeopt run`: one inference with a package on this machine, as a device would do it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeopt.cli._output import emit, json_option

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from edgeopt_wire.manifest import Manifest

VALUES_SHOWN = 16


@click.command("run")
@click.argument("package", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("data", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--variant", "chosen", help="Default: the first that runs on this machine's CPU.")
@json_option
def command(package: Path, data: Path, chosen: str | None, as_json: bool) -> None:
    """Run PACKAGE on DATA: an image, a text file, a .npy file with one sample, or an .npz file with the model's inputs."""
    from edgeopt.package import opened
    from edgeopt_agent.inference import read_data
    from edgeopt_agent.model import open_model
    from edgeopt_wire.errors import UnsupportedError

    with opened(package) as (folder, manifest, _):
        on_cpu = [variant.id for variant in manifest.variants if variant.accelerator == "cpu"]
        if not (chosen or on_cpu):
            raise UnsupportedError(
                f"{manifest.title} has no variant for a CPU; name one with --variant on its device"
            )
        inputs = read_data(data, manifest, folder)
        with open_model(folder, manifest, chosen or on_cpu[0]) as model:
            outputs = model.infer(inputs)
            variant = model.variant.id
        labels = (
            (folder / manifest.labels).read_text(encoding="utf-8").splitlines() if manifest.labels else []
        )
    document = _document(manifest, variant, outputs, labels)
    emit(document, as_json, lambda console: _print(console, document))


def _document(
    manifest: Manifest, variant: str, outputs: dict[str, np.ndarray], labels: list[str]
) -> dict[str, Any]:
    from edgeopt_agent.inference import top_answers

    return {
        "schema": "edgeopt.run/1",
        "name": manifest.name,
        "version": manifest.version,
        "variant": variant,
        "outputs": {
            name: {"shape": list(array.shape), "first": array.reshape(-1)[:VALUES_SHOWN].tolist()}
            for name, array in outputs.items()
        },
        "top": top_answers(next(iter(outputs.values())).reshape(-1).tolist(), labels),
    }


def _print(console: Console, document: dict[str, Any]) -> None:
    console.print(f"{document['name']} {document['version']}, {document['variant']}", highlight=False)
    for name, shown in document["outputs"].items():
        values = ", ".join(f"{value:.4g}" for value in shown["first"][:8])
        console.print(f"  {name} {tuple(shown['shape'])}: {values}, ...", highlight=False)
    for entry in document["top"]:
        console.print(f"  {entry['score']:9.4f}  {entry['index']}  {entry.get('label', '')}", highlight=False)
