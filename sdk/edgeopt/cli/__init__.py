# SPDX-License-Identifier: Apache-2.0
"""The `edgeopt` command. One module of this folder is one command; its file name is the command's name.

Rules:
- This package is the only place that prints: results on stdout, progress and problems on stderr.
- Exit codes: 0 done, 1 failed, 2 usage, 3 budget not met.
- A module offers `command`; heavy imports stand inside its callback, so that `--help` is instant.
"""

from __future__ import annotations

import logging
import sys
import traceback

import click

from edgeopt_wire import __version__, seam
from edgeopt_wire.errors import EdgeoptError, RecipeError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BUDGET = 3


class _Commands(click.Group):
    """Commands that are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(seam.names(__name__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in seam.names(__name__):
            return None
        command: click.Command = seam.load(__name__, cmd_name).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            raise click.UsageError(seam.unknown("command", args[0], self.list_commands(ctx)), ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="edgeopt")
@click.option("-v", "--verbose", count=True, help="Log to stderr; twice for debugging and tracebacks.")
def cli(verbose: int) -> None:
    """From a trained model to a small, signed, measured model on every device of a fleet."""
    level = {0: logging.ERROR, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")


def main() -> None:
    """Run the command line and exit with its code."""
    debug = any(arg == "-vv" for arg in sys.argv[1:]) or sys.argv[1:].count("-v") > 1
    try:
        code = cli.main(prog_name="edgeopt", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted; nothing half-written was left", err=True)
        code = 130
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = EXIT_USAGE if isinstance(error, click.UsageError) else EXIT_FAILED
    except EdgeoptError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        code = EXIT_USAGE if isinstance(error, RecipeError) else EXIT_FAILED
    sys.exit(code or 0)
