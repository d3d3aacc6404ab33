# SPDX-License-Identifier: Apache-2.0
"""What each path of the Open Inference Protocol v2 answers. No sockets here: a request in, a reply out.

| path (under /v2) | answers |
|---|---|
| health/live | 200 |
| health/ready | 200 where every model that should serve does, else 400; neither has a body |
| (nothing) | name, version, extensions |
| models/NAME[/versions/V] | metadata; .../ready (200 or 404, no body); .../config; .../stats |
| models/NAME[/versions/V]/infer | POST; JSON, binary tensors, shared memory, or a bare file or text |
| repository/index | the models that serve, and those that should, with the reason why not; load and unload are the fleet's business and refused |
| systemsharedmemory/... | register, unregister, status |
| edgeopt/memory/region/NAME/register | sealed memory, its descriptor beside the request |

`/metrics` (not under /v2) is what Prometheus reads.

Source: Open Inference Protocol "REST" v2 and Triton's extensions of the same names.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeopt_agent.serve import infer_route, metrics
from edgeopt_agent.serve.descriptions import configuration, describe, statistics
from edgeopt_agent.serve.models import Models
from edgeopt_agent.serve.refusals import (
    Forbidden,
    NotAllowed,
    NotFound,
    NotImplementedHere,
    NotReady,
    NotServing,
)
from edgeopt_agent.serve.regions import Regions, SealedRegion, SystemRegion
from edgeopt_agent.serve.repeats import Repeats
from edgeopt_wire import __version__
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    from edgeopt_agent.serve.served import Served

EXTENSIONS = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "schedule_policy", "statistics",
    "system_shared_memory", "edgeopt_memory", "edgeopt_cache", "edgeopt_files",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One request: `read_body` is told where JSON ends and binary tensors begin."""

    method: str
    path: str
    headers: Mapping[str, str]
    read_body: Callable[[int], tuple[bytes | bytearray, memoryview]]
    take_descriptor: Callable[[], int]
    owner: int
    may_share: bool
    repeats: Repeats

    @functools.cached_property
    def parts(self) -> list[str]:
        """The names of the path, without its query."""
        return self.path.split("?", 1)[0].strip("/").split("/")

    @functools.cached_property
    def asks(self) -> tuple[str, str] | None:
        """The model and version (empty: the one that serves) that an infer request is for; None for another."""
        parts = self.parts
        if parts[:2] != ["v2", "models"] or parts[-1] != "infer" or self.method != "POST":
            return None
        if len(parts) == 4:
            return parts[2], ""
        return (parts[2], parts[4]) if len(parts) == 6 and parts[3] == "versions" and parts[4] else None

    @functools.cached_property
    def split(self) -> int | None:
        """Where the JSON of a plain infer request ends (-1: with the body); None for a bare file or a compressed body."""
        return infer_route.split_of(self.headers)


@dataclass(frozen=True)
class Reply:
    """One answer: JSON, and binary tensors behind it."""

    content: bytes = b""
    binary: tuple[memoryview, ...] = ()
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


