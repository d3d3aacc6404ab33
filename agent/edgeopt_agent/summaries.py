# SPDX-License-Identifier: Apache-2.0
"""What was served while nobody listened, in one event: latencies merged per model, version, variant and condition.

Rules:
- Made when the device is back and more windows of service wait than one batch holds. The windows follow, newest first; those
  that a full outbox dropped are in no summary.
- `events` names the first and last window that was merged. No window is merged twice: the next summary begins after it.
- A summary is at most `MOST_BYTES` long; what did not fit, the least served, is counted in `left_out`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from edgeopt_agent.outbox import BATCH_EVENTS, Outbox
from edgeopt_agent.urgency import SUMMARY
from edgeopt_wire.errors import StoreError
from edgeopt_wire.messages import Event
from edgeopt_wire.sketch import Sketch

_log = logging.getLogger(__name__)

SCHEMA = "edgeopt.summary/1"
MOST_BYTES = 32 * 1024


def summarize(outbox: Outbox, at: datetime) -> bool:
    """Put a summary into the outbox where enough windows wait that are in none; say whether it did."""
    if len(outbox) <= BATCH_EVENTS:
        return False
    told = max(
        [
            outbox.summarized,
            *(event.body["events"][1] for event in outbox.events(SUMMARY) if _is_whole(event)),
        ]
    )
    windows = [event for event in outbox.events("service") if event.sequence > told]
    if len(windows) <= BATCH_EVENTS:
        return False
    try:
        outbox.add(SUMMARY, at, merged(windows), summarized=windows[-1].sequence)
    except StoreError as error:
        _log.error("a summary of %d windows is not kept: %s", len(windows), error)
        return False
    return True


def merged(windows: Sequence[Event]) -> dict[str, Any]:
    """The body of a summary of these windows of service, ascending."""
    parts: dict[str, dict[str, Any]] = {}
    sketches: dict[str, Sketch] = {}
    left_out = 0
    for event in windows:
        body = event.body
        try:
            key = json.dumps(
                [body["model"], body["version"], body["variant"], body["condition"]], sort_keys=True
            )
            sketch = Sketch.from_json(body["run_ns"])
            _merge(parts.setdefault(key, _empty(body)), body)
            sketches.setdefault(key, Sketch()).merge(sketch)
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("event %d is left out of the summary: %s", event.sequence, error)
            left_out += 1
    rows = [{**part, "run_ns": sketches[key].to_json()} for key, part in parts.items() if key in sketches]
    rows.sort(key=lambda row: -row["calls"])
    kept, size = [], 0
    for row in rows:
        size += len(json.dumps(row))
        if size <= MOST_BYTES:
            kept.append(row)
        else:
            left_out += row["windows"]
    return {
        "schema": SCHEMA,
        "events": [windows[0].sequence, windows[-1].sequence],
        "windows": len(windows),
        "left_out": left_out,
        "parts": kept,
    }


def _is_whole(event: Event) -> bool:
    found = event.body.get("events")
    return isinstance(found, (list, tuple)) and [type(number) for number in found] == [int, int]


def _empty(body: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: body[name] for name in ("model", "version", "variant", "condition", "from", "to")}
    return {**named, "windows": 0, "calls": 0, "rows": 0, "failed": 0}


def _merge(part: dict[str, Any], body: Mapping[str, Any]) -> None:
    counts = {name: int(body[name]) for name in ("calls", "rows", "failed")}
    part["from"], part["to"] = min(part["from"], body["from"]), max(part["to"], body["to"])
    part["windows"] += 1
    for name, count in counts.items():
        part[name] += count
