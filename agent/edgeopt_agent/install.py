# SPDX-License-Identifier: Apache-2.0
"""`edgeopt-agent install`: by hand, from a published repository in a folder, or from one package file.

The folder is verified like a broker: same root of trust, same machine, same probe. A bare file is signed by nobody, so
it is taken only where an operator says so; its bytes and its golden outputs are checked all the same.
"""

from __future__ import annotations

import queue
from pathlib import Path

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.loop import Agent
from edgeopt_agent.machine import Event, Kind, State
from edgeopt_agent.main import make_agent, only_one
from edgeopt_agent.past import BY_HAND
from edgeopt_agent.store import Store
from edgeopt_agent.transports import Inbox
from edgeopt_agent.transports.folder import FolderTransport
from edgeopt_agent.transports.memory import MemoryTransport
from edgeopt_wire.archive import PackageReader
from edgeopt_wire.errors import EdgeoptError, RecipeError, TrustError
from edgeopt_wire.index import PackageIndex, index_of
from edgeopt_wire.messages import DesiredModel, Phase


def install(config: AgentConfig, source: Path, *, model: str, version: str, unsigned: bool) -> State:
    """Install and return the model's state, which is `committed`.

    Raises:
        TrustError: It is not signed, or not what was signed.
        EdgeoptError: It cannot run here; what ran before serves on.
    """
    store = Store(config.folder)
    inbox: Inbox = queue.Queue()
    with only_one(store):
        if source.is_dir():
            agent = make_agent(config, store, FolderTransport(source), inbox)
            wanted = _choose(agent, config, model, version)
        else:
            agent, wanted = _from_file(config, store, inbox, source, unsigned=unsigned)
        return _drive(agent, wanted)


def _drive(agent: Agent, wanted: DesiredModel) -> State:
    agent.start()
    agent.states.setdefault(wanted.name, State(wanted.name))
    agent.feed(wanted.name, Event(Kind.DESIRED, desired=wanted))
    while agent.is_busy:
        agent.tick()
        state = agent.states[wanted.name]
        if state.error and state.phase is not Phase.FAILED:
            raise EdgeoptError(f"{wanted.name} {wanted.version} is not installed: {state.error}")
    state = agent.states[wanted.name]
    if state.active is None or state.active.version != wanted.version or state.phase is Phase.FAILED:
        raise EdgeoptError(f"{wanted.name} {wanted.version} is not installed: {state.error}")
    return state


def _choose(agent: Agent, config: AgentConfig, model: str, version: str) -> DesiredModel:
    found = []
    for path in sorted(agent.trust.list_targets()):
        parts = path.split("/")
        if len(parts) == 4 and parts[0] == "models" and (not model or parts[1] == model):
            index = agent.trust.find_index(path)
            fits = (
                config.device_class == index.device or config.device_class in index.compatible.device_classes
            )
            if fits and (not version or index.version == version):
                found.append(DesiredModel(index.name, index.version, path))
    if not found:
        raise RecipeError(
            f"the repository has no package of {model or 'any model'} {version} for {config.device_class}"
        )
    if len(found) > 1:
        listed = ", ".join(f"{entry.name} {entry.version}" for entry in found)
        raise RecipeError(f"several packages fit: {listed}; say which with --model and --model-version")
    return found[0]


def _from_file(
    config: AgentConfig, store: Store, inbox: Inbox, source: Path, *, unsigned: bool
) -> tuple[Agent, DesiredModel]:
    with PackageReader(source) as reader:
        reader.verify()
        manifest = reader.manifest
    if not unsigned:
        raise TrustError(
            f"{source} is whole, but nothing signs a bare file: install from a published repository folder, "
            "or say --unsigned if you know where it comes from"
        )
    index = index_of(
        source,
        name=manifest.name,
        version=manifest.version,
        device=manifest.device,
        compatible=manifest.compatible,
    )
    transport = MemoryTransport(inbox, blobs={index.sha256: source.read_bytes()})
    agent = make_agent(config, store, transport, inbox)
    agent.installer.trust = _Given(index)
    return agent, DesiredModel(index.name, index.version, BY_HAND)


class _Given:
    """The index of a file that an operator vouches for."""

    def __init__(self, index: PackageIndex) -> None:
        self._index = index

    def find_index(self, target: str) -> PackageIndex:  # noqa: ARG002 - the protocol's signature
        return self._index
