# SPDX-License-Identifier: Apache-2.0
"""How many bytes this device has sent and fetched, and whether something bulky may go now.

Rules:
- Bulky are the chunks of packages, and telemetry with its summaries. Reports, signed metadata and urgent events always go;
  they are counted too.
- Payload bytes are counted, both ways: what MQTT, TLS and TCP put around them is not.
- Days, months and windows are those of the device's time zone, by the moment that the director signed since the start, else
  by a plausible wall clock. Where neither is there, nothing bulky goes in windows, and no day ends: the last known
  day's budget is what there is. A clock that goes back gives no budget back.
- The disk knows of bytes before they are spent, in steps: a power cut never makes them less, and at most a step more.
- What is held back is said: in the log, in `status`, in the device's report, and a spent budget once as an event.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

from edgeopt_agent.allowance import MIB, Allowance
from edgeopt_agent.files import write_durably
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.errors import StoreError, TransportError
from edgeopt_wire.index import PackageIndex

_log = logging.getLogger(__name__)

SCHEMA = "edgeopt.spending/1"
SPENDING = "spending.json"
"""The record's name in the state directory."""
STEP_BYTES = MIB
STEPS_A_BUDGET = 64
Keep = Callable[[int, bytes], bool]
Pull = Callable[[PackageIndex, Sequence[int], Keep], None]


