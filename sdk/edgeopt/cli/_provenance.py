# SPDX-License-Identifier: Apache-2.0
"""A package's provenance for a person and for a machine; `inspect` and `verify` say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from edgeopt.provenance import Provenance


def describe(provenance: Provenance | None) -> dict[str, Any] | None:
    """The statement with who signed it, and which of these signatures were checked."""
    if provenance is None:
        return None
    return {
        "builder": provenance.builder,
        "signed_by": list(provenance.signed_by),
        "verified_by": list(provenance.verified),
        "statement": dict(provenance.statement),
    }


def say(provenance: Provenance | None) -> str:
    """Two or three lines."""
    if provenance is None:
        return "provenance: none"
    build = provenance.statement["predicate"]["buildDefinition"]
    if provenance.verified:
        signed = f"signed by the builder {provenance.verified[0][:12]}"
    elif provenance.signed_by:
        signed = f"says that {provenance.signed_by[0][:12]} signed it; check with `edgeopt verify --builder`"
    else:
        signed = "signed by nobody"
    inputs = [
        f"{entry['name']} {entry['digest']['sha256'][:12]}"
        for entry in build["resolvedDependencies"]
        if "digest" in entry
    ]
    tools = [
        unquote(entry["uri"].removeprefix("pkg:pypi/"))
        for entry in build["resolvedDependencies"]
        if "uri" in entry
    ]
    recipe = f"recipe {build['externalParameters']['recipe_sha256'][:12]}"
    return f"provenance: {signed}\n  from {', '.join([*inputs, recipe])}\n  with {', '.join(tools) or 'no known tool'}"
