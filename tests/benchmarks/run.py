# SPDX-License-Identifier: Apache-2.0
"""`make bench`: our int8 files beside the runtimes' and other projects' own quantizers, in one run.

Every peer works in an environment and a process of its own, from the same float file and the same samples; a peer that
fails is a row with its error. What was made is kept below `.bench`, by the digest of what went in, so a run that was
cut off goes on; `make clean` removes it. Accuracy and times are always taken anew. Nothing is asserted: a person reads
it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import registry
from evaluation import Evaluation
from judging import Row, judge
from making import peers_of, quantize, variants
from models import CALIBRATION, EVALUATION
from running import open_file, runtime_of, time_in_turns, why_not
from table import document, markdown
from work import Outcome, Unavailable

THREADS = (1, 2)
FORMATS = {"onnxruntime": "onnx", "litert": "litert"}


def main() -> None:
    """Prepare, quantize, judge, time, write."""
    args = _arguments()
    cache = args.cache.absolute()
    families = registry.families()
    names = list(families) if args.models == "all" else args.models.split(",")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        _say(f"{name}: preparing")
        try:
            folder, about = registry.prepared(name, cache)
        except Unavailable as reason:
            found[name] = {"skipped": str(reason)}
            _say(f"{name}: skipped: {reason}")
            continue
        given = Evaluation.load(folder / EVALUATION, about, args.limit)
        rows = _bench(name, folder, given, cache, peers_of(args.peers))
        notes = [*about.notes, *([f"{len(given)} evaluation samples"] if args.limit else [])]
        described = {"description": about.description, "task": about.task, "notes": notes}
        found[name] = {**described, "rows": rows}
        if args.json:
            args.json.write_text(json.dumps(document(machine, found), indent=2), encoding="utf-8")
        if args.markdown:
            args.markdown.write_text(markdown(machine, found), encoding="utf-8")
    print(markdown(machine, found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(registry.QUICK), help="names by comma, or `all`")
    parser.add_argument("--peers", default="all", help="names by comma, or `all`")
    parser.add_argument("--limit", type=int, help="evaluation samples of a model at most, for a first look")
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument(
        "--cache", type=Path, default=Path(__file__).parents[2] / ".bench", help="what is kept"
    )
    return parser.parse_args()


def _bench(name: str, folder: Path, given: Evaluation, cache: Path, peers: list[str]) -> list[Row]:
    about = given.about
    files: dict[str, Path] = {}
    rows: dict[str, Row] = {}
    for kind, runtime in (("onnx", "onnxruntime"), ("litert", "litert")):
        if kind in about.files:
            label = f"float, {runtime}"
            rows[label], files[label] = Row(label, runtime), Path(about.files[kind])
    for label, file in about.given.items():
        rows[label], files[label] = Row(label, runtime_of(Path(file))), Path(file)
    for peer, variant, label in variants(peers, about.bits):
        _say(f"{name}: {label}")
        outcome = quantize(peer, variant, about, folder / CALIBRATION, cache)
        rows[label] = row = _row(label, peer, outcome)
        if outcome.file:
            row.runtime, files[label] = runtime_of(Path(outcome.file)), Path(outcome.file)
            row.error = why_not(files[label], given.sample(0), files[label].parent)
        if row.error:
            _say(f"{name}: {label}: {row.error}")
    _judge(rows, {label: file for label, file in files.items() if not rows[label].error}, given)
    for threads in THREADS:
        _time(rows, {label: file for label, file in files.items() if not rows[label].error}, given, threads)
    return list(rows.values())


def _row(label: str, peer: str, outcome: Outcome) -> Row:
    made = bool(outcome.file)
    row = Row(label, peer=peer, error=outcome.error, versions=outcome.versions, stages=outcome.stages)
    if made:
        row.build_s, row.process_s = outcome.seconds, outcome.process_s
        row.peak_bytes, row.base_bytes = outcome.peak_bytes, outcome.base_bytes
    return row


def _judge(rows: dict[str, Row], files: dict[str, Path], given: Evaluation) -> None:
    floats = Path(given.about.files["onnx"])
    baseline = given.outputs(floats)
    for label, file in files.items():
        _say(f"  judging {label}")
        reference = given.about.files.get(FORMATS[runtime_of(file)], str(floats))
        try:
            judge(rows[label], file, Path(reference), given, baseline)
        except Exception as error:  # a file that its runtime refuses is a row with that error
            rows[label].error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _time(rows: dict[str, Row], files: dict[str, Path], given: Evaluation, threads: int) -> None:
    runs = {label: open_file(file, threads) for label, file in files.items()}
    key = str(threads)
    for label, spent in time_in_turns(runs, given.sample(0)).items():
        rows[label].p50_ns[key], rows[label].min_ns[key] = spent.p50_ns, spent.min_ns
    for label in files:
        row = rows[label]
        base = rows.get(f"float, {row.runtime}")
        if base and key in base.p50_ns:
            row.against_float[key] = row.p50_ns[key] / base.p50_ns[key]
            row.best_against_float[key] = row.min_ns[key] / base.min_ns[key]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
