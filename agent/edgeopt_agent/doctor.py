# SPDX-License-Identifier: Apache-2.0
"""`edgeopt-agent doctor`: look at everything an agent needs, one finding each, and say what to do about what is wrong.

Rules:
- Nothing is changed, and a running agent is not disturbed: its broker session is taken over by nobody.
- Every check ends by itself within seconds, whatever the network does.
- `failed` keeps the device from working or will soon; `warning` makes it worse than it could be.
"""

from __future__ import annotations

import enum
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeopt_agent import runtimes
from edgeopt_agent.certificate_status import certificate_status
from edgeopt_agent.config import AgentConfig
from edgeopt_agent.endpoint import Endpoint
from edgeopt_agent.serve.http import ask
from edgeopt_agent.store import SPARE_BYTES, Store
from edgeopt_agent.trusted_time import BUILT_AT, LIFETIME
from edgeopt_wire.document import parse_moment
from edgeopt_wire.errors import EdgeoptError, TrustError

CONNECT_S = 5.0
ROOM_BYTES = 256 * 1024 * 1024
"""Below this a larger package may not fit; below `SPARE_BYTES` none does."""
SOON_DAYS = 14


class Verdict(enum.Enum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One check. `advice` says what to do; empty where all is well."""

    check: str
    verdict: Verdict
    said: str
    advice: str = ""


def examine(config: AgentConfig, now: Callable[[], datetime] | None = None) -> list[Finding]:
    """Run every check.

    Raises:
        Nothing of its own: a check that breaks is a finding.
    """
    moment = (now or (lambda: datetime.now(timezone.utc)))()
    is_running = _is_running(config)
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("state directory", lambda: _state(config)),
        ("root of trust", lambda: _root(config, moment)),
        ("clock", lambda: _clock(config, moment)),
        ("runtimes", _runtimes),
        ("models", lambda: _models(config)),
        ("broker", lambda: _transport(config, moment, is_running=is_running)),
    ]
    found: list[Finding] = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:  # noqa: BLE001 - a broken check must not hide the others
            found.append(Finding(name, Verdict.FAILED, f"could not be checked: {error}", "see the message"))
    said = "runs" if is_running else "does not run"
    advice = (
        "" if is_running else "start it: systemctl start edgeopt-agent, or edgeopt-agent run --config FILE"
    )
    found.append(Finding("agent", Verdict.OK if is_running else Verdict.WARNING, said, advice))
    return found


def document(config: AgentConfig, found: list[Finding]) -> dict[str, Any]:
    """The findings as one JSON-like document, `edgeopt.doctor/1`."""
    rows = [{"check": f.check, "verdict": f.verdict.value, "said": f.said, "advice": f.advice} for f in found]
    return {
        "schema": "edgeopt.doctor/1",
        "device": config.device,
        "ok": all(f.verdict is not Verdict.FAILED for f in found),
        "findings": rows,
    }


def _is_running(config: AgentConfig) -> bool:
    try:
        ask(config.socket_path, "GET", "/v2/health/live")
    except EdgeoptError:
        return False
    return True


def _state(config: AgentConfig) -> Iterator[Finding]:
    folder, check = config.folder, "state directory"
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        yield Finding(
            check,
            Verdict.FAILED,
            f"{folder} cannot be written by user {os.geteuid()}",
            f"chown it to the agent's user, or mount it writable: chown -R USER {folder}",
        )
        return
    if not folder.exists():
        yield Finding(
            check, Verdict.WARNING, f"{folder} is not there yet", "the agent makes it when it starts"
        )
        return
    free = Store(folder).free_bytes()
    said = f"{folder}, {free / 1e6:.0f} MB free"
    bad = sorted(path.name for path in folder.rglob("*.bad"))
    if free < SPARE_BYTES:
        yield Finding(check, Verdict.FAILED, said, "free some space: nothing can be installed or reported")
    elif free < ROOM_BYTES:
        yield Finding(check, Verdict.WARNING, said, "a package needs twice its size while it is installed")
    else:
        yield Finding(check, Verdict.OK, said)
    if bad:
        yield Finding(
            check,
            Verdict.WARNING,
            f"{len(bad)} records were damaged and set aside, e.g. {bad[0]}",
            "check the disk (dmesg, smartctl); delete the .bad files when you have looked at them",
        )


def _root(config: AgentConfig, moment: datetime) -> Iterator[Finding]:
    from tuf.api.metadata import Metadata

    path = Path(config.root)
    try:
        root = Metadata.from_file(str(path)).signed
    except Exception as error:  # noqa: BLE001 - python-tuf raises many kinds
        yield Finding(
            "root of trust",
            Verdict.FAILED,
            f"{path} cannot be read: {error}",
            "copy the fleet's root.json to it; `edgeopt fleet add-device` writes one",
        )
        return
    yield Finding("root of trust", Verdict.OK, f"{path}, version {root.version}")
    for name in ("timestamp", "snapshot", "targets"):
        cached = config.folder / "metadata" / f"{name}.json"
        if cached.is_file():
            expires = Metadata.from_file(str(cached)).signed.expires
            if expires < moment:
                yield Finding(
                    "root of trust",
                    Verdict.WARNING,
                    f"the {name} metadata here expired at {expires:%Y-%m-%d %H:%M} UTC",
                    "new models wait for fresh metadata: connect, or have the fleet re-sign",
                )


def _clock(config: AgentConfig, moment: datetime) -> Iterator[Finding]:
    seen = Store(config.folder).load_device().newest_moment if config.folder.exists() else ""
    floor = max(BUILT_AT, parse_moment(seen)) if seen else BUILT_AT
    said = f"{moment:%Y-%m-%d %H:%M:%S} UTC"
    if floor <= moment <= BUILT_AT + LIFETIME:
        yield Finding("clock", Verdict.OK, said)
        return
    yield Finding(
        "clock",
        Verdict.WARNING,
        f"{said} cannot be; at least {floor:%Y-%m-%d %H:%M:%S} has been",
        "the agent goes by signed time once it is connected; for the rest: timedatectl set-ntp true, or date -s",
    )


def _runtimes() -> Iterator[Finding]:
    here = []
    for name in runtimes.names():
        if name == "null":
            continue
        try:
            module = runtimes.find(name)
            here.append(f"{name} {module.version()} ({', '.join(module.accelerators())})")
        except EdgeoptError:
            continue
    if here:
        yield Finding("runtimes", Verdict.OK, "; ".join(here))
    else:
        yield Finding(
            "runtimes",
            Verdict.FAILED,
            "no inference runtime is installed",
            "pip install 'edgeopt-agent[onnxruntime]', or the runtime of your board",
        )


def _models(config: AgentConfig) -> Iterator[Finding]:
    if not config.folder.exists():
        return
    store = Store(config.folder)
    for name in store.models():
        state = store.load_state(name)
        active = state.active
        if active is None:
            advice = "see `status`" if state.error else ""
            said = f"{name}: {state.phase.value}{', ' + state.error if state.error else ''}, nothing serves"
            yield Finding("models", Verdict.WARNING, said, advice)
        elif not store.is_whole(name, active.slot, active.package_sha256):
            yield Finding(
                "models",
                Verdict.FAILED,
                f"{name} {active.version}: slot {active.slot} is not whole",
                "the disk lost it: roll the model out again",
            )
        else:
            yield Finding("models", Verdict.OK, f"{name} {active.version} [{active.variant}]")


def _transport(config: AgentConfig, moment: datetime, *, is_running: bool) -> Iterator[Finding]:
    options = config.transport
    if options.get("kind") != "mqtt":
        yield Finding("broker", Verdict.OK, f"transport {options.get('kind')}: no broker")
        return
    yield from _certificate(config, moment)
    host, port = str(options.get("host", "")), int(options.get("port", 8883))
    try:
        with socket.create_connection((host, port), CONNECT_S) as plain:
            said = f"{host}:{port} answers"
            if options.get("ca"):
                said += f", {_shake_hands(plain, options)}"
    except ssl.SSLCertVerificationError as error:
        late = "not yet valid" in error.verify_message or "expired" in error.verify_message
        advice = (
            "check the clock of this device and the date of the broker's certificate"
            if late
            else (
                "the `ca` of the configuration did not sign the broker's certificate, or it is for another name"
            )
        )
        yield Finding("broker", Verdict.FAILED, f"{host}:{port}: {error.verify_message}", advice)
        return
    except (OSError, ValueError) as error:
        advice = "check cable, name, port and firewall: nc -vz HOST PORT; TLS alerts: the client certificate"
        yield Finding("broker", Verdict.FAILED, f"{host}:{port}: {error}", advice)
        return
    note = "; the running agent keeps its session" if is_running else ""
    yield Finding("broker", Verdict.OK, said + note)


def _shake_hands(plain: socket.socket, options: Any) -> str:
    context = ssl.create_default_context(cafile=str(options["ca"]))
    if options.get("certificate"):
        context.load_cert_chain(str(options["certificate"]), str(options.get("key", "")) or None)
    with context.wrap_socket(plain, server_hostname=str(options["host"])) as secure:
        return str(secure.version())


def _certificate(config: AgentConfig, moment: datetime) -> Iterator[Finding]:
    found = certificate_status(config)
    if found is None:
        return
    check, again = "certificate", "enrol this device again: edgeopt-agent enroll with a new token"
    if found.expires_at is None or found.renews_at is None:
        yield Finding(check, Verdict.FAILED, f"{found.path}: {found.error}", again)
        return
    days = (found.expires_at - moment).days
    said = (
        f"{found.path}, {found.name}, valid until {found.expires_at:%Y-%m-%d}, {max(days, 0)} days are left"
    )
    if found.is_renewed:
        said += f", renews from {found.renews_at:%Y-%m-%d}"
    late = moment > found.renews_at + (found.expires_at - found.renews_at) / 4
    renew = "renew it: edgeopt-agent renew" if found.is_renewed else "replace it, then send the agent SIGHUP"
    if found.progress.error:
        said += f"; the last renewal failed: {found.progress.error}"
    if found.expires_at <= moment:
        advice = f"it has expired: {renew}; where that is refused, {again}"
        yield Finding(check, Verdict.FAILED, said, advice if found.is_renewed else f"it has expired: {again}")
    elif late or found.progress.error if found.is_renewed else days < SOON_DAYS:
        yield Finding(check, Verdict.WARNING, said, f"{days} days are left: {renew}")
    else:
        yield Finding(check, Verdict.OK, said)
    if found.is_renewed:
        yield _endpoint(config)


def _endpoint(config: AgentConfig) -> Finding:
    """Whether the place where the certificate is renewed can be reached; nothing is asked there."""
    check, server = "enrolment", config.enrolment.server
    try:
        authorities = Path(config.enrolment.ca or str(config.transport.get("ca", ""))).read_text("ascii")
        Endpoint(server, authorities).check()
    except (OSError, UnicodeDecodeError) as error:
        return Finding(
            check, Verdict.WARNING, f"the authority cannot be read: {error}", "enrol this device again"
        )
    except TrustError as error:
        return Finding(check, Verdict.FAILED, str(error), "renewal does not work until this is right")
    except EdgeoptError as error:
        return Finding(check, Verdict.WARNING, str(error), "renewal waits until it can be reached")
    return Finding(check, Verdict.OK, f"{server} answers and is the right one")
