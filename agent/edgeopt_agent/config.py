# SPDX-License-Identifier: Apache-2.0
"""The agent's configuration: one JSON file, every key known or an error.

| key | meaning | default |
|---|---|---|
| schema | `edgeopt.agent/1` | needed |
| device, device_class | who this is, and which packages fit it | needed |
| tenant | the fleet's name on the broker | `default` |
| state_dir | where models, state and events are kept | needed |
| root | the root of trust, a file | needed |
| stand_in | this machine plays the board: every measurement says so | false |
| transport | `{"kind": "mqtt", "host", "port", "ca", "certificate", "key", "insecure", "blobs", "blobs_ca", "pull_kib_s": 0}` or `{"kind": "folder", "path"}` | needed |
| transport.keepalive_s | seconds between two signs of life on an idle connection, 10 to 3600 | 120 |
| transport.pull_kib_s | at most so many KiB of packages a second, 0: no limit | 0 |
| transport.tell_kib_s | at most so many KiB of events a second, urgent ones aside, 0: no limit | 0 |
| transport.budget_mib_day, transport.budget_mib_month | MiB after which packages and telemetry wait for another day or month (docs/fleet.md), 0: no limit | 0 |
| transport.windows | hours in which packages and telemetry may go, `["22:00-06:00"]`, in the device's time zone | always |
| socket | Unix socket for local inference | `<state_dir>/agent.sock` |
| http | `{"port": 8000, "shared_memory": false}`: local inference on a port of 127.0.0.1 as well | none |
| service_report_s | seconds between two reports of what was served, at least 10 | 300 |
| drift | `{"every_s": 1, "rows": 128, "reference": "package"}`: how what models see is watched (docs/monitoring.md) | as shown |
| upkeep | `{"golden_every_h": 24, "measure_every_h": 168, "patience_s": 21600}`: proving and measuring again (docs/monitoring.md) | as shown |
| disk_quota | what models may take of the disk, a share (`50%`) or a size (`2GB`); packages that nothing needs go first | `50%` |
| enrolment | `{"server": "https://fleet.example:8443", "ca": "ca.pem", "renew": true}`: where certificates come from | none |
| serving | by model, what goes before the package's own `serving` keys (docs/serving.md) | `{}` |
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent import quota
from edgeopt_agent.drift import DriftOptions
from edgeopt_agent.schedule import UpkeepOptions
from edgeopt_agent.serve.options import HttpOptions
from edgeopt_agent.transports import Identity, Inbox, Transport
from edgeopt_wire import __version__, seam, topics
from edgeopt_wire.document import from_json, parse_json
from edgeopt_wire.errors import DocumentError, RecipeError

if TYPE_CHECKING:
    from edgeopt_agent.transports.mqtt import MqttOptions

MIN_REPORT_S = 10.0

TRANSPORTS = ("folder", "mqtt")
"""What a configuration may name; `memory` is for simulators, which make it themselves."""


@dataclass(frozen=True)
class EnrolmentOptions:
    """Where this device's certificate comes from; `edgeopt-agent enroll` writes it. Without `renew` nothing renews it."""

    server: str = ""
    ca: str = ""
    renew: bool = True


@dataclass(frozen=True)
class AgentConfig:
    """What the file says; see the module's table."""

    SCHEMA = "edgeopt.agent/1"

    device: str
    device_class: str
    state_dir: str
    root: str
    transport: Mapping[str, Any]
    tenant: str = "default"
    stand_in: bool = False
    socket: str = ""
    http: HttpOptions = field(default_factory=HttpOptions)
    service_report_s: float = 300.0
    disk_quota: str = quota.DEFAULT
    serving: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    drift: DriftOptions = field(default_factory=DriftOptions)
    upkeep: UpkeepOptions = field(default_factory=UpkeepOptions)
    enrolment: EnrolmentOptions = field(default_factory=EnrolmentOptions)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The state directory."""
        return Path(self.state_dir)

    @property
    def socket_path(self) -> Path:
        """Where local clients find the running agent."""
        return Path(self.socket) if self.socket else self.folder / "agent.sock"


def load_config(path: Path) -> AgentConfig:
    """Read the configuration.

    Raises:
        RecipeError: It cannot be read, is no JSON, or has a wrong or unknown key.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"cannot read the configuration {path}: {error.strerror}; `edgeopt fleet add-device` writes one"
        ) from error
    try:
        config = from_json(AgentConfig, parse_json(raw, str(path)), str(path))
        topics.check_part(config.device, "device")
        topics.check_part(config.tenant, "tenant")
        if not config.service_report_s >= MIN_REPORT_S:
            raise RecipeError(
                f"{path}: service_report_s must be at least {MIN_REPORT_S:.0f}, found {config.service_report_s}"
            )
        quota.parse_quota(config.disk_quota, 0)
    except DocumentError as error:
        raise RecipeError(str(error)) from error
    if config.extra:
        known = [entry.name for entry in dataclasses.fields(AgentConfig) if entry.name != "extra"]
        raise RecipeError(f"{path}: {seam.unknown('key', next(iter(config.extra)), known)}")
    return config


def make_transport(config: AgentConfig, inbox: Inbox) -> Transport:
    """Make the transport that the configuration names.

    Raises:
        RecipeError: An unknown kind or key, or one that is missing.
    """
    keys = dict(config.transport)
    kind = str(keys.pop("kind", ""))
    if kind == "folder":
        from edgeopt_agent.transports.folder import FolderTransport

        if set(keys) != {"path"}:
            raise RecipeError(f"transport folder takes one key, path; found {', '.join(keys) or 'none'}")
        return FolderTransport(Path(str(keys["path"])))
    if kind != "mqtt":
        raise RecipeError(seam.unknown("transport", kind, TRANSPORTS))
    from edgeopt_agent.transports.mqtt import MqttTransport
    from edgeopt_agent.web import WebBlobs

    identity = Identity(config.tenant, config.device, uuid.uuid4().hex, __version__)
    options = mqtt_options(config)
    blobs = WebBlobs(options.blobs, options.blobs_ca, insecure=options.insecure) if options.blobs else None
    return MqttTransport(options, identity, inbox, blobs)


def mqtt_options(config: AgentConfig) -> MqttOptions:
    """Read the keys of an MQTT transport.

    Raises:
        RecipeError: An unknown key, or one that is missing.
    """
    from edgeopt_agent.transports.mqtt import MqttOptions

    keys = {key: value for key, value in config.transport.items() if key != "kind"}
    known = {entry.name for entry in dataclasses.fields(MqttOptions)}
    for key in keys:
        if key not in known:
            raise RecipeError(f"transport: {seam.unknown('key', key, known)}")
    try:
        return from_json(MqttOptions, keys, "transport")
    except DocumentError as error:
        raise RecipeError(str(error)) from error
