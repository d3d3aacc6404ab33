# SPDX-License-Identifier: Apache-2.0
"""`python child.py WORK.json`: run one peer in this interpreter and write outcome.json beside the file it made.

Time and memory begin after the peer's imports, so that what differs is the quantizer and not the size of its libraries.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import resource
import sys
import time
import traceback
from pathlib import Path

from work import NOT_APPLICABLE, Outcome, Unavailable, Work


def main() -> None:
    """Do the work; any error becomes a row of the table."""
    work = Work(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    base, start = 0, time.perf_counter()
    file, error = "", ""
    try:
        peer = importlib.import_module(f"peers.{work.peer}")
        for name in peer.IMPORTS:
            importlib.import_module(name)
        base, start = _peak(), time.perf_counter()
        file = str(peer.make(work))
    except Unavailable as reason:
        error = f"{NOT_APPLICABLE}: {reason}"
    except Exception as reason:  # the outermost loop of this process: what a peer raises is its row
        traceback.print_exc()
        error = f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
    seconds = time.perf_counter() - start
    outcome = Outcome(
        file, error, seconds, cpu_s=_cpu_seconds(), stages=_stages(work), base_bytes=base, peak_bytes=_peak(),
        versions=_versions(),
    )  # fmt: skip
    outcome.save(Path(work.target) / "outcome.json")


def _stages(work: Work) -> dict[str, float]:
    """Seconds of the stages that a peer wrote down, if it did."""
    path = work.output("stages.json")
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def _versions() -> dict[str, str]:
    names = (
        "onnxruntime",
        "nncf",
        "ai-edge-quantizer",
        "torch",
        "torchao",
        "olive-ai",
        "edgeopt",
        "litert-torch",
        "executorch",
        "openvino",
    )
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {name: found[name] for name in names if name in found}


if __name__ == "__main__":
    main()
