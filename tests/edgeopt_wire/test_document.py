# SPDX-License-Identifier: Apache-2.0
"""Values to canonical bytes and back; whatever is hostile or wrong ends in a DocumentError that says where."""

import contextlib
import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt_wire.document import MAX_DEPTH, canonical_bytes, from_bytes, from_json, parse_json, to_bytes
from edgeopt_wire.errors import DocumentError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    count: int
    ratio: float = 1.0


@dataclass(frozen=True)
class Sample:
    SCHEMA = "test.sample/1"

    name: str
    flag: bool
    colour: Colour
    at: datetime
    inners: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (0, "")
    maybe: float | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


GOOD = {
    "schema": "test.sample/1",
    "name": "a",
    "flag": True,
    "colour": "red",
    "at": "2026-01-02T03:04:05Z",
    "inners": [{"count": 1}],
}
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
INNERS = st.builds(Inner, st.integers(), st.floats(allow_nan=False, allow_infinity=False))
SAMPLES = st.builds(
    Sample,
    WORDS,
    st.booleans(),
    st.sampled_from(Colour),
    st.datetimes(datetime(1000, 1, 1), timezones=st.just(UTC)).map(lambda at: at.replace(microsecond=0)),  # noqa: DTZ001
    st.lists(INNERS, max_size=3).map(tuple),
    st.tuples(st.integers(), WORDS),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.dictionaries(WORDS, WORDS, max_size=3),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=20,
)


@given(SAMPLES)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_value_comes_back_equal_and_writes_the_same_bytes_again(sample: Sample) -> None:
    raw = to_bytes(sample)
    again = from_bytes(Sample, raw)
    assert again == sample
    assert to_bytes(again) == raw


@given(st.dictionaries(st.sampled_from([*GOOD, "pair", "maybe", "options", "new"]), JSON))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_json_object_gives_a_value_or_a_document_error(changes: dict[str, Any]) -> None:
    raw = json.dumps({**GOOD, **changes}).encode()
    try:
        sample = from_bytes(Sample, raw)
    except DocumentError:
        return
    assert from_bytes(Sample, to_bytes(sample)) == sample


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_bytes_give_a_document_error_or_an_object(raw: bytes) -> None:
    with contextlib.suppress(DocumentError):
        assert isinstance(parse_json(raw), dict)


def test_canonical_bytes_do_not_depend_on_the_order_of_keys() -> None:
    assert canonical_bytes({"b": [1, 2], "a": "é"}) == '{"a":"é","b":[1,2]}'.encode()
    assert canonical_bytes({"a": 1, "b": 2}) == canonical_bytes({"b": 2, "a": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, {1, 2}, b"raw", "\ud800"])
def test_what_json_cannot_say_is_not_written(value: object) -> None:
    with pytest.raises(DocumentError, match="canonical JSON"):
        canonical_bytes({"a": value})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a":1,"b":2,"a":1}', "'a' stands twice"),
        (b'{"x":{"deep":1,"deep":2}}', "'deep' stands twice"),
        (b'{"a":NaN}', "NaN is not a number"),
        (b'{"a":-Infinity}', "-Infinity is not a number"),
        (b'{"a":1e999}', "1e999 is not a number"),
        (b"[1]", "expected a JSON object, found list"),
        (b"", "not JSON"),
        (b'{"a":1} x', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_hostile_json_is_refused_with_its_reason(raw: bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        parse_json(raw, "thing")


@pytest.mark.parametrize("levels", [MAX_DEPTH, 1000, 100_000])
def test_deep_nesting_is_refused_before_it_exhausts_the_stack(levels: int) -> None:
    with pytest.raises(DocumentError):
        parse_json(b'{"a":' + b"[" * levels + b"]" * levels + b"}")


def test_nesting_up_to_the_limit_is_read() -> None:
    levels = MAX_DEPTH - 2
    assert parse_json(b'{"a":' + b"[" * levels + b"]" * levels + b"}")


def test_a_duplicate_among_very_many_keys_is_found_at_once() -> None:
    keys = ",".join(f'"k{i}":1' for i in range(100_000))
    with pytest.raises(DocumentError, match="'k0' stands twice"):
        parse_json(f'{{{keys},"k0":2}}'.encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, r"Sample\.name: expected str, found int"),
        ({"flag": 1}, r"Sample\.flag: expected bool, found int"),
        ({"colour": "green"}, r"Sample\.colour: 'green' is none of red, blue"),
        ({"colour": []}, r"Sample\.colour: \[\] is none of"),
        ({"at": 12}, r"Sample\.at: expected a moment, found int"),
        ({"at": "yesterday"}, r"Sample\.at: expected a moment like"),
        ({"at": "2026-01-02T03:04:05+01:00"}, r"Sample\.at: expected a moment like"),
        ({"inners": {}}, r"Sample\.inners: expected a list, found dict"),
        ({"inners": [1]}, r"Sample\.inners\[0\]: expected an object, found int"),
        ({"inners": [{}]}, r"Sample\.inners\[0\]: the field 'count' is missing"),
        ({"inners": [{"count": True}]}, r"Sample\.inners\[0\]\.count: expected int, found bool"),
        ({"inners": [{"count": 1.0}]}, r"Sample\.inners\[0\]\.count: expected int, found float"),
        (
            {"inners": [{"count": 1, "ratio": 10**400}]},
            r"Sample\.inners\[0\]\.ratio: the number is too large",
        ),
        ({"pair": [1]}, r"Sample\.pair: expected 2 entries, found 1"),
        ({"maybe": "x"}, r"Sample\.maybe: expected float, found str"),
        ({"options": {"k": 1}}, r"Sample\.options\.k: expected str, found int"),
        ({"options": []}, r"Sample\.options: expected an object, found list"),
        ({"schema": "test.sample/2"}, "expected schema 'test.sample/1', found 'test.sample/2'"),
        ({"schema": None}, "expected schema 'test.sample/1', found None"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected_and_found(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DocumentError, match=message):
        from_json(Sample, {**GOOD, **changes})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(DocumentError, match="Sample: the field 'name' is missing"):
        from_json(Sample, {key: value for key, value in GOOD.items() if key != "name"})


def test_a_whole_number_is_taken_for_a_float() -> None:
    sample = from_json(Sample, {**GOOD, "maybe": 3})
    assert sample.maybe == 3.0
    assert isinstance(sample.maybe, float)


def test_unknown_fields_are_kept_and_written_again() -> None:
    raw = canonical_bytes({**GOOD, "from_the_future": {"x": [1]}})
    sample = from_bytes(Sample, raw)
    assert sample.extra == {"from_the_future": {"x": [1]}}
    assert json.loads(to_bytes(sample))["from_the_future"] == {"x": [1]}


def test_a_field_called_extra_from_the_outside_stays_one_field_among_others() -> None:
    sample = from_json(Sample, {**GOOD, "extra": {"name": "other"}})
    assert sample.name == "a"
    assert from_bytes(Sample, to_bytes(sample)) == sample


def test_a_moment_is_written_in_utc_and_needs_a_zone() -> None:
    east = timezone(timedelta(hours=2))
    at = datetime(2026, 5, 1, 1, 0, tzinfo=east)
    assert b'"2026-04-30T23:00:00Z"' in to_bytes(Sample("a", True, Colour.RED, at))
    with pytest.raises(DocumentError, match="no time zone"):
        to_bytes(Sample("a", True, Colour.RED, datetime(2026, 5, 1)))  # noqa: DTZ001
