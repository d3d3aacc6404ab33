# SPDX-License-Identifier: Apache-2.0
"""`make fuzz`: coverage-guided fuzzing of everything that strangers' bytes reach, a million inputs in all.

`python fuzz_run.py [TARGET ...] [--runs N]`: each target in a process of its own under atheris (libFuzzer), with limits on
memory and on the time of one input. A finding is kept below `--findings`; put it into `seeds/` as TARGET-WHAT.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

RUNS = {
    "document": 150_000, "topic": 150_000, "package": 60_000, "delta": 120_000, "chunks": 60_000, "records": 60_000,
    "envelope": 100_000, "director": 80_000, "request_head": 120_000, "infer": 100_000, "model": 80_000,
}  # fmt: skip
"""Inputs a target: 1,080,000 in all."""
MEMORY_MB, INPUT_S, INPUT_BYTES = 1024, 10, 16384


def main() -> None:
    """Fuzz each target in a child process; exits with 1 where one found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--runs", type=int, help="inputs a target (default: a million in all)")
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.child:
        _fuzz(args.child, rest)
    args.findings.mkdir(parents=True, exist_ok=True)
    failed = []
    unknown = sorted({*args.targets} - RUNS.keys())
    if unknown:
        parser.error(f"no target {unknown[0]!r}; known: {', '.join(RUNS)}")
    for target in args.targets or RUNS:
        runs = args.runs or RUNS[target]
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as corpus:
            done = _child(target, runs, args.findings, Path(corpus))
        print(
            f"{target}: {runs} inputs in {time.monotonic() - began:.0f} s: {'FOUND' if done else 'nothing found'}"
        )
        failed += [target] if done else []
    sys.exit(bool(failed))


def _child(target: str, runs: int, findings: Path, corpus: Path) -> int:
    import fuzz_targets as targets

    for number, seed in enumerate(targets.seeds(target)):
        (corpus / str(number)).write_bytes(seed)
    command = [
        sys.executable, __file__, "--child", target, str(corpus), f"-runs={runs}", f"-max_len={INPUT_BYTES}",
        f"-rss_limit_mb={MEMORY_MB}", f"-timeout={INPUT_S}", f"-artifact_prefix={findings}/{target}-", "-verbosity=0",
        "-print_final_stats=0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:])
    return done.returncode


def _fuzz(target: str, options: list[str]) -> None:
    import logging

    import atheris

    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["edgeopt_wire", "edgeopt_agent", "edgeopt.delta"]):
        import fuzz_targets as targets
    atheris.Setup([sys.argv[0], *options], lambda data: targets.run(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
