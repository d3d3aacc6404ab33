# SPDX-License-Identifier: Apache-2.0
"""Telling systemd that the agent is ready, alive or stopping; says nothing where systemd did not ask.

Rules:
- The watchdog is fed only while the agent's loop makes progress (`Pulse.mark`): a loop that hangs is restarted.
- A message that cannot be sent is no reason to do anything else.

Source: sd_notify(3) and sd_watchdog_enabled(3) of systemd: datagrams to `NOTIFY_SOCKET` (a leading `@` is an abstract
name), `WATCHDOG_USEC` is the limit, half of it the advised interval, `WATCHDOG_PID` whom it is for.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)

STUCK_S = 600.0
"""Without a mark for this long the loop counts as stuck: longer than any single probe, load or flush may take."""


def notify(message: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send e.g. `READY=1` to systemd; say whether it was sent."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.sendall(message.encode())
    except OSError as error:
        _log.debug("systemd was not told %r: %s", message, error)
        return False
    return True


def watchdog_interval(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return after how many seconds systemd wants to hear from this process again (half its limit), or None."""
    limit = environment.get("WATCHDOG_USEC", "")
    for_whom = environment.get("WATCHDOG_PID", str(os.getpid()))
    if not limit.isdigit() or int(limit) == 0 or for_whom != str(os.getpid()):
        return None
    return int(limit) / 2e6


@dataclass
class Pulse:
    """Feeds systemd's watchdog from a thread while `mark` is called often enough."""

    interval_s: float | None = field(default_factory=watchdog_interval)
    stuck_s: float = STUCK_S
    send: Callable[[str], object] = notify
    monotonic: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._marked = self.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin; nothing to do where systemd keeps no watchdog."""
        if self.interval_s is not None:
            self._thread.start()

    def mark(self) -> None:
        """The loop got somewhere."""
        self._marked = self.monotonic()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1)

    def _beat(self) -> None:
        is_stuck = False
        while not self._stop.wait(self.interval_s):
            still = self.monotonic() - self._marked
            if still < self.stuck_s:
                self.send("WATCHDOG=1")
            elif not is_stuck:
                _log.critical("the loop is stuck for %.0f s; systemd will restart the agent", still)
            is_stuck = still >= self.stuck_s
