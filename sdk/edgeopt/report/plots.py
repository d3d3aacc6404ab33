# SPDX-License-Identifier: Apache-2.0
"""The report's plots as inline SVG: no script, no font, no file beside the page.

Colours are CSS variables of the page, so that a plot follows light and dark. matplotlib draws; its ids are salted
with the plot's name, so that the same figures give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgeopt.report.document import BuildReport, Candidate
from edgeopt.search import Journal, Point
from edgeopt_wire.errors import UnsupportedError

INK = "#123456"
"""Stands for the page's text colour until the SVG is written."""
PALETTE = {"int8": "#0f9d8a", "int4": "#2f6fde", "fp16": "#7a5cff", "fp32": "#e08a1e"}
OTHER = "#8aa0b5"


_PARETO: dict[str, tuple[Callable[[Point], float | None], str]] = {
    "drop": (lambda point: point.judged.drop, "drop"),
    "sqnr_db": (lambda point: point.judged.sqnr_db, "SQNR, dB"),
    "kl": (lambda point: point.judged.kl, "KL, nats"),
}
"""By the goal's metric: what is drawn of a try, and what it is called."""


def accuracy_latency_size(report: BuildReport) -> str:
    """Agreement (or the metric) against p50; the area of a dot is the file's size. Empty if nothing was timed."""
    points = [
        (c, *_timed(c)) for c in report.candidates if c.measurement and c.measurement.timing and c.quality
    ]
    if not points:
        return ""
    with _figure("accuracy", (7.2, 3.6)) as (axes, finish):
        largest = max(c.file_bytes for c, *_ in points)
        for number, (candidate, p50, _) in enumerate(points):
            value = _score(candidate)
            if value is None:
                continue
            axes.scatter(
                p50, value, s=60 + 900 * candidate.file_bytes / largest, color=_colour(candidate),
                alpha=0.75 if candidate.shipped else 0.3, linewidths=0,
            )  # fmt: skip
            axes.annotate(
                candidate.id,
                (p50, value),
                textcoords="offset points",
                xytext=(8, 8 if number % 2 else -14),
                fontsize=7,
                color=INK,
            )
        metric = (
            next((c.quality.metric for c, *_ in points if c.quality and c.quality.metric), "") or "agreement"
        )
        axes.set_xlabel("p50, ms")
        axes.set_ylabel(metric)
        axes.margins(0.18)
        return finish()


