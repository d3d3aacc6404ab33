# SPDX-License-Identifier: Apache-2.0
"""`edgeopt-agent enroll`: from a one-time token to a device that may connect, whatever interrupts it.

Order, each step whole on the disk before the next:

    pending.key                      the key; found again after a cut, so that the token is still worth something
    <state>/enrolment/<id>/          identity.pem (key and certificate), ca.pem, root.json
    agent.json                       names that folder: from here on the device is enrolled
    pending.key and older folders    are removed

Rules:
- The configuration is the only pointer: until it is replaced, the device is what it was, with files that nobody touched.
- Keys of the configuration that are not about the connection stay as they are.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeopt_agent import credentials
from edgeopt_agent.config import load_config
from edgeopt_agent.credentials import PAIR_FILE, Pair
from edgeopt_agent.endpoint import Endpoint, fetch_authority
from edgeopt_agent.files import sync_folder, write_durably
from edgeopt_wire import __version__
from edgeopt_wire.document import format_moment, parse_json
from edgeopt_wire.enrolment import ENROL_PATH, Enrolled, EnrolRequest
from edgeopt_wire.errors import DocumentError, RecipeError, StoreError, TrustError

FOLDER = "enrolment"


@dataclass(frozen=True)
class Wish:
    """What the command was told. Of `ca` (a file) and `fingerprint` one is needed to know the server."""

    config: Path
    server: str
    ca: Path | None = None
    fingerprint: str = ""
    device: str = ""
    device_class: str = ""
    state_dir: Path | None = None


@dataclass(frozen=True)
class Enrolment:
    """What came of it."""

    device: str
    device_class: str
    tenant: str
    identity: Path
    pair: Pair


def check(wish: Wish) -> dict[str, Any]:
    """`--dry-run`: everything but the token is tried, and nothing is written.

    Raises:
        RecipeError, TransportError, TrustError, StoreError: As `enrol` would.
    """
    state = _state_dir(wish, _read_config(wish.config))
    Endpoint(wish.server, _authorities(wish)).check()
    for folder in (state, wish.config.parent):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(there, os.W_OK):
            raise StoreError(f"{there} cannot be written by user {os.geteuid()}; run as the agent's user")
    return {
        "schema": "edgeopt.enrol/1",
        "dry_run": True,
        "server": wish.server,
        "config": str(wish.config),
        "state_dir": str(state),
        "replaces": wish.config.exists(),
    }


def enrol(wish: Wish, token: str) -> Enrolment:
    """Spend a token: afterwards the configuration names a device that may connect.

    Called again after any interruption with the same token it goes on where it was.

    Raises:
        RecipeError: The options or the old configuration are wrong.
        TransportError: The endpoint cannot be reached: again later.
        TrustError: The endpoint is another, refuses the token, or gives what is not ours.
        StoreError: The disk refused.
    """
    before = _read_config(wish.config)
    state = _state_dir(wish, before)
    authorities = _authorities(wish)
    endpoint = Endpoint(wish.server, authorities)
    folder = state / FOLDER
    _make_private(folder)
    pending = folder / "pending.key"
    key = credentials.kept_key(pending)
    device = wish.device or str(before.get("device", ""))
    try:
        request = EnrolRequest(
            token=token,
            csr=credentials.make_request(key, device or "device"),
            device=device,
            device_class=wish.device_class or str(before.get("device_class", "")),
            agent_version=__version__,
        )
    except (ValueError, DocumentError) as error:
        raise RecipeError(str(error)) from error
    answer = endpoint.ask(ENROL_PATH, request, Enrolled)
    if device and answer.device != device:
        raise TrustError(f"asked was for {device}, and the answer is for {answer.device}")
    pair = credentials.join(key, answer.certificate, authorities, answer.tenant, answer.device)
    here = folder / hashlib.sha256(pair.certificate_pem.encode()).hexdigest()[:16]
    _make_private(here)
    write_durably(here / PAIR_FILE, pair.pem)
    write_durably(here / "ca.pem", authorities.encode("ascii"))
    write_durably(here / "root.json", _root(answer.root))
    _hand_over(state, here, folder)
    config = _configuration(before, answer, state, here, wish.server)
    write_durably(wish.config, (json.dumps(config, indent=2) + "\n").encode())
    _hand_over(state, wish.config)
    _clean(folder, here)
    return Enrolment(answer.device, answer.device_class, answer.tenant, here / PAIR_FILE, pair)


def document(wish: Wish, done: Enrolment) -> dict[str, Any]:
    """What came of it as one JSON-like document, `edgeopt.enrol/1`."""
    return {
        "schema": "edgeopt.enrol/1",
        "dry_run": False,
        "server": wish.server,
        "config": str(wish.config),
        "tenant": done.tenant,
        "device": done.device,
        "device_class": done.device_class,
        "identity": str(done.identity),
        "serial": done.pair.serial,
        "expires_at": format_moment(done.pair.expires_at),
        "renews_at": format_moment(done.pair.renews_at),
    }


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration that is there, as it is; empty if there is none.

    Raises:
        RecipeError: It is wrong: whoever wrote it must look first.
    """
    if not path.exists():
        return {}
    load_config(path)
    return parse_json(path.read_bytes(), str(path))


