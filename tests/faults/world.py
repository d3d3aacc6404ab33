# SPDX-License-Identifier: Apache-2.0
"""A device, the link to its broker, and a control plane, each of which can be told to fail; real from the socket up.

The broker, the TCP proxy and the control plane serve a thousand cases; each case has a device of its own, that begins
with a copy of a disk on which version 1 runs. Who watches asks for inferences all the time (`Watch`).
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
from device_lives import quick, quick_probe, serves
from publishing import Publisher
from tcp_proxy import TcpProxy
from tuf_site import Device, Files, Source

from edgeopt.fleet.broker import EmbeddedBroker, free_port
from edgeopt_agent.loop import Agent
from edgeopt_agent.machine import State
from edgeopt_agent.probe import ProbeRequest, run_probe
from edgeopt_wire.errors import EdgeoptError
from edgeopt_wire.measurement import Measurement
from edgeopt_wire.messages import Phase

CONVERGES_S = 25.0
PROBE_S = 1.5
"""Enough for the real probe's process to start, also on two busy cores."""
MEMORY_BYTES = 1024**3
BAD = {"wrong": "wrong", "crash": "segfault", "hang": "hang", "leak": "leak"}
"""Versions whose model fails, and how (`edgeopt_agent.runtimes.null.Failure`)."""


class PowerCut(BaseException):
    """Not an error that anybody may handle: everything in memory is gone."""


