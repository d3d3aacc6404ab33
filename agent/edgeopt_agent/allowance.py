# SPDX-License-Identifier: Apache-2.0
"""What a configuration allows a device to send and fetch: bytes a day and a month, a rate, and hours for what is bulky."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from edgeopt_wire.errors import RecipeError

_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]|24):([0-5]\d)")
MIB = 1024 * 1024
DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class Window:
    """Hours of every day, in minutes since midnight; `end` before `begin`: over midnight."""

    begin: int
    end: int

    def is_open(self, minute: int) -> bool:
        """Whether this minute of the day is inside."""
        if self.begin < self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end

    def __str__(self) -> str:
        return f"{self.begin // 60:02d}:{self.begin % 60:02d}-{self.end // 60:02d}:{self.end % 60:02d}"


@dataclass(frozen=True)
class Allowance:
    """Budgets in bytes, 0 for none, and windows, none for always."""

    day_bytes: int = 0
    month_bytes: int = 0
    windows: tuple[Window, ...] = ()

    @property
    def is_limited(self) -> bool:
        """Whether anything is limited."""
        return bool(self.day_bytes or self.month_bytes or self.windows)

    def is_open(self, local: datetime) -> bool:
        """Whether something bulky may go at this local time."""
        minute = local.hour * 60 + local.minute
        return not self.windows or any(window.is_open(minute) for window in self.windows)


def read_allowance(budget_mib_day: float, budget_mib_month: float, windows: Sequence[str]) -> Allowance:
    """Read the keys of a transport's configuration.

    Raises:
        RecipeError: A budget below 0, or a window that is none.
    """
    for key, value in (("budget_mib_day", budget_mib_day), ("budget_mib_month", budget_mib_month)):
        if not 0 <= value < 2**40:
            raise RecipeError(f"transport: {key} must be 0 (no limit) or more, found {value}")
    return Allowance(
        int(budget_mib_day * MIB), int(budget_mib_month * MIB), tuple(_read_window(text) for text in windows)
    )


def _read_window(text: str) -> Window:
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise RecipeError(f'transport: windows are hours like "22:00-06:00", found {text!r}')
    numbers = [int(number) for number in found.groups()]
    window = Window(numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3])
    if window.begin == window.end or window.end > DAY_MINUTES:
        raise RecipeError(
            f"transport: the window {text!r} is empty or ends after 24:00; leave windows out to allow every hour"
        )
    return window