def _state_dir(wish: Wish, before: dict[str, Any]) -> Path:
    known = before.get("state_dir")
    if known and wish.state_dir and Path(known).absolute() != wish.state_dir.absolute():
        raise RecipeError(f"{wish.config} says state_dir {known}, and --state-dir another; leave one out")
    return (Path(known) if known else wish.state_dir or wish.config.parent / "state").absolute()


def _authorities(wish: Wish) -> str:
    if wish.ca is None:
        if not wish.fingerprint:
            raise RecipeError("say with --ca FILE or --fingerprint SHA256 how to know the server")
        return fetch_authority(wish.server, wish.fingerprint)
    try:
        pem = wish.ca.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the authority's certificate {wish.ca}: {error}") from error
    return pem


def _root(text: str) -> bytes:
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata

    try:
        raw = base64.b64decode(text, validate=True)
        found: Metadata[Any] = Metadata.from_bytes(raw)
        found.verify_delegate("root", found)
    except (binascii.Error, ValueError, RepositoryError) as error:
        raise TrustError(f"the root of trust that came is none: {error}") from error
    return raw


def _configuration(
    before: dict[str, Any], answer: Enrolled, state: Path, here: Path, server: str
) -> dict[str, Any]:
    old = before.get("transport", {})
    kept = {key: old[key] for key in old if old.get("kind") == "mqtt" and key not in ("key", "insecure")}
    return {
        "schema": "edgeopt.agent/1",
        **before,
        "tenant": answer.tenant,
        "device": answer.device,
        "device_class": answer.device_class,
        "stand_in": answer.stand_in,
        "state_dir": str(state),
        "root": str(here / "root.json"),
        "transport": {
            **kept,
            "kind": "mqtt",
            "host": answer.mqtt_host,
            "port": answer.mqtt_port,
            "ca": str(here / "ca.pem"),
            "certificate": str(here / PAIR_FILE),
        },
        "enrolment": {"server": server, "ca": str(here / "ca.pem")},
    }


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        sync_folder(folder.parent)
        sync_folder(folder.parent.parent)
    except OSError as error:
        raise StoreError(f"cannot use {folder}: {error.strerror}; run as the agent's user") from error


def _hand_over(state: Path, *paths: Path) -> None:
    """What root wrote belongs to whoever the state directory belongs to: the agent runs as that user."""
    if os.geteuid() != 0:
        return
    owner = state.stat()
    for path in paths:
        for entry in (path, *(path.rglob("*") if path.is_dir() else ())):
            os.chown(entry, owner.st_uid, owner.st_gid)


def _clean(folder: Path, here: Path) -> None:
    """Remove what nothing names any more; what is left over does no harm."""
    with contextlib.suppress(OSError):
        (folder / "pending.key").unlink(missing_ok=True)
        for entry in folder.iterdir():
            if entry.is_dir() and entry != here:
                shutil.rmtree(entry, ignore_errors=True)
