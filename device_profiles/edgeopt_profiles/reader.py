# SPDX-License-Identifier: Apache-2.0
"""Reads `data/*.toml` into profiles, and says which file and which line of it is wrong.

Rules:
- A file is checked against `data/profile.schema.json` before it is believed; an unknown key is an error.
- Schemes that several devices share stand in `data/_schemes.toml`; a device may add its own, never redefine one.
- `extends = "<id>"` takes over every table that a file does not write itself. A family takes what it does not write
  from its default module. Neither goes further than one step.
"""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeopt_profiles.profile import Accelerator, Cpu, DeviceProfile, PowerMode, Scheme, Source, Target
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

DATA = Path(__file__).parent / "data"
_OWN = ("id", "title", "device_classes", "modules", "default_module", "extends")
"""What no other file can give: it names the device itself."""


def ids(folder: Path = DATA) -> tuple[str, ...]:
    """List the devices that have a file, sorted."""
    return tuple(sorted(file.stem for file in folder.glob("*.toml") if not file.name.startswith("_")))


@functools.cache
def read(profile_id: str, folder: Path = DATA) -> DeviceProfile:
    """Read one profile.

    Raises:
        RecipeError: The file, or one that it takes over, is not a correct profile.
    """
    file = folder / f"{profile_id}.toml"
    document = _document(profile_id, folder)
    if document["id"] != profile_id:
        raise RecipeError(f"{file}: the id must be the file's name, {profile_id!r}, found {document['id']!r}")
    try:
        return _profile(document, _schemes(document, folder))
    except KeyError as error:
        raise RecipeError(
            f"{file}: {error.args[0]!r} is missing, here and in what the file takes over"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{file}: {error}") from error


def shared_schemes(folder: Path = DATA) -> dict[str, Scheme]:
    """Read the schemes that any device can name.

    Raises:
        RecipeError: The file cannot be read.
    """
    return {name: Scheme(**entry) for name, entry in _toml(folder / "_schemes.toml").items()}


def _document(profile_id: str, folder: Path) -> dict[str, Any]:
    own = _load(profile_id, folder)
    base: dict[str, Any] = {}
    taken_over = own.get("extends") or own.get("default_module")
    if taken_over:
        if taken_over not in ids(folder):
            raise RecipeError(
                f"{folder / profile_id}.toml: {seam.unknown('device', taken_over, ids(folder))}"
            )
        base = _load(taken_over, folder)
    merged = {key: value for key, value in base.items() if key not in _OWN} | own
    merged["sources"] = [*base.get("sources", ()), *own.get("sources", ())]
    return merged


def _load(profile_id: str, folder: Path) -> dict[str, Any]:
    file = folder / f"{profile_id}.toml"
    document = _toml(file)
    _check(document, file)
    return document


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read {file}: {error}") from error


def _check(document: Mapping[str, Any], file: Path) -> None:
    import jsonschema

    errors = sorted(
        _validator(jsonschema.Draft202012Validator).iter_errors(document), key=lambda error: error.json_path
    )
    if errors:
        rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise RecipeError(f"{file}: {errors[0].json_path.removeprefix('$.')}: {errors[0].message}{rest}")


@functools.cache
def _validator(kind: Any) -> Any:
    return kind(json.loads((DATA / "profile.schema.json").read_text(encoding="utf-8")))


def _schemes(document: Mapping[str, Any], folder: Path) -> dict[str, Scheme]:
    """The schemes that the device's targets name."""
    shared = shared_schemes(folder)
    own = {name: Scheme(**entry) for name, entry in document.get("schemes", {}).items()}
    twice = sorted(set(shared) & set(own))
    if twice:
        raise ValueError(f"scheme {twice[0]!r} is already in _schemes.toml; give yours another name")
    known = {**shared, **own}
    used = sorted({target["scheme"] for target in document["targets"] if "scheme" in target})
    for name in used:
        if name not in known:
            raise ValueError(seam.unknown("scheme", name, known))
    return {name: known[name] for name in used}


def _profile(document: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> DeviceProfile:
    cpu = document["cpu"]
    return DeviceProfile(
        id=document["id"],
        title=document["title"],
        family=document["family"],
        architectures=tuple(document["architectures"]),
        cpu=Cpu(cpu["name"], cpu.get("cores"), tuple(cpu.get("isa", ())), cpu.get("max_mhz")),
        memory_mib=document.get("memory_mib"),
        memory_bandwidth_gbps=document.get("memory_bandwidth_gbps"),
        accelerators=tuple(Accelerator(**entry) for entry in document.get("accelerators", ())),
        targets=tuple(
            Target(**{**entry, "threads": tuple(entry["threads"])}) for entry in document["targets"]
        ),
        schemes=schemes,
        device_classes=tuple(document.get("device_classes", (document["id"],))),
        modules=tuple(document.get("modules", ())),
        default_module=document.get("default_module", ""),
        power_modes=tuple(PowerMode(**entry) for entry in document.get("power_modes", ())),
        sources=tuple(Source(**entry) for entry in document["sources"]),
    )