class Routes:
    """Finds what a path means. Thread-safe."""

    def __init__(self, models: Models, regions: Regions) -> None:
        self.models = models
        self.regions = regions

    def answer(self, asked: Asked) -> Reply:
        """Answer one request.

        Raises:
            EdgeoptError: It is refused, or failed; `refusals.status_of` says how HTTP calls that.
        """
        if asked.asks is not None:
            return Reply(*infer_route.infer(self.models, *asked.asks, asked, self.regions))
        parts = asked.parts
        if parts == ["metrics"]:
            _only(asked, "GET")
            return self._metrics()
        if parts[0] != "v2":
            raise NotFound(
                f"unknown path {asked.path[:200]!r}; everything is under /v2, see the Open Inference Protocol"
            )
        if parts[1:2] == ["models"] and len(parts) > 2:
            return self._model(asked, parts[2], parts[3:])
        if parts[1:2] == ["systemsharedmemory"]:
            return self._system_memory(asked, parts[2:])
        if parts[1:3] == ["edgeopt", "memory"]:
            return self._sealed_memory(asked, parts[3:])
        if parts[1:2] == ["cudasharedmemory"] and parts[-1] != "status":
            raise NotImplementedHere("CUDA shared memory is not offered; use system shared memory")
        known: dict[tuple[str, ...], tuple[str, Callable[[], Any]]] = {
            (): ("GET", self._server),
            ("health", "live"): ("GET", lambda: None),
            ("health", "ready"): ("GET", self._ready),
            ("repository", "index"): ("POST", self._index),
            ("cudasharedmemory", "status"): ("GET", list),
        }
        found = known.get(tuple(parts[1:]))
        if found is None:
            if parts[1:3] == ["repository", "models"]:
                raise Forbidden("models come and go by the fleet's signed word, not through this socket")
            raise NotFound(f"unknown path {asked.path[:200]!r}; see the Open Inference Protocol v2")
        _only(asked, found[0])
        return _json(found[1]())

    def _model(self, asked: Asked, name: str, rest: list[str]) -> Reply:
        if rest == ["ready"] or (rest[:1] == ["versions"] and len(rest) == 3 and rest[2] == "ready"):
            return self._model_ready(asked, name, rest[1] if len(rest) == 3 else "")
        served = self.models.served(name)
        version = ""
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
            if version != served.loaded.manifest.version:
                raise NotFound(
                    f"{name} serves version {served.loaded.manifest.version}, not {version[:100]!r}"
                )
        if rest == ["infer"]:
            _only(asked, "POST")
        known: dict[tuple[str, ...], Callable[[Served], Any]] = {
            (): describe,
            ("config",): configuration,
            ("stats",): statistics,
        }
        found = known.get(tuple(rest))
        if found is None:
            raise NotFound(f"unknown path {asked.path[:200]!r}; a model has ready, config, stats and infer")
        _only(asked, "GET")
        return _json(found(served))

    def _model_ready(self, asked: Asked, name: str, version: str) -> Reply:
        _only(asked, "GET")
        try:
            serving = self.models.served(name).loaded.manifest.version
        except NotFound as error:
            raise NotServing(str(error)) from error
        if version and version != serving:
            raise NotServing(f"{name} serves version {serving}")
        return Reply()

    def _ready(self) -> None:
        if not self.models.is_ready:
            raise NotReady("not every model serves that should")

    def _metrics(self) -> Reply:
        service = self.models.service
        totals = service.totals() if service is not None else {}
        apart = service.by_condition() if service is not None else {}
        drift = service.drift.metrics() if service is not None and service.drift is not None else ()
        versions = {name: self.models.served(name).loaded.manifest.version for name in self.models.names()}
        page = metrics.exposition(totals, versions, apart, drift)
        return Reply(page.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})

    def _server(self) -> dict[str, Any]:
        return {
            "name": "edgeopt-agent",
            "version": __version__,
            "extensions": list(EXTENSIONS),
            "models": self.models.names(),
        }

    def _index(self) -> list[dict[str, str]]:
        found = [(name, self.models.served(name).loaded.manifest.version) for name in self.models.names()]
        absent = self.models.absent()
        return [
            *({"name": n, "version": v, "state": "READY", "reason": ""} for n, v in found),
            *(
                {"name": n, "version": v, "state": "UNAVAILABLE", "reason": why}
                for n, (v, why) in absent.items()
            ),
        ]

    def _system_memory(self, asked: Asked, rest: list[str]) -> Reply:
        name = rest[1] if rest[:1] == ["region"] and len(rest) == 3 else ""
        if rest[-1:] == ["status"]:
            _only(asked, "GET")
            return _json(self.regions.status(name))
        _only(asked, "POST")
        if rest == ["unregister"]:
            self.regions.remove_all()
        elif name and rest[2] == "unregister":
            self.regions.remove(name)
        elif name and rest[2] == "register":
            _may_share(asked)
            body = _body(asked)
            offset, size = body.get("offset", 0), body.get("byte_size")
            if type(offset) is not int or type(size) is not int:
                raise RecipeError(
                    f"offset and byte_size must be whole numbers, found {offset!r} and {size!r}"
                )
            self.regions.add(name, SystemRegion(str(body.get("key", "")), offset, size))
        else:
            raise NotFound(f"unknown path {asked.path[:200]!r}; a region has register, unregister and status")
        return Reply()

    def _sealed_memory(self, asked: Asked, rest: list[str]) -> Reply:
        if len(rest) != 3 or rest[0] != "region" or rest[2] not in ("register", "unregister"):
            raise NotFound(f"unknown path {asked.path[:200]!r}; a region has register and unregister")
        _only(asked, "POST")
        if rest[2] == "unregister":
            self.regions.remove(rest[1], asked.owner)
            return Reply()
        _may_share(asked)
        size = _body(asked).get("byte_size")
        if type(size) is not int:
            raise RecipeError(f"byte_size must be a whole number, found {size!r}")
        self.regions.add(rest[1], SealedRegion(asked.take_descriptor(), size), asked.owner)
        return Reply()


def _body(asked: Asked) -> dict[str, Any]:
    raw, _ = asked.read_body(-1)
    try:
        body = json.loads(bytes(raw) or b"{}")
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RecipeError("the body must be a JSON object")
    return body


def _json(value: Any) -> Reply:
    return Reply() if value is None else Reply(json.dumps(value).encode())


def _only(asked: Asked, method: str) -> None:
    allowed = ("GET", "HEAD") if method == "GET" else (method,)
    if asked.method not in allowed:
        raise NotAllowed(f"{asked.path[:200]} answers {' and '.join(allowed)}", {"Allow": ", ".join(allowed)})


def _may_share(asked: Asked) -> None:
    if not asked.may_share:
        raise Forbidden(
            "shared memory is for the Unix socket, whose file only the agent's user opens; "
            'set "http": {"shared_memory": true} in the configuration to allow it here'
        )
