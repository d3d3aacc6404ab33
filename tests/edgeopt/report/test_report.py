# SPDX-License-Identifier: Apache-2.0
"""The report survives its JSON, and its page stands alone and escapes everything."""

import io
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from rich.console import Console

from edgeopt.report.document import BuildReport, Candidate, Decision, FloatOperator, Stage
from edgeopt.report.html import render
from edgeopt.report.table import print_table
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.manifest import Provenance, Quality
from edgeopt_wire.measurement import Conditions, Measurement, Timing

HOSTILE = "<script>alert('x')</script>&"


def _measurement(p50_ms: float) -> Measurement:
    samples = [round(p50_ms * 1e6 * (1 + i / 1000)) for i in range(120)]
    timing = Timing.of(samples, warmup=3, load_ns=10**7, first_inference_ns=10**7)
    conditions = Conditions("onnxruntime", "1.2", 1, 1, "cpu", "x86_64", "A CPU", "Linux")
    return Measurement(
        "",
        "net",
        "1",
        "v",
        "int8",
        "d",
        "host",
        "0",
        datetime(2026, 1, 1, tzinfo=UTC),
        conditions,
        timing,
        True,
    )


def _candidate(name: str, precision: str, *, shipped: bool, p50_ms: float) -> Candidate:
    return Candidate(
        id=name, runtime="onnxruntime", format="onnx", precision=precision, threads=1, accelerator="cpu",
        file_bytes=1000 if precision == "int8" else 4000, shipped=shipped, reason=f"because {HOSTILE}",
        quality=Quality(50, 0.98, 24.0, "top1", 0.9, 0.89), measurement=_measurement(p50_ms), times_faster=2.0,
        times_smaller=4.0, operators=3, integer_operators=2,
        float_operators=(FloatOperator("softmax", "Softmax", "no integer kernel"),) if precision == "int8" else (),
    )  # fmt: skip


@pytest.fixture
def report() -> BuildReport:
    return BuildReport(
        model=HOSTILE, version="1", source=HOSTILE, device="host", device_title=HOSTILE, budget={"max_drop": None},
        stages=(Stage("lower", 1.5), Stage("quantize", 0.2, cached=True)), baseline="base",
        candidates=(_candidate("base", "fp32", shipped=False, p50_ms=10), _candidate("small", "int8", shipped=True, p50_ms=5)),
        decisions=(Decision("small", HOSTILE, HOSTILE),), provenance=Provenance("a" * 64, "b" * 64, tools={"torch": "2"}),
        warnings=(HOSTILE,),
    )  # fmt: skip


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith("#"):
                self.outside.append(f"{tag} {name}={value}")


def test_a_report_survives_its_json(report: BuildReport) -> None:
    assert from_bytes(BuildReport, to_bytes(report)) == report


def test_the_page_fetches_nothing_and_runs_nothing(report: BuildReport) -> None:
    page = _Page()
    page.feed(render(report))
    assert page.outside == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 3


def test_everything_is_escaped(report: BuildReport) -> None:
    assert "<script" not in render(report)
    assert "&lt;script&gt;" in render(report)


def test_the_same_report_gives_the_same_page(report: BuildReport) -> None:
    assert render(report) == render(report)


def test_the_page_names_what_fell_back_and_why(report: BuildReport) -> None:
    page = render(report)
    assert "2 of 3 operators compute in integers" in page
    assert "no integer kernel" in page


def test_the_table_shows_figures_and_fall_backs(report: BuildReport) -> None:
    buffer = io.StringIO()
    print_table(Console(file=buffer, width=100), report)
    text = buffer.getvalue()
    assert "small" in text
    assert "24.0" in text
    assert "1 of 3 operators: Softmax softmax" in text.replace("\n", " ")
