# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses to canonical JSON and back, without a schema library.

Rules:
- Canonical bytes: UTF-8, keys sorted, no spaces, no NaN or infinity. Equal values have equal bytes.
- A top-level document has a `SCHEMA` such as `edgeopt.manifest/1`; another name or a newer major version is refused.
- Unknown fields are kept in `extra` where the class has it, so that an older reader can pass a newer document on.
- A field with a default may be absent; a wrong type, a missing field or a duplicate key is a `DocumentError` that
  names the path.

Why not pydantic or msgspec? The device side imports this on every start and must not need a compiled wheel.
"""

import collections
import dataclasses
import enum
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NoReturn, TypeVar

from edgeopt_wire.errors import DocumentError

T = TypeVar("T")

MAX_DEPTH = 64
"""Deeper JSON than any document of ours; the parser stops there instead of exhausting the stack."""


def canonical_bytes(value: object) -> bytes:
    """Serialize JSON-like data to its one canonical form.

    Raises:
        DocumentError: The value holds NaN, infinity or something that JSON cannot say.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise DocumentError(f"cannot be written as canonical JSON: {error}") from error


def parse_json(raw: bytes, what: str = "document") -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys, NaN and nesting deeper than `MAX_DEPTH`.

    Raises:
        DocumentError: Not UTF-8, not JSON, not an object, or one of the above.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            raise DocumentError(f"{what}: the key {counts.most_common(1)[0][0]!r} stands twice")
        return found

    def refuse(token: str) -> NoReturn:
        raise DocumentError(f"{what}: {token[:40]} is not a number that can be kept")

    def finite(token: str) -> float:
        number = float(token)
        return number if math.isfinite(number) else refuse(token)

    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=refuse
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise DocumentError(f"{what}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DocumentError(f"{what}: expected a JSON object, found {type(value).__name__}")
    _check_depth(value, what)
    return value


def to_json(value: Any) -> Any:
    """Turn a value (dataclass, tuple, enum, aware datetime, ...) into JSON-like data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            if field.name != "extra":
                found[field.name] = to_json(getattr(value, field.name))
        found.update(to_json(dict(getattr(value, "extra", {}))))
        schema = getattr(value, "SCHEMA", None)
        if schema:
            found["schema"] = schema
        return found
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, datetime):
        return format_moment(value)
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return value


def to_bytes(value: Any) -> bytes:
    """Serialize a dataclass document to its canonical bytes."""
    return canonical_bytes(to_json(value))


def from_bytes(cls: type[T], raw: bytes) -> T:
    """Read a document of class `cls` from bytes.

    Raises:
        DocumentError: The bytes are not such a document; the message names the field.
    """
    return from_json(cls, parse_json(raw, cls.__name__))


def from_json(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Read a dataclass from JSON-like data, checking every type on the way.

    Raises:
        DocumentError: A field is missing, has the wrong type, or the class itself refuses the values.
    """
    where = path or cls.__name__
    if not isinstance(data, Mapping):
        raise DocumentError(f"{where}: expected an object, found {type(data).__name__}")
    data = dict(data)
    schema = getattr(cls, "SCHEMA", None)
    if schema is not None:
        _check_schema(where, schema, data.pop("schema", None))
    hints = _hints(cls)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast("Any", cls)):
        if field.name == "extra":
            continue
        if field.name in data:
            values[field.name] = _read(hints[field.name], data.pop(field.name), f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DocumentError(f"{where}: the field {field.name!r} is missing")
    if data and "extra" in hints:
        values["extra"] = data
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise DocumentError(f"{where}: {error}") from error


def format_moment(moment: datetime) -> str:
    """Write an aware moment as UTC with whole seconds, e.g. `2026-11-23T08:15:00Z`."""
    if moment.tzinfo is None:
        raise DocumentError(f"{moment!r} has no time zone")
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_moment(text: str, path: str = "moment") -> datetime:
    """Read what `format_moment` wrote.

    Raises:
        DocumentError: Another form.
    """
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise DocumentError(f"{path}: expected a moment like 2026-11-23T08:15:00Z, found {text!r}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _check_schema(where: str, expected: str, found: object) -> None:
    if found != expected:
        raise DocumentError(
            f"{where}: expected schema {expected!r}, found {found!r}; "
            "it was written by another version of edgeopt, or is another kind of document"
        )


def _check_depth(value: object, what: str) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise DocumentError(f"{what}: nested deeper than {MAX_DEPTH} levels")


def _read(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        rest = [option for option in options if option is not type(None)]
        return _read(rest[0], value, path)
    if origin is tuple:
        return _read_tuple(hint, value, path)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise DocumentError(f"{path}: expected an object, found {type(value).__name__}")
        item = typing.get_args(hint)[1]
        return {key: _read(item, entry, f"{path}.{key}") for key, entry in value.items()}
    return _read_scalar(hint, value, path)


def _read_tuple(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise DocumentError(f"{path}: expected a list, found {type(value).__name__}")
    args = typing.get_args(hint)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_read(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if len(args) != len(value):
        raise DocumentError(f"{path}: expected {len(args)} entries, found {len(value)}")
    pairs = zip(args, value, strict=True)
    return tuple(_read(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(pairs))


def _read_scalar(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast("type", hint), value, path)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError as error:
            known = ", ".join(str(member.value) for member in hint)
            raise DocumentError(f"{path}: {value!r} is none of {known}") from error
    if hint is datetime:
        if not isinstance(value, str):
            raise DocumentError(f"{path}: expected a moment, found {type(value).__name__}")
        return parse_moment(value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value, path)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise DocumentError(f"{path}: expected {hint.__name__}, found {type(value).__name__}")
    if hint is float and not math.isfinite(value):
        raise DocumentError(f"{path}: {value} is not finite")
    return value


def _as_float(value: int, path: str) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise DocumentError(f"{path}: the number is too large for a float") from error
