# SPDX-License-Identifier: Apache-2.0
"""`edgeopt devices` answers people and programs."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgeopt.cli.devices import command
from edgeopt_profiles.profile import profile_ids
from edgeopt_wire.errors import RecipeError


def test_every_device_is_listed() -> None:
    document = json.loads(CliRunner().invoke(command, ["--json"]).output)

    assert document["schema"] == "edgeopt.devices/1"
    assert [entry["id"] for entry in document["devices"]] == list(profile_ids())


def test_list_for_people_names_every_device() -> None:
    result = CliRunner().invoke(command, [])

    assert result.exit_code == 0
    assert all(name in result.output for name in profile_ids())


@pytest.mark.parametrize("arguments", [["show", "coral-usb", "--json"], ["--json", "show", "coral-usb"]])
def test_json_may_stand_on_either_side(arguments: list[str]) -> None:
    document = json.loads(CliRunner().invoke(command, arguments).output)

    assert document["schema"] == "edgeopt.device-profile/1"
    assert document["schemes"]["edgetpu"]["io"] == "int8"
    assert document["accelerators"][0]["on_chip_bytes"] == 8_000_000


@pytest.mark.parametrize("profile_id", profile_ids())
def test_device_is_shown_with_its_sources(profile_id: str) -> None:
    result = CliRunner().invoke(command, ["show", profile_id])

    assert result.exit_code == 0, result.output
    assert "source" in result.output


def test_unknown_device_is_refused_with_the_nearest() -> None:
    result = CliRunner().invoke(command, ["show", "coral"])

    assert isinstance(result.exception, RecipeError)
    assert "coral-usb" in str(result.exception)
