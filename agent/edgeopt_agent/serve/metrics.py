# SPDX-License-Identifier: Apache-2.0
"""`GET /metrics`: what Prometheus reads. Latencies as summaries of the runtime's call; counters since the start.

Source: Prometheus, "Exposition formats", text format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from edgeopt_agent.service import Key, Place, Window
from edgeopt_wire import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
QUANTILES = (0.5, 0.9, 0.99)


def exposition(
    totals: Mapping[Key, Window],
    serving: Mapping[str, str],
    by_condition: Mapping[Place, Window] | None = None,
    more: Iterable[str] = (),
) -> str:
    """The page. `serving` maps each model in service to its version; `more` are lines of others, as they stand."""
    lines = (*_lines(totals, serving), *_conditions(by_condition or {}), *more)
    return "\n".join(lines) + "\n"


def _conditions(windows: Mapping[Place, Window]) -> Iterator[str]:
    yield from _head(
        "edgeopt_condition_run_seconds", "summary", "Latency of the runtime's call alone, by condition."
    )
    for (key, condition), window in sorted(windows.items()):
        said = ",".join(f'{name}="{_text(value)}"' for name, value in condition._asdict().items())
        labels = f"{_labels(key)},{said}"
        for share in QUANTILES:
            found = window.run.quantile(share)
            if found is not None:
                yield f'edgeopt_condition_run_seconds{{{labels},quantile="{share}"}} {found / 1e9:.9g}'
        yield f"edgeopt_condition_run_seconds_sum{{{labels}}} {window.run.total / 1e9:.9g}"
        yield f"edgeopt_condition_run_seconds_count{{{labels}}} {window.run.count}"


def _lines(totals: Mapping[Key, Window], serving: Mapping[str, str]) -> Iterator[str]:
    yield from _head("edgeopt_agent_info", "gauge", "The agent's version.")
    yield f'edgeopt_agent_info{{version="{__version__}"}} 1'
    yield from _head("edgeopt_model_info", "gauge", "Models in service.")
    for model, version in sorted(serving.items()):
        yield f'edgeopt_model_info{{model="{_text(model)}",version="{_text(version)}"}} 1'
    yield from _head("edgeopt_run_seconds", "summary", "Latency of the runtime's call alone.")
    for key, window in sorted(totals.items()):
        labels = _labels(key)
        for share in QUANTILES:
            found = window.run.quantile(share)
            if found is not None:
                yield f'edgeopt_run_seconds{{{labels},quantile="{share}"}} {found / 1e9:.9g}'
        yield f"edgeopt_run_seconds_sum{{{labels}}} {window.run.total / 1e9:.9g}"
        yield f"edgeopt_run_seconds_count{{{labels}}} {window.run.count}"
    for name, what, attribute in (
        ("edgeopt_rows_total", "Rows inferred, which batches hold several of.", "rows"),
        ("edgeopt_failed_total", "Calls of a runtime that failed.", "failed"),
    ):
        yield from _head(name, "counter", what)
        for key, window in sorted(totals.items()):
            yield f"{name}{{{_labels(key)}}} {getattr(window, attribute)}"


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"


def _labels(key: Key) -> str:
    model, version, variant = map(_text, key)
    return f'model="{model}",version="{version}",variant="{variant}"'


def _text(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
