# SPDX-License-Identifier: Apache-2.0
"""Version 1 of every document is frozen: what is written today is what a device in the field was built to read."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from edgeopt_wire import enrolment, index, manifest, measurement, messages
from edgeopt_wire.document import from_bytes, to_bytes

GOLDEN = Path(__file__).parents[1] / "golden"


def _values() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("make_v1", GOLDEN / "make_v1.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.VALUES)


VALUES = _values()
NAMES = sorted(VALUES)


@pytest.mark.parametrize("name", NAMES)
def test_writing_gives_the_frozen_bytes(name: str) -> None:
    assert to_bytes(VALUES[name]) == (GOLDEN / "v1" / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_reading_the_frozen_bytes_gives_the_value(name: str) -> None:
    assert from_bytes(type(VALUES[name]), (GOLDEN / "v1" / f"{name}.json").read_bytes()) == VALUES[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_field_of_a_newer_writer_harms_no_reader_and_survives_where_it_is_passed_on(name: str) -> None:
    data = json.loads((GOLDEN / "v1" / f"{name}.json").read_bytes())
    value = from_bytes(type(VALUES[name]), json.dumps({**data, "newer": {"a": [1]}}).encode())
    if hasattr(value, "extra"):
        assert value.extra["newer"] == {"a": [1]}
        assert json.loads(to_bytes(value)) == {**data, "newer": {"a": [1]}}
    else:
        assert value == VALUES[name]


def test_every_document_with_a_schema_of_version_1_is_frozen() -> None:
    documents = {
        found.SCHEMA
        for module in (enrolment, index, manifest, measurement, messages)
        for found in vars(module).values()
        if isinstance(found, type) and hasattr(found, "SCHEMA")
    }
    assert documents == {value.SCHEMA for value in VALUES.values()}
    assert {path.stem for path in (GOLDEN / "v1").glob("*.json")} == set(VALUES)
