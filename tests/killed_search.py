# SPDX-License-Identifier: Apache-2.0
"""A search that dies by SIGKILL in the middle of writing: the next file is half-written when the process ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path


def run(test: Path, folder: Path, kill_after: int, trial: str, before: str = "") -> None:
    """Search by the Python expression `trial` of the module `test` (called t) until `kill_after` files are written."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = [{str(test.parent)!r}, {str(Path(__file__).parent)!r}]
        from pathlib import Path
        import {test.stem} as t
        from edgeopt import search as subject

        {before}
        count = 0
        write = subject._replace

        def dying(path, data):
            global count
            count += 1
            if count > {kill_after}:
                path.with_suffix(path.suffix + ".half").write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, data)

        subject._replace = dying
        subject.search({trial}, Path({str(folder)!r}), "key")
    """)
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr.decode()
