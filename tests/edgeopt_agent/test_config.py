# SPDX-License-Identifier: Apache-2.0
"""A wrong configuration is refused with the key that is wrong."""

import json
import queue
from pathlib import Path
from typing import Any

import pytest

from edgeopt_agent.config import load_config, make_transport
from edgeopt_agent.transports.folder import FolderTransport
from edgeopt_agent.transports.mqtt import MqttTransport
from edgeopt_wire.errors import RecipeError

GOOD: dict[str, Any] = {
    "schema": "edgeopt.agent/1",
    "device": "d1",
    "device_class": "host",
    "state_dir": "/var/lib/edgeopt",
    "root": "/etc/edgeopt/root.json",
    "transport": {"kind": "mqtt", "host": "127.0.0.1", "port": 1883},
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "agent.json"
    kept = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path.write_text(json.dumps(kept))
    return path


def test_good_configuration_has_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    assert (config.tenant, config.stand_in) == ("default", False)
    assert config.socket_path == Path("/var/lib/edgeopt/agent.sock")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": None}, "device"),
        ({"device": "a/b"}, "device"),
        ({"tenant": "#"}, "tenant"),
        ({"stand_in": "yes"}, "stand_in"),
        ({"state_dri": "/x"}, "did you mean 'state_dir'"),
        ({"schema": "edgeopt.agent/2"}, "edgeopt.agent/2"),
        ({"schema": None}, "schema"),
    ],
)
def test_wrong_key_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_config(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("transport", "said"),
    [
        ({"kind": "mqqt"}, "did you mean 'mqtt'"),
        ({}, "Known: folder, mqtt"),
        ({"kind": "mqtt", "host": "127.0.0.1", "prot": 1}, "did you mean 'port'"),
        ({"kind": "mqtt", "port": 1883}, "host"),
        ({"kind": "mqtt", "host": "broker.example"}, "insecure"),
        ({"kind": "folder"}, "path"),
    ],
)
def test_wrong_transport_is_named(tmp_path: Path, transport: dict[str, Any], said: str) -> None:
    config = load_config(written(tmp_path, transport=transport))
    with pytest.raises(RecipeError, match=said):
        make_transport(config, queue.Queue())


def test_each_kind_makes_its_transport(tmp_path: Path) -> None:
    assert isinstance(make_transport(load_config(written(tmp_path)), queue.Queue()), MqttTransport)
    folder = load_config(written(tmp_path, transport={"kind": "folder", "path": "/media/stick"}))
    assert isinstance(make_transport(folder, queue.Queue()), FolderTransport)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"device": 1, "device": 2}'])
def test_file_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "agent.json").write_bytes(content)
    with pytest.raises(RecipeError, match=r"agent\.json"):
        load_config(tmp_path / "agent.json")


def test_missing_file_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="add-device"):
        load_config(tmp_path / "none.json")
