# SPDX-License-Identifier: Apache-2.0
"""The demo's story, told with the commands that a user would type; each is shown before it runs.

Rules:
- Nothing here knows a shortcut: every step is a public command in a process of its own.
- What stands in for a board is called a stand-in, in the table too.
- It ends what it started, unless asked to keep the fleet running.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edgeopt.demo.photos import Photos, prepare
from edgeopt_wire.errors import EdgeoptError

MODEL = "edgeopt.demo.model:efficientnet_lite0"
NAME, VERSION = "efficientnet-lite0", "1"
DEVICES = ("host", "raspberry-pi-5", "jetson-orin", "coral-usb")
BOARDS = {"kitchen-pi": "raspberry-pi-5", "gate-jetson": "jetson-orin", "door-coral": "coral-usb"}
"""Three agents of this machine, and the device class that each stands in for."""

GAIN_FIGURES = ("MB", "top-1", "agree", "SQNR", "p50 ms", "x float")
LEDGER_FIGURES = ("p50 ms", "p90 ms", "golden")

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
ROLLOUT_DEADLINE = "5m"


@dataclass
class Demo:
    """One run of the demo in `folder`."""

    folder: Path
    console: Console
    http_port: int = 8765
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Address of the fleet's page."""
        return f"http://127.0.0.1:{self.http_port}"

    def run(self, *, keep: bool) -> None:
        """Tell the whole story; with `keep` the fleet stays up until Ctrl-C.

        Raises:
            EdgeoptError: A step failed; its own message stands above.
        """
        start = time.monotonic()
        try:
            photos = prepare(self.folder / "photos")
            packages = self._build(photos)
            self._publish(packages)
            fleet = self._start_fleet()
            for name, device_class in BOARDS.items():
                self._start_agent(name, device_class)
            self._roll_out()
            rows = self._json("fleet", "measurements", "--fleet", self.url, "--json")
            answers = self._infer_offline(fleet, photos, keep=keep)
            self._print_gains(packages)
            self._print_measurements(rows)
            self._print_answers(answers)
            self.console.print(f"\nDone in {time.monotonic() - start:.0f} s. Photos: {photos.description}.")
            self._end(keep=keep)
        finally:
            self._stop_all()

    def _build(self, photos: Photos) -> list[Path]:
        self._say("1. One model, four device classes: measure it, quantize it, check it, measure again")
        recipe = self.folder / "recipe.toml"
        recipe.write_text(f'name = "{NAME}"\nversion = "{VERSION}"\n', encoding="utf-8")
        packages: list[Path] = []
        for device in DEVICES:
            self._edgeopt(
                "build", MODEL, "--device", device,
                "--calibration", str(photos.calibration), "--evaluation", str(photos.evaluation),
                "--recipe", str(recipe), "-o", str(self.folder / "packages"),
            )  # fmt: skip
            packages.append(self.folder / "packages" / f"{NAME}-{VERSION}-{device}.edgeopt")
        return packages

    def _publish(self, packages: Sequence[Path]) -> None:
        self._say("2. Sign: root and targets keys stay offline, the fleet gets the rest")
        keys = self.folder / "keys"
        if not keys.exists():
            self._edgeopt("keys", "create", str(keys))
        for package in packages:
            self._edgeopt(
                "publish", str(package), "--repository", str(self.folder / "repository"), "--keys", str(keys)
            )

    def _start_fleet(self) -> subprocess.Popen[bytes]:
        self._say("3. A fleet on this machine: embedded MQTT broker, control plane, page")
        fleet = self._spawn(
            "fleet", "up", "--dir", str(self.folder / "fleet"), "--repository", str(self.folder / "repository"),
            "--keys", str(self.folder / "keys"), "--http-port", str(self.http_port),
        )  # fmt: skip
        self._wait_for_fleet(fleet)
        return fleet

    def _wait_for_fleet(self, fleet: subprocess.Popen[bytes]) -> None:
        import httpx

        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if fleet.poll() is not None:
                raise EdgeoptError(f"the fleet ended at once; see {self.folder / 'logs' / 'fleet.log'}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/api/v1/health", timeout=2).status_code == httpx.codes.OK:
                    return
            time.sleep(0.2)
        raise EdgeoptError(f"the fleet did not answer at {self.url} within {START_TIMEOUT_S:.0f} s")

    def _start_agent(self, name: str, device_class: str) -> None:
        config = self.folder / "agents" / name / "agent.json"
        if not config.exists():
            self._edgeopt(
                "fleet", "add-device", name, "--class", device_class, "--stand-in", "-o", str(config),
                "--fleet", self.url,
            )  # fmt: skip
        self._spawn_program(["edgeopt-agent", "run", "--config", str(config)], name)

    def _roll_out(self) -> None:
        self._say("4. Three agents, each a stand-in for a board, pull over MQTT, verify, measure and serve")
        made = self._json(
            "rollout", "create", "--model", NAME, "--version", VERSION, "--deadline", ROLLOUT_DEADLINE,
            "--fleet", self.url, "--json",
        )  # fmt: skip
        self._edgeopt("rollout", "watch", str(made["id"]), "--fleet", self.url)

    def _infer_offline(
        self, fleet: subprocess.Popen[bytes], photos: Photos, *, keep: bool
    ) -> list[tuple[str, dict[str, Any]]]:
        self._say("5. The broker is gone; the devices answer all the same")
        _stop(fleet)
        self.running.remove(fleet)
        photo = min(path for path in photos.evaluation.iterdir() if path.suffix == ".jpg")
        answers = []
        for name in BOARDS:
            config = str(self.folder / "agents" / name / "agent.json")
            answer = self._program_json(["edgeopt-agent", "infer", "--config", config, str(photo), "--json"])
            answers.append((name, answer))
        if keep:
            self._start_fleet()
        return answers

    def _print_gains(self, packages: Sequence[Path]) -> None:
        self.console.print("\n[italic]What the builds measured on this machine[/]")
        for package in packages:
            shown = self._json("inspect", str(package), "--json", quiet=True)
            table = _table(f"package for {shown['device']}", ("variant",), GAIN_FIGURES)
            for row in shown["variants"]:
                table.add_row(
                    row["id"], f"{row['file_bytes'] / 1e6:.2f}",
                    _number(row["metric_value"], "{:.3f}"), _number(row["agreement"], "{:.3f}"),
                    _number(row["sqnr_db"], "{:.1f}"), _number(row["p50_ms"], "{:.2f}"),
                    _number(row["times_faster"], "{:.2f}"),
                )  # fmt: skip
            self.console.print(table)

    def _print_measurements(self, rows: dict[str, Any]) -> None:
        table = _table(
            "What the agents measured: the fleet's ledger",
            ("device", "variant"),
            LEDGER_FIGURES,
        )
        untimed = []
        for row in sorted(rows["measurements"], key=lambda row: (row["measurement"]["device_id"], row["id"])):
            found = row["measurement"]
            timing = found["timing"]
            if timing is None:
                untimed.append(f"{found['device_id']}: {found['variant']} {found['error']}")
                continue
            table.add_row(
                f"{found['device_id']} (as {found['conditions']['stand_in_for']})", found["variant"],
                *(_number(timing[f"{p}_ns"], "{:.2f}", 1e-6) for p in ("p50", "p90")),
                "ok" if found["golden_ok"] else "WRONG",
            )  # fmt: skip
        self.console.print(table)
        for line in untimed:
            self.console.print(f"not measured, {line}", highlight=False, style="dim")

    def _print_answers(self, answers: Sequence[tuple[str, dict[str, Any]]]) -> None:
        for name, answer in answers:
            top = ", ".join(f"{entry['index']} ({entry['score']:.2f})" for entry in answer.get("top", [])[:3])
            self.console.print(
                f"offline {name}: {answer.get('variant', '')} says classes {top}", highlight=False
            )

    def _end(self, *, keep: bool) -> None:
        self.console.print(
            "Stand-ins are processes of this machine: not one figure above was taken on a Raspberry Pi, a Jetson or a "
            "Coral.",
            style="yellow",
        )
        if not keep:
            self.console.print(f"The page was {self.url}; `make demo KEEP=1` keeps it open.")
            return
        self.console.print(f"The page is open at [bold]{self.url}[/]. Ctrl-C ends the fleet and its agents.")
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()

    def _say(self, text: str) -> None:
        self.console.print(f"\n[bold cyan]{text}[/]")

    def _edgeopt(self, *args: str) -> None:
        command = ["edgeopt", *args]
        self._show(command)
        if subprocess.run(_here(command), check=False).returncode != 0:
            raise EdgeoptError(f"`{shlex.join(command)}` failed; what it said stands above")

    def _json(self, *args: str, quiet: bool = False) -> dict[str, Any]:
        return self._program_json(["edgeopt", *args], quiet=quiet)

    def _program_json(self, command: Sequence[str], *, quiet: bool = False) -> dict[str, Any]:
        if not quiet:
            self._show(command)
        done = subprocess.run(_here(command), check=False, stdout=subprocess.PIPE)
        if done.returncode != 0:
            raise EdgeoptError(f"`{shlex.join(command)}` failed; what it said stands above")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _spawn(self, *args: str) -> subprocess.Popen[bytes]:
        return self._spawn_program(["edgeopt", *args], args[0])

    def _spawn_program(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        self._show([*command, "&"])
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(_here(command), stdout=log, stderr=log, start_new_session=True)
        self.running.append(process)
        return process

    def _show(self, command: Sequence[str]) -> None:
        self.console.print(f"[dim]$ {shlex.join(command)}[/]", highlight=False, soft_wrap=True)

    def _stop_all(self) -> None:
        for process in reversed(self.running):
            _stop(process)
        self.running.clear()


def _table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="underline")
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _here(command: Sequence[str]) -> list[str]:
    """The program of this environment, whether or not the environment is activated."""
    return [str(Path(sys.executable).with_name(command[0])), *command[1:]]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(value * factor)
