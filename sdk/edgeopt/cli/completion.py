# SPDX-License-Identifier: Apache-2.0
"""`edgeopt completion`: the script that makes a shell complete commands, options and device ids."""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of SHELL, e.g. `source <(edgeopt completion bash)`."""
    from click.shell_completion import get_completion_class

    from edgeopt.cli import cli

    completion = get_completion_class(shell)
    assert completion is not None, "the choice above lists what click knows"
    click.echo(completion(cli, {}, "edgeopt", "_EDGEOPT_COMPLETE").source())
