# SPDX-License-Identifier: Apache-2.0
"""The report as one self-contained page: works with no network, in light and dark, and escapes everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from edgeopt.report import parity_table, plots
from edgeopt.report.document import BuildReport, Candidate
from edgeopt.report.table import cells, file_of, metric_of, number
from edgeopt.search import Journal


def write(report: BuildReport, path: Path) -> None:
    """Write the page, and the plot of every search beside it as SVG and PNG.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: The disk refused.
    """
    path.write_text(render(report), encoding="utf-8")
    for name, journal in report.searches.items():
        beside = path.with_suffix(f".{name}.pareto")
        if svg := plots.pareto(name, journal):
            beside.with_name(f"{beside.name}.svg").write_text(
                svg.replace("var(--ink)", "#222"), encoding="utf-8"
            )
            beside.with_name(f"{beside.name}.png").write_bytes(plots.pareto_png(name, journal))


def render(report: BuildReport) -> str:
    """Return the page as a string."""
    style = resources.files("edgeopt.report").joinpath("page.css").read_text(encoding="utf-8")
    title = f"{report.model} {report.version} for {report.device}"
    parts = [
        f"<h1>{escape(report.model)} <span class='soft'>{escape(report.version)}</span></h1>",
        f"<p class='soft'>for {escape(report.device_title)} ({escape(report.device)}), from {escape(report.source)}</p>",
        _steps(report),
        _notes(report),
        _plot(
            "Accuracy, latency, size",
            plots.accuracy_latency_size(report),
            "The area of a dot is the file's size.",
        ),
        _plot("Latency", plots.latency_bars(report), _conditions_line(report)),
        _section("Candidates", _candidates(report)),
        _section(
            f"Estimated on {report.device}, not measured",
            _table(("candidate", "p50, ms", "four of five lie between", "rests on"), _estimate_rows(report)),
        ),
        _section("What fell back to floats", _floats(report)),
        _section("The same integers in every runtime", _parity(report)),
        _section("What the samples tell", _table(("candidate", "figure", "what"), _figure_rows(report))),
        _plot(
            "Where the error comes from",
            plots.error_bars(report),
            " ".join(f"{name}: {found.sentence()}." for name, found in report.attributions.items()),
        ),
        *(
            _plot(f"The search from {name}", plots.pareto(name, journal), _search_line(journal))
            for name, journal in report.searches.items()
        ),
        _section("Decisions", _table(("subject", "choice", "why"), _decision_rows(report))),
        _plot("Stages", plots.stage_bars(report), ""),
        _section("Conditions", _conditions(report)),
        _section("Provenance", _provenance(report)),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def _search_line(journal: Journal) -> str:
    return (
        "Every dot is a file that was built, run and timed next to the float file (a diamond: its time is estimated); the "
        f"dashed line is the goal, {journal.goal.sentence()}; the line joins what no other try beats; the ring is the choice."
    )


def _steps(report: BuildReport) -> str:
    base = next((c for c in report.candidates if c.id == report.baseline), None)
    best = _best(report)
    cards = [("1. Baseline", _headline(base), "the unmodified model, ONNX Runtime, 1 thread")]
    passes = sorted({c.precision for c in report.candidates if c.precision != "fp32"})
    made = sum(1 for c in report.candidates if c.precision != "fp32")
    cards.append(("2. Optimize", ", ".join(passes) or "nothing", f"{made} candidates"))
    if best is not None:
        quality = best.quality
        shown = f"agreement {number(quality.agreement, '{:.3f}')}" if quality else "not measured"
        cards.append(("3. Validate", shown, f"{best.id}, {quality.samples if quality else 'no'} samples"))
        gain = (
            f"{number(best.times_faster, '{:.2f}')}x faster, {number(best.times_smaller, '{:.2f}')}x smaller"
        )
        cards.append(("4. Measure gains", gain, f"{best.id} against float in the same runtime"))
    else:
        cards.append(("3. Validate", "no candidate kept the budget", "see the table below"))
    boxes = "".join(
        f"<section><p class='soft'>{escape(step)}</p><b>{escape(figure)}</b><p class='soft'>{escape(text)}</p></section>"
        for step, figure, text in cards
    )
    return f"<div class='steps'>{boxes}</div>"


def _best(report: BuildReport) -> Candidate | None:
    shipped = [c for c in report.candidates if c.shipped and c.measurement and c.measurement.timing]
    return min(
        shipped,
        key=lambda c: c.measurement.timing.p50_ns if c.measurement and c.measurement.timing else 0,
        default=None,
    )


def _headline(candidate: Candidate | None) -> str:
    if candidate is None or candidate.measurement is None or candidate.measurement.timing is None:
        return "not measured"
    return f"{candidate.measurement.timing.p50_ns / 1e6:.2f} ms, {candidate.file_bytes / 1e6:.2f} MB"


def _notes(report: BuildReport) -> str:
    if not report.was_built:
        note = "<p class='note no'>The budget was not met: no package was written.</p>"
    else:
        note = ""
    return _section(
        "Notes", note + "".join(f"<p class='note'>{escape(text)}</p>" for text in report.warnings)
    )


def _candidates(report: BuildReport) -> str:
    heads = (
        "candidate",
        "MB",
        metric_of(report),
        "agreement",
        "SQNR dB",
        "p50 ms",
        "p90 ms",
        "x faster",
        "why shipped or not",
    )
    rows = []
    for candidate in report.candidates:
        shown = cells(candidate)
        verdict = f"<span class='{'yes' if candidate.shipped else 'no'}'>{'shipped' if candidate.shipped else 'not shipped'}</span>"
        middle = "".join(f"<td class='n'>{escape(cell)}</td>" for cell in shown[1:])
        name = f"<td>{escape(shown[0])}</td>"
        kind = "shipped" if candidate.shipped else ""
        rows.append(f"<tr class='{kind}'>{name}{middle}<td>{verdict}: {escape(candidate.reason)}</td></tr>")
    head = "".join(f"<th class='{'n' if 0 < i < 8 else ''}'>{escape(h)}</th>" for i, h in enumerate(heads))
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _estimate_rows(report: BuildReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for candidate in report.candidates:
        found = candidate.estimate
        if found is not None:
            between = f"{found.low_ns / 1e6:.2g} and {found.high_ns / 1e6:.2g} ms"
            rows.append((candidate.id, f"{found.latency_ns / 1e6:.2g}", between, found.basis))
        elif candidate.no_estimate:
            rows.append((candidate.id, "-", "-", candidate.no_estimate))
    return rows


def _floats(report: BuildReport) -> str:
    seen: dict[str, Candidate] = {}
    for candidate in report.candidates:
        if candidate.precision.startswith("int"):
            seen.setdefault(file_of(candidate), candidate)
    if not seen:
        return "<p>No integer candidate was made.</p>"
    parts = []
    for name, candidate in seen.items():
        share = f"{candidate.integer_operators} of {candidate.operators} operators compute in integers"
        parts.append(f"<p>{escape(name)}: {share}.</p>")
        if candidate.float_operators:
            rows = [(op.type, op.name, op.reason) for op in candidate.float_operators]
            parts.append(_table(("operator", "name", "why"), rows))
    return "".join(parts)


def _parity(report: BuildReport) -> str:
    pairs = report.runtime_pairs
    rows = parity_table.rows(pairs)
    table = _table(parity_table.HEADS, rows) if rows else ""
    return table + "".join(f"<p>{escape(text)}</p>" for text in parity_table.others(pairs))


def _figure_rows(report: BuildReport) -> list[tuple[str, str, str]]:
    seen: set[tuple[str, str]] = set()
    rows = []
    for candidate in report.candidates:
        for figure in candidate.figures:
            key = (file_of(candidate), figure.name)
            if candidate.precision != "fp32" and key not in seen:
                seen.add(key)
                bounds = (
                    ""
                    if figure.low is None or figure.high is None
                    else f" [{figure.low:.4g}, {figure.high:.4g}]"
                )
                value = f"{figure.name} {figure.value:.4g}{bounds}, unmodified {figure.baseline:.4g}"
                rows.append((file_of(candidate), value, figure.sentence))
    return rows


def _decision_rows(report: BuildReport) -> list[tuple[str, str, str]]:
    return [(d.subject, d.choice, d.reason) for d in report.decisions]


def _conditions_line(report: BuildReport) -> str:
    for candidate in report.candidates:
        if candidate.measurement is not None:
            found = candidate.measurement.conditions
            return f"Measured on {found.cpu} ({found.architecture}, {found.os}), batch {found.batch}."
    return ""


def _conditions(report: BuildReport) -> str:
    rows = []
    for candidate in report.candidates:
        if candidate.measurement is None:
            continue
        found, timing = candidate.measurement.conditions, candidate.measurement.timing
        rows.append(
            (
                candidate.id,
                f"{found.runtime} {found.runtime_version}",
                str(found.threads),
                found.governor or "not told",
                number(found.before.load_average, "{:.2f}"),
                str(timing.n) if timing else "-",
                number(timing.load_ns / 1e6 if timing else None, "{:.1f}"),
                number(timing.first_inference_ns / 1e6 if timing else None, "{:.2f}"),
                "yes" if candidate.measurement.stable else "no",
            )
        )
    return _table(
        ("candidate", "runtime", "threads", "governor", "load", "n", "load ms", "first ms", "stable"), rows
    )


def _provenance(report: BuildReport) -> str:
    given = report.provenance
    rows = [("source", given.source_sha256), ("recipe", given.recipe_sha256)]
    rows += [
        ("calibration", given.calibration_sha256 or "none"),
        ("evaluation", given.evaluation_sha256 or "none"),
    ]
    rows += [(name, version) for name, version in sorted(given.tools.items())]
    if report.package:
        rows.insert(0, (report.package, f"{report.package_sha256} ({report.package_bytes} bytes)"))
    return _table(("what", "digest or version"), rows)


def _plot(title: str, svg: str, caption: str) -> str:
    if not svg:
        return ""
    return f"<section><h2>{escape(title)}</h2>{svg}<p class='soft'>{escape(caption)}</p></section>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"
        if body
        else "<p class='soft'>none</p>"
    )
