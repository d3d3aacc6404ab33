# SPDX-License-Identifier: Apache-2.0
"""`make bench`: our int8 files beside the runtimes' and other projects' own quantizers, in one run.

Every peer works in an environment and a process of its own, from the same float file and the same samples; a peer that
fails is a row with its error. What was made is kept below `.bench`, by the digest of what went in, so a run that was
cut off goes on (`--fresh` makes all anew); `make clean` removes it. Accuracy and times are always taken anew. A model
goes through three phases: files are made one by one, judged two at once, and timed with nothing else running.
Nothing is asserted: a person reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import registry
from evaluation import Evaluation
from judging import FLOAT, Row, judge_apart
from making import Variant, peers_of, quantize, variants
from models import CALIBRATION, EVALUATION, About
from running import FORMATS, runtime_of
from table import document, markdown, write_between
from timing import time_files
from work import Outcome, Unavailable

if TYPE_CHECKING:
    from work import Arrays

THREADS = (1, 2)
PLAIN = "-quick"
"""Ways that only show what rounding gains, on the models of `make bench`: they take minutes on larger ones."""

JUDGES = 2
"""Files that are judged at once; nothing is timed then."""


def main() -> None:
    """Prepare, quantize, judge, time, write."""
    args = _arguments()
    cache = args.cache.absolute()
    names = list(registry.families()) if args.models == "all" else args.models.split(",")
    machine = f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        begin = time.perf_counter()
        found[name] = _entry(name, cache, args)
        _say(f"{name}: {time.perf_counter() - begin:.0f} s")
        if args.json:
            args.json.write_text(json.dumps(document(machine, found), indent=2), encoding="utf-8")
        if args.markdown:
            write_between(args.markdown, markdown(machine, found))
    print(markdown(machine, found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(registry.QUICK), help="names by comma, or `all`")
    parser.add_argument("--peers", default="all", help="names by comma, or `all`")
    parser.add_argument("--limit", type=int, help="evaluation samples of a model at most, for a first look")
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument(
        "--markdown", type=Path, help="also write the tables here, between the marks that a page has"
    )
    parser.add_argument(
        "--fresh",
        default="",
        help="models by comma, or `all`, whose files are all made anew and so have build times",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(__file__).parents[2] / ".bench", help="what is kept"
    )
    return parser.parse_args()


def _processor() -> str:
    """What the machine calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names else platform.machine()


def _entry(name: str, cache: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the tables say of one model."""
    _say(f"{name}: preparing")
    try:
        folder, about = registry.prepared(name, cache)
    except Unavailable as reason:
        _say(f"{name}: skipped: {reason}")
        return {"skipped": str(reason)}
    fresh = args.fresh == "all" or name in args.fresh.split(",")
    bench = Bench(name, folder, about, cache, args.limit, fresh)
    rows = bench.run(peers_of(args.peers))
    notes = [*about.notes, *([f"{args.limit} evaluation samples at most"] if args.limit else [])]
    return {"description": about.description, "task": about.task, "notes": notes, "rows": rows}


@dataclass
class Bench:
    """One model's rows and files, by what a reader sees."""

    name: str
    folder: Path
    about: About
    cache: Path
    limit: int | None = None
    fresh: bool = False
    rows: dict[str, Row] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def run(self, peers: list[str]) -> list[Row]:
        """Make, judge, time."""
        self._take_floats()
        for variant in variants(peers, self.about.bits):
            if self.name in registry.QUICK or not variant.name.endswith(PLAIN):
                self._make(variant)
        scratch = self.cache / "scratch" / self.name
        shutil.rmtree(scratch, ignore_errors=True)
        self._judge(scratch)
        for threads in THREADS:
            self._time(threads, scratch)
        return list(self.rows.values())

    def _take_floats(self) -> None:
        for runtime, form in FORMATS.items():
            if form in self.about.files:
                label = f"float, {runtime}"
                self.rows[label], self.files[label] = Row(label, runtime), Path(self.about.files[form])
        for label, file in self.about.given.items():
            self.rows[label], self.files[label] = Row(label, runtime_of(Path(file))), Path(file)

    def _make(self, variant: Variant) -> None:
        label = variant.label
        _say(f"{self.name}: {label}")
        outcome = quantize(variant, self.about, self.folder / CALIBRATION, self.cache, fresh=self.fresh)
        self.rows[label] = row = _row(variant, outcome)
        if outcome.file:
            self.files[label] = Path(outcome.file)
            row.runtime = variant.runtime or runtime_of(self.files[label])
        else:
            _say(f"{self.name}: {label}: {row.error}")

    def _judge(self, scratch: Path) -> None:
        _say(f"{self.name}: judging")
        first, *others = self.files
        self._judge_one(scratch, first)
        with ThreadPoolExecutor(JUDGES) as judges:
            list(judges.map(partial(self._judge_one, scratch), others))

    def _judge_one(self, scratch: Path, label: str) -> None:
        row, file = self.rows[label], self.files[label]
        own = self.about.files.get(FORMATS[row.runtime], self.about.files[FORMATS[FLOAT]])
        number = list(self.files).index(label)
        judge_apart(row, file, Path(own), self.folder, self.limit, scratch / f"judged-{number}")
        if row.error:
            _say(f"{self.name}: {label}: {row.error}")

    def _time(self, threads: int, scratch: Path) -> None:
        """A runtime's files take turns with its float file."""
        _say(f"{self.name}: timing on {threads} threads")
        sample = Evaluation.load(self.folder / EVALUATION, self.about, 1).sample(0)
        for runtime in FORMATS:
            files = {
                label: file
                for label, file in self.files.items()
                if self.rows[label].runtime == runtime and not self.rows[label].error
            }
            if files:
                self._time_runtime(runtime, files, threads, sample, scratch / f"timed-{runtime}-{threads}")

    def _time_runtime(
        self, runtime: str, files: dict[str, Path], threads: int, sample: Arrays, scratch: Path
    ) -> None:
        try:
            found = time_files(files, runtime, threads, sample, scratch)
        except RuntimeError as reason:
            _say(f"{self.name}: {', '.join(files)}: {reason}")
            first, *others = files
            if len(others) < 2:
                self.rows[[*files][-1]].error = str(reason)
            few = others if len(others) > 1 else others and [first]
            for label in few:  # each beside the float file alone, because one of them ended all
                pair = {first: files[first], label: files[label]}
                self._time_runtime(runtime, pair, threads, sample, scratch)
            return
        key, base = str(threads), found.get(f"float, {runtime}")
        for label, spent in found.items():
            row = self.rows[label]
            row.p50_ns[key], row.min_ns[key] = spent.p50_ns, spent.min_ns
            if base:
                row.against_float[key] = spent.p50_ns / base.p50_ns
                row.best_against_float[key] = spent.min_ns / base.min_ns


def _row(variant: Variant, outcome: Outcome) -> Row:
    row = Row(variant.label, variant.runtime, variant.peer, outcome.error, variant.bits)
    row.versions, row.stages = outcome.versions, outcome.stages
    if outcome.file:
        row.build_s, row.process_s, row.cpu_s = outcome.seconds, outcome.process_s, outcome.cpu_s
        row.peak_bytes, row.base_bytes, row.kept = outcome.peak_bytes, outcome.base_bytes, outcome.kept
    return row


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
