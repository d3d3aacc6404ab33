# SPDX-License-Identifier: Apache-2.0
"""Lives of a device that begin where Python has started and everything is imported: a fork instead of half a second.

`python zygote.py` reads one JSON order a line: `arguments` of a life (as `device_lives.py` takes them) and a file for
what is `said`. It answers with the number of the process, which stands still (SIGSTOP) until somebody lets it go, and
with its exit status in the end. An order with `modules` is a life that only shows what is imported on the way.

What a life writes is the same as in a process of its own, but for one thing: the probe's process is not started
(`test_system_calls.py` compares the calls).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import device_lives

_PR_SET_PTRACER = 0x59616D61  # linux/prctl.h
_ANYBODY = ctypes.c_ulong(-1)


class Zygote:
    """The other side of such a process, for tests."""

    def __init__(self, folder: Path, learn_from: list[str]) -> None:
        self._folder = folder
        paths = os.pathsep.join(str(Path(module).parent) for module in (device_lives.__file__, __file__))
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        self.begin(learn_from, modules=str(folder / "modules"))
        self.let_go()
        assert self.end() == 0, self.said()

    def begin(self, arguments: list[str], **options: str) -> int:
        """Begin a life; it stands still. Returns the number of its process."""
        assert self._process.stdin is not None
        order = {"arguments": arguments, "said": str(self._folder / "said"), **options}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._life = self._answer()
        return self._life

    def let_go(self) -> None:
        """Let the life that stands still go on."""
        os.kill(self._life, signal.SIGCONT)

    def end(self) -> int:
        """Wait for its end; returns the exit status, negative for a signal."""
        return os.waitstatus_to_exitcode(self._answer())

    def kill(self) -> None:
        """End the life, which hangs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._life, signal.SIGKILL)

    def said(self) -> str:
        """What the last life wrote to its standard error."""
        return (self._folder / "said").read_text()

    def close(self) -> None:
        """End."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote is gone"
        return int(line)


def main() -> None:
    """Obey until standard input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        life = os.fork()
        if not life:
            _be_born(order)
        os.waitpid(life, os.WUNTRACED)
        print(life, flush=True)
        _, status = os.waitpid(life, 0)
        if "modules" in order:
            _import_all(Path(order["modules"]))
        print(status, flush=True)


def _be_born(order: dict[str, Any]) -> None:
    """Live in this process and end it."""
    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    status = 0
    try:
        state, root, repository, envelope = map(Path, order["arguments"])
        device_lives.live(device_lives.make(state, root, repository), envelope.read_bytes())
    except Exception:
        traceback.print_exc()
        status = 1
    if "modules" in order:
        Path(order["modules"]).write_text("\n".join(sorted(sys.modules)))
    os._exit(status)


def _import_all(modules: Path) -> None:
    for name in modules.read_text().split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


if __name__ == "__main__":
    main()