class Spending:
    """Counts. `allowance` gives what the configuration allows now; `zone` the device's, by default the system's."""

    def __init__(
        self,
        path: Path | None,
        clock: TrustedClock,
        allowance: Callable[[], Allowance] = Allowance,
        zone: tzinfo | None = None,
    ) -> None:
        self._path = path
        self._clock = clock
        self._allowance = allowance
        self._zone = zone
        self._day = ""
        self._is_signed = False
        self._day_bytes = self._month_bytes = 0
        self._noted = 0  # of the month's bytes, by the disk
        self._said = ""
        self._load()

    def count(self, size: int) -> None:
        """So many bytes were sent or came."""
        self._roll()
        self._day_bytes += size
        self._month_bytes += size
        if self._month_bytes > self._noted:
            self._save(self._step())

    def close(self) -> None:
        """Note the exact sums: the next start need not assume a step."""
        if self._day:
            self._save(0)

    def refusal(self, size: int = 0) -> str:
        """Why nothing bulky of this size may go now; empty if it may."""
        return self._closed() or self._spent(size)

    def _closed(self) -> str:
        """Why the windows let nothing bulky go now; empty if they do."""
        allowance = self._allowance()
        if not allowance.windows:
            return ""
        if not self._clock.is_known:
            return "what time it is, is not known yet, and transport.windows are set: what is bulky waits for signed time"
        if not allowance.is_open(self._local()):
            hours = ", ".join(str(window) for window in allowance.windows)
            return f"it is {self._local():%H:%M} here, and transport.windows are {hours}: what is bulky waits"
        return ""

    def require(self, size: int = 0) -> None:
        """Raise where nothing bulky of this size may go now.

        Raises:
            TransportError: It may not; the message says why, and until when.
        """
        refused = self.refusal(size)
        if refused:
            raise TransportError(refused)

    def pull(self, pull: Pull, index: PackageIndex, missing: Sequence[int], keep: Keep) -> None:
        """Get chunks by `pull`, as many as the budget has bytes for, while the windows are open.

        Raises:
            TransportError: Some are left for later.
        """

        def metered(number: int, chunk: bytes) -> bool:
            if chunk:
                self.count(len(chunk))
            kept = keep(number, chunk)
            if closed := self._closed():
                raise TransportError(closed)
            return kept

        rest = list(missing)
        while rest:
            self.require(index.chunk_bytes)
            left = self._left()
            most = len(rest) if left is None else left // index.chunk_bytes
            pull(index, rest[:most], metered)
            rest = rest[most:]

    def fetch(self, fetch: Callable[..., bytes | None], *args: Any) -> bytes | None:
        """Get a file by `fetch`, and count it."""
        content = fetch(*args)
        self.count(len(content or b""))
        return content

    def news(self) -> dict[str, Any] | None:
        """What the control plane is to hear once: a budget that is spent, or one that is there again."""
        which = self._empty(0)
        if which == self._said:
            return None
        self._said = which
        said = self._spent(0)
        if said:
            _log.warning("%s", said)
        return {**self.to_json(), "held_because": said}

    def to_json(self) -> dict[str, Any]:
        """Sums, budgets and windows, and why something bulky waits (empty: it does not)."""
        self._roll()
        allowance = self._allowance()
        return {
            "day": self._day,
            "day_bytes": self._day_bytes,
            "day_budget_bytes": allowance.day_bytes or None,
            "month_bytes": self._month_bytes,
            "month_budget_bytes": allowance.month_bytes or None,
            "windows": [str(window) for window in allowance.windows],
            "held_because": self.refusal(),
        }

    @property
    def is_limited(self) -> bool:
        """Whether the configuration limits anything."""
        return self._allowance().is_limited

    def _empty(self, size: int) -> str:
        """Which budget has no room for `size` bytes, at least one: `day`, `month`, or empty for none."""
        allowance = self._allowance()
        if not (allowance.day_bytes or allowance.month_bytes):
            return ""
        self._roll()
        if allowance.month_bytes and self._month_bytes + max(1, size) > allowance.month_bytes:
            return "month"
        if allowance.day_bytes and self._day_bytes + max(1, size) > allowance.day_bytes:
            return "day"
        return ""

    def _spent(self, size: int) -> str:
        """The same in words."""
        which = self._empty(size)
        if not which:
            return ""
        allowance = self._allowance()
        until, spent, budget = {
            "day": ("midnight", self._day_bytes, allowance.day_bytes),
            "month": ("the first of the next month", self._month_bytes, allowance.month_bytes),
        }[which]
        return (
            f"the budget of this {which} is spent (transport.budget_mib_{which} is {budget / MIB:g}, "
            f"{spent / MIB:.1f} MiB went): what is bulky waits until {until}"
        )

    def _left(self) -> int | None:
        allowance = self._allowance()
        left = [
            budget - spent
            for budget, spent in (
                (allowance.day_bytes, self._day_bytes),
                (allowance.month_bytes, self._month_bytes),
            )
            if budget
        ]
        return max(0, min(left)) if left else None

    def _local(self) -> datetime:
        return (self._clock.signed_now() or self._clock.now()).astimezone(self._zone)

    def _roll(self) -> None:
        """Begin another day or month where that is certain."""
        day = self._local().date().isoformat()
        is_signed = self._clock.signed_now() is not None
        is_earlier = day < self._day and not (is_signed and not self._is_signed)
        if self._day and (day == self._day or is_earlier or not self._clock.is_known):
            self._is_signed = self._is_signed or (is_signed and day == self._day)
            return
        if day > self._day:
            self._day_bytes = 0
            if day[:7] > self._day[:7]:
                self._month_bytes = 0
            self._noted = 0
        self._day, self._is_signed = day, is_signed

    def _step(self) -> int:
        allowance = self._allowance()
        budgets = [budget for budget in (allowance.day_bytes, allowance.month_bytes) if budget]
        return min([STEP_BYTES, *(budget // STEPS_A_BUDGET for budget in budgets)])

    def _load(self) -> None:
        if self._path is None:
            return
        try:
            found = _checked(json.loads(self._path.read_bytes()))
            self._day, self._is_signed = str(found["day"]), bool(found["is_signed"])
            self._day_bytes, self._month_bytes = int(found["day_bytes"]), int(found["month_bytes"])
            self._noted = self._month_bytes
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.error("what was sent and fetched is not known, and counted from now on: %s", error)

    def _save(self, ahead: int) -> None:
        if self._path is None:
            return
        record = {
            "schema": SCHEMA,
            "day": self._day,
            "is_signed": self._is_signed,
            "day_bytes": self._day_bytes + ahead,
            "month_bytes": self._month_bytes + ahead,
        }
        try:
            write_durably(self._path, json.dumps(record).encode())
            self._noted = self._month_bytes + ahead
        except StoreError as error:
            _log.error("what was sent and fetched is not noted: %s", error)


def _checked(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError("the record is of another kind")
    return found
