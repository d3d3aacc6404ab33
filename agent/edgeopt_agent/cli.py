# SPDX-License-Identifier: Apache-2.0
"""`edgeopt-agent`: run | serve | status | store | doctor | infer | install | enroll | renew. Exit codes: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from edgeopt_agent.logs import FORMATS, start_logging
from edgeopt_wire import __version__
from edgeopt_wire.errors import EdgeoptError, RecipeError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    level = logging.INFO if options.command in ("run", "serve") else logging.WARNING
    start_logging(options.log_format, logging.DEBUG if options.verbose else level)
    try:
        code = options.act(options)
    except EdgeoptError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, RecipeError) else 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgeopt-agent",
        description="Pulls signed models, verifies, measures and serves them on this device.",
    )
    parser.add_argument("--version", action="version", version=f"edgeopt-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = _command(commands, "run", _run, "run the agent until SIGTERM")
    run.add_argument("--once", action="store_true", help="stop when nothing is left to do")
    _command(commands, "serve", _serve, "serve what is installed until SIGTERM, without any network")
    status = _command(
        commands, "status", _status, "show what this device runs and how far an installation is"
    )
    status.add_argument("--json", action="store_true", help="one JSON object")
    store = _command(
        commands,
        "store",
        _store,
        "show what models take of the disk, what of it may go and why the rest stays",
    )
    store.add_argument("--json", action="store_true", help="one JSON object")
    store.add_argument(
        "--collect", action="store_true", help="remove what nothing needs; only while no agent runs"
    )
    store.add_argument(
        "--dry-run", action="store_true", help="with --collect: say what would go, remove nothing"
    )
    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "check clock, disk, runtimes, broker and certificates, and say what to do",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object")
    infer = _command(commands, "infer", _infer, "run the active model on one input, with no network")
    infer.add_argument("data", type=Path, help="an image, .npy, .npz, or a request as .json")
    infer.add_argument("--model", default="", help="which model, where several are active")
    infer.add_argument("--json", action="store_true", help="one JSON object")
    install = _command(
        commands, "install", _install, "install from a published repository, or one package file"
    )
    install.add_argument("source", type=Path, help="a repository folder (a USB stick), or FILE.edgeopt")
    install.add_argument("--model", default="", help="which model of the repository")
    install.add_argument("--model-version", default="", help="which version of it")
    install.add_argument("--unsigned", action="store_true", help="take a FILE though nothing signs it")
    _add_enrolment(commands)
    return parser


def _add_enrolment(commands: Any) -> None:
    enroll = _command(commands, "enroll", _enroll, "become a device of a fleet, with a one-time token")
    enroll.add_argument("--server", required=True, help="the fleet's enrolment endpoint, https://HOST:PORT")
    enroll.add_argument("--ca", type=Path, help="file with the fleet's authority, to know the server by")
    enroll.add_argument(
        "--fingerprint", default="", help="SHA-256 of the fleet's authority, to know the server by"
    )
    token = enroll.add_mutually_exclusive_group()
    token.add_argument(
        "--token-file", type=Path, help="file with the token; - reads it from the standard input"
    )
    token.add_argument(
        "--token", default="", help="the token itself; every user of this device sees it in ps"
    )
    enroll.add_argument("--device", default="", help="who this is, where the token names nobody")
    enroll.add_argument(
        "--class", dest="device_class", default="", help="what this is; another than the token's is refused"
    )
    enroll.add_argument(
        "--state-dir", type=Path, help="where the agent keeps models [beside the configuration]"
    )
    enroll.add_argument("--dry-run", action="store_true", help="try everything but the token, write nothing")
    enroll.add_argument("--json", action="store_true", help="one JSON object")
    renew = _command(commands, "renew", _renew, "renew this device's certificate now, whenever it ends")
    renew.add_argument("--json", action="store_true", help="one JSON object")


def _command(commands: Any, name: str, act: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--config", type=Path, required=True, help="the agent's agent.json")
    parser.add_argument("--verbose", action="store_true", help="log everything")
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="lines for people, or one JSON object a line"
    )
    parser.set_defaults(act=act)
    return parser


def _run(options: argparse.Namespace) -> int:
    from edgeopt_agent.config import load_config
    from edgeopt_agent.main import run_agent

    run_agent(load_config(options.config), once=options.once, path=options.config)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from edgeopt_agent.config import load_config
    from edgeopt_agent.serve.standalone import serve

    serve(load_config(options.config))
    return 0


def _status(options: argparse.Namespace) -> int:
    from edgeopt_agent.config import load_config
    from edgeopt_agent.status import describe

    document = describe(load_config(options.config))
    if options.json:
        print(json.dumps(document, indent=2))
        return 0
    print(
        f"{document['device']} ({document['device_class']}), agent {'running' if document['running'] else 'not running'}"
    )
    for model in document["models"]:
        print(
            f"  {model['name']} {model['version'] or '-'} [{model['variant'] or '-'}] {model['phase']} {model['error']}"
        )
    if certificate := document["certificate"]:
        renews = f", renews from {certificate['renews_at']}" if certificate["renews_at"] else ""
        print(f"  certificate until {certificate['expires_at']}{renews} {certificate['renewal_error']}")
    if (transfer := document["transfer"]) and transfer["held_because"]:
        print(f"  {transfer['held_because']}")
    print(f"  {document['events_waiting']} events wait, {document['events_dropped']} were dropped")
    return 0


def _store(options: argparse.Namespace) -> int:
    from edgeopt_agent.config import load_config
    from edgeopt_agent.inventory import collect, describe, lines

    if options.dry_run and not options.collect:
        raise RecipeError("--dry-run belongs to --collect; without both nothing is removed anyway")
    config = load_config(options.config)
    document = collect(config, dry_run=options.dry_run) if options.collect else describe(config)
    print(json.dumps(document, indent=2) if options.json else "\n".join(lines(document)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from edgeopt_agent.config import load_config
    from edgeopt_agent.doctor import document, examine

    config = load_config(options.config)
    found = document(config, examine(config))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for row in found["findings"]:
            print(f"{row['verdict']:8} {row['check']:16} {row['said']}")
            if row["advice"]:
                print(f"{'':25} -> {row['advice']}")
    return 0 if found["ok"] else 1


def _enroll(options: argparse.Namespace) -> int:
    from edgeopt_agent.enrol import Wish, check, document, enrol

    wish = Wish(
        options.config,
        options.server,
        options.ca,
        options.fingerprint,
        options.device,
        options.device_class,
        options.state_dir,
    )
    if options.dry_run:
        found = check(wish)
        text = f"{wish.server} is the right one and everything can be written; without --dry-run the token is used"
    else:
        done = enrol(wish, _token(options))
        found = document(wish, done)
        text = (
            f"{done.device} ({done.device_class}) is enrolled, its certificate ends {found['expires_at']} and renews itself\n"
            f"start the agent, or start it again: edgeopt-agent run --config {wish.config}"
        )
    print(json.dumps(found, indent=2) if options.json else text)
    return 0


def _token(options: argparse.Namespace) -> str:
    if options.token_file is None:
        if not options.token:
            raise RecipeError("say with --token-file FILE (or - for the standard input) which token to use")
        return str(options.token)
    try:
        raw = sys.stdin.read() if str(options.token_file) == "-" else options.token_file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the token {options.token_file}: {error}") from error
    return str(raw).strip()


def _renew(options: argparse.Namespace) -> int:
    from edgeopt_agent.config import load_config
    from edgeopt_agent.renewing import renew_now

    found = renew_now(load_config(options.config))
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"renewed, until {found['expires_at']}; a running agent uses it from its next connection on")
    return 0


def _infer(options: argparse.Namespace) -> int:
    from edgeopt_agent.config import load_config
    from edgeopt_agent.inference import infer

    answer = infer(load_config(options.config), options.data, options.model)
    if options.json:
        print(json.dumps(answer))
        return 0
    print(f"{answer['model']} {answer['version']}, {answer['variant']} (by the {answer['via']})")
    for entry in answer["top"]:
        print(f"  {entry['score']:10.4f}  {entry['index']}  {entry.get('label', '')}")
    return 0


def _install(options: argparse.Namespace) -> int:
    from edgeopt_agent.config import load_config
    from edgeopt_agent.install import install

    done = install(
        load_config(options.config),
        options.source,
        model=options.model,
        version=options.model_version,
        unsigned=options.unsigned,
    )
    print(f"{done.model} {done.active.version if done.active else ''}: {done.phase.value}")
    return 0
