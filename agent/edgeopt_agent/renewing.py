# SPDX-License-Identifier: Apache-2.0
"""When a running agent renews its certificate: a thread that looks once a minute and disturbs nobody.

Rules:
- Due by date: the pair's own `renews_at`, judged by signed time where there is some, else by the best there is.
- Due by refusal: off line for `OFFLINE_S`, and a trial shows that the broker is there and does not take the pair in use.
  So a device that slept past the end, or whose clock is behind, comes back; a broker's outage makes nobody renew.
- What fails is tried again, a minute to `MAX_PAUSE_S` later; what was renewed is left alone for a tenth of its life,
  whatever a clock says.
- The session in use is left while there is work; the new pair is read at the next connection at the latest.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.broker_trial import try_pair
from edgeopt_agent.config import AgentConfig, mqtt_options
from edgeopt_agent.credentials import PAIR_FILE
from edgeopt_agent.renewal import Renewal, Trial, read_progress
from edgeopt_agent.trusted_time import TrustedClock, boot_seconds
from edgeopt_wire import topics
from edgeopt_wire.document import format_moment
from edgeopt_wire.errors import EdgeoptError, RecipeError, TransportError, TrustError

if TYPE_CHECKING:
    from edgeopt_agent.transports.mqtt import MqttOptions

_log = logging.getLogger(__name__)

LOOK_EVERY_S, MIN_LOOK_S = 60.0, 1.0
OFFLINE_S = 600.0
FIRST_PAUSE_S, MAX_PAUSE_S = 60.0, 6 * 3600.0


def is_ours(config: AgentConfig) -> bool:
    """Whether this device's certificate came by `enroll`, so that it can be renewed."""
    keys = config.transport
    return bool(
        config.enrolment.server
        and keys.get("kind") == "mqtt"
        and Path(str(keys.get("certificate", ""))).name == PAIR_FILE
        and not keys.get("key")
    )


def make_renewal(
    config: AgentConfig,
    certain: Callable[[], datetime],
    tell: Callable[[dict[str, Any]], None] = lambda body: None,  # noqa: ARG005 - who listens decides
) -> Renewal:
    """The renewal of a device that was enrolled.

    Raises:
        RecipeError: It was not: its certificate came some other way.
    """
    if not is_ours(config):
        raise RecipeError(
            "this device's certificate did not come by `edgeopt-agent enroll`, so that nobody knows where to renew it; "
            "enrol the device, or replace its files and send the agent SIGHUP"
        )
    options = mqtt_options(config)
    return Renewal(
        Path(options.certificate).parent,
        config.enrolment.server,
        Path(config.enrolment.ca or options.ca),
        tenant=config.tenant,
        device=config.device,
        trial=trial_at(options, topics.client_id(config.tenant, config.device)),
        certain=certain,
        tell=tell,
    )


def renew_now(config: AgentConfig) -> dict[str, Any]:
    """Renew whether it is due or not; what came of it as one JSON-like document, `edgeopt.renew/1`.

    Raises:
        RecipeError, TransportError, TrustError, StoreError: As `Renewal.renew` does.
    """
    from edgeopt_agent.store import Store

    clock = TrustedClock(lambda: datetime.now(timezone.utc), Store(config.folder).newest_moment)
    renewal = make_renewal(config, clock.certain)
    pair = renewal.renew(clock.now())
    return {
        "schema": "edgeopt.renew/1",
        "device": config.device,
        "serial": pair.serial,
        "expires_at": format_moment(pair.expires_at),
        "renews_at": format_moment(pair.renews_at),
        "confirmed": renewal.confirm(),
    }


def trial_at(options: MqttOptions, client_id: str) -> Trial:
    """A trial at the broker of a configuration, under a client id that no session has."""

    def trial(pair: Path, authorities: str) -> None:
        try_pair(options.host, options.port, f"{client_id}.renewal", pair, authorities)

    return trial


@dataclass(frozen=True)
class Session:
    """What is asked of the running agent.

    Whether the broker is there, whether a new connection would interrupt work, and to connect anew with the pair that
    lies there now.
    """

    is_online: Callable[[], bool]
    is_busy: Callable[[], bool]
    reconnect: Callable[[], object]


class Renewing:
    """The thread."""

    def __init__(
        self,
        renewal: Renewal,
        clock: TrustedClock,
        session: Session,
        *,
        elapsed: Callable[[], float] = boot_seconds,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._renewal = renewal
        self._clock = clock
        self._session = session
        self._elapsed = elapsed
        self._look_every_s = look_every_s
        self._next_at = float("-inf")
        self._pause_s = FIRST_PAUSE_S
        self._offline_since: float | None = None
        self._reconnect_due = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._look, name="renewal", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End after what is in hand, which ends by its own time limits."""
        self._stopping.set()
        self._thread.join(1)

    def step(self) -> bool:
        """Look once; returns whether the certificate was renewed."""
        now = self._elapsed()
        self._note_line(now)
        renewed = False
        if now >= self._next_at:
            renewed = self._renew_if_due(now)
        if self._reconnect_due and not self._session.is_busy():
            self._reconnect_due = False
            self._session.reconnect()
        return renewed

    def moment(self) -> datetime:
        """What dates are judged by: a signed moment, which a wall clock cannot outdo, else the best there is."""
        return self._clock.signed_now() or self._clock.now()

    def _renew_if_due(self, now: float) -> bool:
        try:
            if read_progress(self._renewal.folder).unconfirmed and not self._renewal.confirm():
                self._put_off(now)
                return False
            if not self._is_due(now):
                return False
            pair = self._renewal.renew(self.moment())
        except EdgeoptError as error:
            _log.error("the certificate is not renewed yet: %s", error)
            self._put_off(now)
            return False
        life = (pair.expires_at - pair.certificate.not_valid_before_utc).total_seconds()
        self._pause_s, self._next_at = FIRST_PAUSE_S, now + life / 10
        self._offline_since, self._reconnect_due = None, True
        self._renewal.confirm()
        return True

    def _is_due(self, now: float) -> bool:
        if self._renewal.is_under_way or self.moment() >= self._renewal.pair().renews_at:
            return True
        if self._offline_since is None or now - self._offline_since < OFFLINE_S:
            return False
        self._offline_since = now
        try:
            self._renewal.try_current()
        except TransportError:
            return False
        except TrustError as error:
            _log.warning("the broker does not take this device's certificate: %s; asking for another", error)
            return True
        return False

    def _note_line(self, now: float) -> None:
        if self._session.is_online():
            self._offline_since = None
        elif self._offline_since is None:
            self._offline_since = now

    def _put_off(self, now: float) -> None:
        self._next_at = now + self._pause_s * random.uniform(0.5, 1)
        self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)

    def _wait_s(self) -> float:
        """Until the next look: not past the moment when the pair is due, or what failed is tried again."""
        try:
            due_s = (self._renewal.pair().renews_at - self.moment()).total_seconds()
        except EdgeoptError:
            return self._look_every_s
        return min(self._look_every_s, max(MIN_LOOK_S, due_s, self._next_at - self._elapsed()))

    def _look(self) -> None:
        self._stopping.wait(random.uniform(0, MIN_LOOK_S))
        while not self._stopping.is_set():
            wait_s = self._look_every_s
            try:
                self.step()
                wait_s = self._wait_s()
            except Exception:  # noqa: BLE001 - the outermost loop of this thread: the device serves on
                _log.exception("the certificate could not be looked at")
            self._stopping.wait(wait_s)