def latency_bars(report: BuildReport) -> str:
    """p50 and p90 of every timed candidate. Empty if nothing was timed."""
    timed = [(c, *_timed(c)) for c in report.candidates if c.measurement and c.measurement.timing]
    if not timed:
        return ""
    with _figure("latency", (7.2, 0.7 + 0.34 * len(timed))) as (axes, finish):
        rows = range(len(timed))
        axes.barh(rows, [p90 for *_, p90 in timed], color="#8aa0b5", height=0.62, alpha=0.45, label="p90")
        axes.barh(
            rows,
            [p50 for _, p50, _ in timed],
            color=[_colour(c) for c, *_ in timed],
            height=0.36,
            label="p50",
        )
        axes.set_yticks(rows, [c.id for c, *_ in timed], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("ms (wide: p90, narrow: p50)")
        return finish()


def stage_bars(report: BuildReport) -> str:
    """How long each stage took; cached ones are pale. Empty if there is no stage."""
    if not report.stages:
        return ""
    with _figure("stages", (7.2, 0.7 + 0.28 * len(report.stages))) as (axes, finish):
        rows = range(len(report.stages))
        colours = ["#8aa0b5" if stage.cached else "#2f6fde" for stage in report.stages]
        axes.barh(rows, [max(stage.seconds, 0.01) for stage in report.stages], color=colours, height=0.55)
        labels = [stage.name + (" (cached)" if stage.cached else "") for stage in report.stages]
        axes.set_yticks(rows, labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        return finish()


def pareto(name: str, journal: Journal) -> str:
    """Every try of a search: quality against time, the front as a line, the chosen one ringed, the goal dashed."""
    if len(journal.points) < 2:
        return ""
    with _figure(f"search {name}", (7.2, 3.2)) as (axes, finish):
        _draw_pareto(axes, journal)
        return finish()


def pareto_png(name: str, journal: Journal) -> bytes:
    """The same as a picture on white; empty where nothing was searched."""
    if len(journal.points) < 2:
        return b""
    with _figure(f"search {name}", (7.2, 3.2)) as (axes, _):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        _draw_pareto(axes, journal)
        buffer = io.BytesIO()
        axes.figure.patch.set(alpha=1, facecolor="white")
        FigureCanvasAgg(axes.figure).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()


def front(journal: Journal) -> list[Point]:
    """The tries that no other one beats in both time and quality, by time."""
    made = [point for point in journal.points if point.size_bytes]
    best: list[Point] = []
    for point in sorted(made, key=lambda point: (point.relative_time, point.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def _draw_pareto(axes: Any, journal: Journal) -> None:
    value, label = _PARETO[journal.goal.metric]
    made = [point for point in journal.points if point.size_bytes and value(point) is not None]
    for point in made:
        place = (point.relative_time, value(point))
        colour = PALETTE["int8"] if point.kept else OTHER
        axes.scatter(*place, s=46, linewidths=0, color=colour, marker="D" if point.is_estimated else "o")
        axes.annotate(
            str(len(point.changes)), place, textcoords="offset points", xytext=(6, 4), fontsize=7, color=INK
        )
    line = [point for point in front(journal) if point in made]
    axes.plot(
        [point.relative_time for point in line], [value(point) for point in line], color=OTHER, linewidth=0.9
    )
    best = journal.best
    if best in made and best is not None:
        axes.scatter(
            best.relative_time, value(best), s=190, facecolors="none", edgecolors="#e08a1e", linewidths=1.8
        )
    axes.axhline(journal.goal.limit, color="#e08a1e", linewidth=0.9, linestyle="--")
    estimated = ", estimated" if any(point.is_estimated for point in made) else ""
    axes.set_xlabel(f"time over the float file's{estimated} (number: operators that are not int8)")
    axes.set_ylabel(label)
    axes.margins(0.15)


def error_bars(report: BuildReport) -> str:
    """Where the error of each attributed file comes from, in dB: a short bar is a large error."""
    if not report.attributions:
        return ""
    rows = [
        (f"{name}: {part}", value)
        for name, found in report.attributions.items()
        for part, value in (
            ("weights", found.weights_db),
            ("activations", found.activations_db),
            ("of these clipping", found.clipping_db),
            ("everything", found.whole_db),
        )
    ]
    with _figure("attribution", (7.2, 0.7 + 0.3 * len(rows))) as (axes, finish):
        axes.barh(range(len(rows)), [value for _, value in rows], color=PALETTE["int8"], height=0.55)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("SQNR of the outputs with only this quantized, dB")
        return finish()


def _colour(candidate: Candidate) -> str:
    return PALETTE.get(candidate.precision.split("-")[0], OTHER)


def _timed(candidate: Candidate) -> tuple[float, float]:
    timing = candidate.measurement.timing if candidate.measurement else None
    return (timing.p50_ns / 1e6, timing.p90_ns / 1e6) if timing else (0.0, 0.0)


def _score(candidate: Candidate) -> float | None:
    if candidate.quality is None:
        return None
    return candidate.quality.agreement if candidate.quality.value is None else candidate.quality.value


@contextmanager
def _figure(name: str, size: tuple[float, float]) -> Iterator[tuple[Any, Callable[[], str]]]:
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("the report's plots need matplotlib: pip install 'edgeopt[onnx]'") from error
    with mpl.rc_context(
        {"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    ):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(INK)
        axes.tick_params(colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.grid(axis="x", color="#8aa0b5", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)

        def finish() -> str:
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            svg = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
            return svg.replace(INK, "var(--ink)")

        yield axes, finish
