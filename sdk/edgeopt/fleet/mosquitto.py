# SPDX-License-Identifier: Apache-2.0
"""A folder from which Mosquitto 2 runs with client certificates: configuration, access list, revocation list, keys.

| file | what |
|---|---|
| mosquitto.conf | TLS with a client certificate for everybody, the common name is the user name |
| acl | a device's own topics and no others, one block a device that is admitted |
| crl.pem | the certificates that were revoked |
| server.pem | the broker's certificate, for the names that it is reached by, and its key |
| control.pem | the control plane's certificate and its key |
| ca.pem | the fleet's authority, public |
| mosquitto.pid | written by Mosquitto, so that it can be told to read its files again |

Rules:
- Every file is replaced whole; a certificate and its key share one, so that they always fit. Mosquitto reads access list, revocation list and certificates again at SIGHUP.
- Certificates here are made anew when a third of their life is left; the list is signed anew when half of it is.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import shlex
import signal
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509

from edgeopt.fleet.authority import CONTROL_NAME, CRL_LIFETIME, LIFETIME, Authority, Revoked, common_name
from edgeopt_agent.files import write_durably
from edgeopt_wire import topics
from edgeopt_wire.errors import RecipeError, StoreError

_log = logging.getLogger(__name__)

MAX_PACKET_BYTES = 1024 * 1024
"""Above a page of metadata (88 kB as base64) and a chunk (64 KiB)."""
RELOAD_TIMEOUT_S = 20

_CONFIG = """\
# Made by `edgeopt fleet broker`; run it with: mosquitto -c {folder}/mosquitto.conf
user {user}
pid_file {folder}/mosquitto.pid
listener {port}
cafile {folder}/ca.pem
certfile {folder}/server.pem
keyfile {folder}/server.pem
crlfile {folder}/crl.pem
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {folder}/acl
max_packet_size {max_packet}
max_queued_messages 1000
set_tcp_nodelay true
"""


class MosquittoFolder:
    """The folder of one broker. `reload` is a command that makes it read its files again (empty: SIGHUP by its pid)."""

    def __init__(self, folder: Path, authority: Authority, reload: str = "") -> None:
        self.folder = folder.absolute()
        self._authority = authority
        self._reload = shlex.split(reload)

    @classmethod
    def create(
        cls,
        folder: Path,
        authority: Authority,
        *,
        names: Sequence[str],
        port: int,
        tenant: str,
        now: datetime,
    ) -> MosquittoFolder:
        """Write everything; called again it makes new certificates and keeps nothing.

        Raises:
            RecipeError: A name that cannot be one.
            StoreError: The disk refused.
        """
        made = cls(folder, authority)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        made._write_server(list(names), now)
        made._write_control(now)
        made._write("ca.pem", authority.pem)
        made._write("broker.json", json.dumps({"names": list(names), "tenant": tenant, "port": port}))
        made._write("acl", access_list(tenant, ()))
        made._write("crl.pem", authority.revocation_list((), now))
        made._write(
            "mosquitto.conf",
            _CONFIG.format(
                folder=made.folder, user=getpass.getuser(), port=port, max_packet=MAX_PACKET_BYTES
            ),
        )
        return made

    def refresh(self, admitted: Iterable[str], revoked: Iterable[Revoked], now: datetime) -> bool:
        """Say who may connect; have the broker read it if that changed. Returns whether it did.

        Raises:
            StoreError: The disk refused, or the folder is none of these.
        """
        facts = self._facts()
        changed = self._keep_certificates(facts, now)
        entries = list(revoked)
        if self._needs_list(entries, now):
            self._write("crl.pem", self._authority.revocation_list(entries, now))
            changed = True
        acl = access_list(str(facts["tenant"]), admitted)
        if acl != self._read("acl"):
            self._write("acl", acl)
            changed = True
        if changed:
            self._tell()
        return changed

    def _keep_certificates(self, facts: dict[str, object], now: datetime) -> bool:
        changed = False
        if self._ends_soon("server.pem", now):
            names = facts["names"]
            self._write_server([str(name) for name in names] if isinstance(names, list) else [], now)
            changed = True
        if self._ends_soon("control.pem", now):
            self._write_control(now)
        if self._read("ca.pem") != self._authority.pem:
            self._write("ca.pem", self._authority.pem)
            changed = True
        return changed

    def _write_server(self, names: list[str], now: datetime) -> None:
        certificate, key = self._authority.issue_server(names, now)
        self._write("server.pem", certificate + key.decode("ascii"))

    def _write_control(self, now: datetime) -> None:
        certificate, key = self._authority.issue_control(now)
        self._write("control.pem", certificate + key.decode("ascii"))

    def _ends_soon(self, name: str, now: datetime) -> bool:
        found = x509.load_pem_x509_certificate(self._read(name).encode("ascii"))
        return found.not_valid_after_utc - now < LIFETIME / 3

    def _needs_list(self, entries: list[Revoked], now: datetime) -> bool:
        found = x509.load_pem_x509_crl(self._read("crl.pem").encode("ascii"))
        named = {f"{entry.serial_number:040x}" for entry in found}
        ends = found.next_update_utc
        return named != {entry.serial for entry in entries} or ends is None or ends - now < CRL_LIFETIME / 2

    def _tell(self) -> None:
        """Have the broker read its files; one that does not run reads them when it starts."""
        try:
            if self._reload:
                subprocess.run(self._reload, check=True, capture_output=True, timeout=RELOAD_TIMEOUT_S)
                return
            os.kill(self._pid(), signal.SIGHUP)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            _log.info("no broker runs from %s now; it reads its files when it starts", self.folder)
        except (OSError, subprocess.SubprocessError) as error:
            _log.error(
                "the broker was not told who may connect: %s; send it SIGHUP, and give --broker-reload COMMAND",
                error,
            )

    def _pid(self) -> int:
        number = int((self.folder / "mosquitto.pid").read_text().strip())
        if "mosquitto" not in Path(f"/proc/{number}/comm").read_text():
            raise ProcessLookupError(f"process {number} is another program")
        return number

    def _facts(self) -> dict[str, object]:
        try:
            found: dict[str, object] = json.loads(self._read("broker.json"))
        except (StoreError, ValueError) as error:
            raise StoreError(
                f"{self.folder} was not made by `edgeopt fleet broker`: {error}; make it with that command"
            ) from error
        return found

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot read {self.folder / name}: {error.strerror}") from error

    def _write(self, name: str, text: str) -> None:
        write_durably(self.folder / name, text.encode())


def access_list(tenant: str, devices: Iterable[str]) -> str:
    """Mosquitto's access list: the control plane everything, a device its own topics in its own direction."""
    lines = [f"user {CONTROL_NAME}", f"topic readwrite {topics.PREFIX}/{tenant}/#", ""]
    for device in devices:
        try:
            name = common_name(tenant, device)
        except RecipeError as error:
            _log.warning("no certificate can name %s: %s", device, error)
            continue
        lines.append(f"user {name}")
        lines += [f"topic write {topics.topic(tenant, device, what)}" for what in topics.UP]
        for what in topics.DOWN:
            there = topics.topic(tenant, device, what)
            lines += [f"topic read {there}", f"topic read {there}/#"]
        lines += [f"topic read {topics.PREFIX}/{tenant}/-/#", ""]
    return "\n".join(lines)
