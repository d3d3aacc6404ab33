# SPDX-License-Identifier: Apache-2.0
"""`edgeopt demo`: the whole way on this machine; what `make demo` runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path, file_okay=False), default=Path(".demo"), show_default=True,
    help="Folder for packages, keys, repository, logs.",
)  # fmt: skip
@click.option("--http-port", default=8765, show_default=True, help="Port of the page, on loopback.")
@click.option("--keep", is_flag=True, help="Keep the fleet and its agents running until Ctrl-C.")
def command(folder: Path, http_port: int, keep: bool) -> None:
    """Build EfficientNet-Lite0 for four device classes, sign it, roll it out to three stand-ins, and measure.

    Everything happens on this machine: the agents are processes that stand in for boards.
    """
    from rich.console import Console

    from edgeopt.demo.run import Demo

    Demo(folder, Console(), http_port).run(keep=keep)
