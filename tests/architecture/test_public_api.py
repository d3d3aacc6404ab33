# SPDX-License-Identifier: Apache-2.0
"""What `import edgeopt` promises: every name exists, is documented and annotated; a new name is a decision."""

import inspect
import tomllib
from pathlib import Path

import pytest

import edgeopt

ROOT = Path(__file__).parents[2]
NAMES = [
    "Budget", "BuildOutcome", "BuildRequest", "Cache", "Calibration", "Manifest", "Measurement", "Progress", "Recipe",
    "TorchModel", "__version__", "build", "load_recipe", "measure", "plan_build",
]  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert sorted(edgeopt.__all__) == sorted(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("_")])
def test_a_public_name_is_documented_and_typed(name: str) -> None:
    found = getattr(edgeopt, name)
    assert inspect.getdoc(found)
    assert not (inspect.getdoc(found) or "").startswith(f"{name}("), "a generated docstring"
    if inspect.isfunction(found):
        signature = inspect.signature(found)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
        positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert len(positional) <= 3, "what is optional is named by its caller"


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(getattr(edgeopt, name))])
def test_public_values_are_frozen(name: str) -> None:
    found = getattr(edgeopt, name)
    if hasattr(found, "__dataclass_params__"):
        assert found.__dataclass_params__.frozen


def test_both_distributions_and_the_code_agree_on_the_version() -> None:
    sdk = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    agent = tomllib.loads((ROOT / "agent" / "pyproject.toml").read_text())["project"]
    assert sdk["version"] == agent["version"] == edgeopt.__version__
    assert f"edgeopt-agent=={edgeopt.__version__}" in sdk["dependencies"]


def test_every_tool_is_pinned_for_a_repeatable_environment() -> None:
    """What the project asks for stands in constraints.txt at a version that satisfies it."""
    import re

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    sdk = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    agent = tomllib.loads((ROOT / "agent" / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(
        re.split("==", line.split(";")[0].strip()) for line in lines if "==" in line and line[0] != "#"
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    asked = [*sdk["dependencies"], *agent["dependencies"]]
    for extra in sdk["optional-dependencies"].values():
        asked += extra
    for text in asked:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if not name.startswith("edgeopt"):
            assert name in pins, f"{text} has no line in constraints.txt"
            assert requirement.specifier.contains(pins[name].split("+")[0], prereleases=True), text