class World:
    """All of it. Broken things are mended, and a fresh device begins, by `begin`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.publisher = Publisher(folder / "publisher")
        self.thief = Publisher(folder / "thief", self.publisher.now)
        for publisher in (self.publisher, self.thief):
            self._publish(publisher, "1")
        for version, failure in BAD.items():
            self._publish(self.publisher, version, failure=failure)
        self.before: Files = self.publisher.files()
        for publisher in (self.publisher, self.thief):
            self._publish(publisher, "2")
        self.files, self.blobs = self.publisher.files(), self.publisher.blobs()
        self.broker = EmbeddedBroker(folder, free_port())
        self.broker.start()
        self.is_broker_gone = False
        self.proxy = TcpProxy(self.broker.port)
        self.source = Source(self.broker.port, self.publisher)
        self.revision = 0
        self.is_up = True
        self.wall: Callable[[], datetime] = self.right_wall
        self.mend()
        self._prepare()

    def _publish(self, publisher: Publisher, version: str, **options: str) -> None:
        """A package of three chunks that resembles no other, so that it travels whole."""
        work = publisher.folder / f"package-{version}"
        work.mkdir(parents=True)
        noise = np.random.default_rng(len(version) + ord(version[0])).bytes(150_000)
        (work / "padding.bin").write_bytes(noise)
        publisher.add(version, **options)

    def _prepare(self) -> None:
        """The disk that every device begins with."""
        self.want("1", rollout="")
        self.device = self._device(self.folder / "prepared")
        self.run(lambda: self.serves() == "1" and not self.agent.is_busy, "version 1 serves")
        self.device.stop()

    def right_wall(self) -> datetime:
        """The wall clock of a device that is right."""
        return self.publisher.now

    def mend(self) -> None:
        """No fault anywhere but on the device."""
        source = self.source
        source.files, source.blobs = self.files, self.blobs
        source.tell_time, source.page = source.signed_time, source.honest_page
        source.chunk = lambda number, chunk: [(number, chunk)]
        source.client.__dict__.pop("publish", None)
        if self.is_broker_gone:
            self.broker.start()
            self.is_broker_gone = False
        self.proxy.speak()
        self.proxy.accept()
        self.wall = self.right_wall
        self.probe_fails = False
        self.probes = 0

    def begin(self, *, rollout: str) -> None:
        """A fresh device on which version 1 runs, and that has heard that it is wanted."""
        self.mend()
        self.source.wait()
        state = self.folder / f"device-{self.revision}"
        shutil.copytree(self.folder / "prepared", state, symlinks=True)
        self.want("1", rollout=rollout)
        self.device = self._device(state)
        self.run(lambda: self._has_heard and not self.agent.is_busy, "the device is at rest")

    def end(self) -> None:
        """Take the device away."""
        self.mend()
        self.device.stop()
        shutil.rmtree(self.device.config.folder, ignore_errors=True)

    def close(self) -> None:
        self.source.close()
        self.proxy.close()
        self.broker.stop()

    def _device(self, state: Path) -> Device:
        device = Device(state, self.proxy.port, self.publisher, lambda: self.wall())  # noqa: PLW0108 - the clock may be set
        device.agent.installer.probe = self.probe
        return device

    def reboot(self) -> None:
        """The power comes back: a new process on the same disk."""
        self.is_up = False
        self.device.stop()
        self.device.boot()
        self.agent.installer.probe = self.probe
        self.is_up = True

    @property
    def agent(self) -> Agent:
        return self.device.agent

    @property
    def state(self) -> State:
        return self.agent.states["tiny"]

    @property
    def _has_heard(self) -> bool:
        return self.agent.reported().desired_revision == self.revision

    def want(self, version: str, *, rollout: str | None = None) -> None:
        """A wish of the control plane, in a rollout of its own."""
        self.revision += 1
        name = f"r{self.revision}" if rollout is None else rollout
        self.source.want(self.publisher.desire(self.revision, version, rollout=name))

    def probe(self, request: ProbeRequest) -> Measurement:
        """The probe's own code; in its real process where the model or the machine fails."""
        self.probes += 1
        is_bad = self.agent.store.manifest("tiny", Path(request.folder).name).version in BAD
        if not (is_bad or self.probe_fails):
            return quick_probe(request)
        memory = 64 * 1024**2 if self.probe_fails else MEMORY_BYTES
        found: Measurement = run_probe(quick(request), timeout_s=PROBE_S, memory_limit_bytes=memory)
        return found

    def serves(self) -> str | None:
        return serves(self.agent)

    def run(self, claim: Callable[[], object], what: str, wait_s: float = CONVERGES_S) -> None:
        """Let the agent work until it is so; at every turn what serves is whole."""
        end = time.monotonic() + wait_s
        while not claim():
            assert time.monotonic() < end, f"waited {wait_s} s for: {what}; {self.said}"
            self._turn()

    def run_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._turn()

    def _turn(self) -> None:
        try:
            self.agent.tick(0.02)
        except PowerCut:
            self.reboot()

    @property
    def said(self) -> str:
        state = self.agent.states.get("tiny")
        return f"{state.phase.value}, {state.error!r}, {self.agent.unread_because!r}" if state else "no state"

    @property
    def is_settled(self) -> bool:
        """Version 2 runs, and nothing is left to do."""
        return (
            self._has_heard
            and not self.agent.is_busy
            and self.state.phase in (Phase.COMMITTED, Phase.IDLE)
            and self.serves() == "2"
        )


class Watch(contextlib.AbstractContextManager["Watch"]):
    """Asks for inferences from a thread of its own, as a user does, and keeps what was wrong with the answers."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.wrong: list[str] = []
        self.answers = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(10)

    def _ask(self) -> None:
        image = np.ones((1, 2, 4, 4), np.float32)
        while not self._is_over.wait(0.005):
            agent = self._world.agent
            if not self._world.is_up:
                continue
            try:
                loaded, outputs = agent.models.infer("tiny", {"image": image})
            except EdgeoptError as error:
                if agent is self._world.agent and self._world.is_up:
                    self.wrong.append(f"no answer: {error}")
                continue
            self.answers += 1
            version = loaded.manifest.version
            if version not in ("1", "2") or not np.array_equal(outputs["scores"], np.ones((1, 4))):
                self.wrong.append(f"version {version} answers {outputs['scores']}")
