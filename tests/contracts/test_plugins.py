# SPDX-License-Identifier: Apache-2.0
"""Every plug-in has what its folder's docstring promises. Plug-ins are found, never listed: a new file is tested too."""

import dataclasses
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from types import ModuleType

import click
import pytest

from edgeopt_agent import runtimes, transports
from edgeopt_converters import path as converters
from edgeopt_profiles.operators import Operator
from edgeopt_profiles.profile import DeviceProfile, load_profile, profile_ids
from edgeopt_profiles.support import Placement
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError, UnsupportedError

FORMATS = {"torch", "onnx", "litert", "executorch"}
RUNTIMES = seam.names("edgeopt_agent.runtimes")
TRANSPORTS = seam.names("edgeopt_agent.transports")
CONVERTERS = converters.names()
PASSES = seam.names("edgeopt.passes")
SOURCES = seam.names("edgeopt.sources")
SUPPORT = seam.names("edgeopt_profiles.support")
COMMANDS = seam.names("edgeopt.cli")
TASKS = seam.names("edgeopt.evaluate.tasks")
COVERAGE = seam.names("edgeopt.coverage")
EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("edgeopt_agent.runtimes", RUNTIMES),
        ("edgeopt_agent.transports", TRANSPORTS),
        ("edgeopt_converters", CONVERTERS),
        ("edgeopt.passes", PASSES),
        ("edgeopt.sources", SOURCES),
        ("edgeopt_profiles.support", SUPPORT),
        ("edgeopt.cli", COMMANDS),
        ("edgeopt.evaluate.tasks", TASKS),
        ("edgeopt.coverage", COVERAGE),
    ],
)
def test_every_folder_has_plug_ins_with_a_docstring_and_refuses_unknown_names(
    package: str, names: tuple[str, ...]
) -> None:
    assert len(names) >= 2
    for name in names:
        assert (seam.load(package, name).__doc__ or "").strip(), name
    with pytest.raises(RecipeError, match=re.escape(names[0])):
        seam.load(package, "no-such-plug-in")


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_says_its_version_and_accelerators_and_loads(name: str) -> None:
    runtime = runtimes.find(name)
    assert parameters(runtime.load) == ["file", "variant"]
    try:
        version, accelerators = runtime.version(), runtime.accelerators()
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    assert re.match(r"\d+", version)
    assert accelerators[0] == "cpu"
    assert len(set(accelerators)) == len(accelerators)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_transport_module_offers_one_transport_with_every_method(name: str) -> None:
    module = seam.load("edgeopt_agent.transports", name)
    promised = [method for method in vars(transports.Transport) if not method.startswith("_")]
    assert promised
    found = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and hasattr(cls, "fetch")
    ]
    assert len(found) == 1
    for method in promised:
        assert parameters(getattr(found[0], method)) == parameters(getattr(transports.Transport, method)), (
            method
        )


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_converter_says_from_what_to_what_at_which_cost(name: str) -> None:
    module = seam.load("edgeopt_converters", name)
    assert name == f"{module.SOURCE}_to_{module.TARGET}"
    assert {module.SOURCE, module.TARGET} <= FORMATS
    assert module.COST > 0
    assert module.EXTRA in EXTRAS
    assert all(isinstance(needed, str) for needed in module.MODULES)
    assert next(iter(parameters(module.convert))) == "model"


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_verb_with_an_object_and_says_what_it_takes(name: str) -> None:
    module = seam.load("edgeopt.passes", name)
    assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", name)
    assert isinstance(module.FORMATS, tuple)
    assert set(module.FORMATS) <= FORMATS
    assert module.FORMATS
    assert module.EXTRA in EXTRAS
    assert parameters(module.apply) == ["model", "order"]
    options = getattr(module, "Options", None)
    if options is not None:
        assert dataclasses.fields(options)
        options()  # every option has a default
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options(), dataclasses.fields(options)[0].name, None)
    if hasattr(module, "walks"):
        assert parameters(module.walks) == ["order", "available"]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_scores_outputs_with_options_of_its_own(name: str) -> None:
    module = seam.load("edgeopt.evaluate.tasks", name)
    assert dataclasses.is_dataclass(module.Options)
    assert parameters(module.score) == ["outputs", "baseline", "options"]


def test_every_runtime_that_a_host_builds_for_tells_what_it_made_of_a_file() -> None:
    assert set(COVERAGE) <= set(RUNTIMES)
    for name in COVERAGE:
        assert next(iter(parameters(seam.load("edgeopt.coverage", name).read))) == "file"


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_takes_what_it_knows_and_nothing_else(name: str) -> None:
    module = seam.load("edgeopt.sources", name)
    assert parameters(module.load) == ["spec", "recipe"]
    for spec in ("", "nonsense", "/no/such/folder/"):
        assert module.matches(spec) is False


def test_no_two_sources_take_the_same_thing() -> None:
    modules: list[ModuleType] = [seam.load("edgeopt.sources", name) for name in SOURCES]
    for spec in ("model.onnx", "model.pt2", "package.module:factory", "file.py:factory"):
        assert sum(module.matches(spec) for module in modules) == 1, spec


@pytest.mark.parametrize("name", SUPPORT)
def test_rules_place_every_operator_once(name: str) -> None:
    rules = seam.load("edgeopt_profiles.support", name)
    operator = Operator("odd_one", "NoSuchOperator", (), (), 0, 0, "float32")
    placement = rules.place((operator,))
    assert isinstance(placement, Placement)
    assert [*placement.on_accelerator, *(left.name for left in placement.left_out)] == ["odd_one"]
    assert all(left.reason for left in placement.left_out)
    assert rules.place(()) == Placement((), ())


@pytest.mark.parametrize("profile_id", profile_ids())
def test_a_profile_loads_and_asks_only_for_what_exists(profile_id: str) -> None:
    profile = load_profile(profile_id)
    assert isinstance(profile, DeviceProfile)
    assert profile.targets
    assert {target.format for target in profile.targets} <= FORMATS - {"torch"}
    assert profile_id == profile.id


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_all_below_it_say_what_they_do(name: str) -> None:
    command = importlib.import_module(f"edgeopt.cli.{name}").command
    assert isinstance(command, click.Command)
    for found in _with_children(command):
        assert (found.help or "").strip(), found.name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_explained(name: str) -> None:
    command = importlib.import_module(f"edgeopt.cli.{name}").command
    silent = [
        f"{found.name} --{option.name}"
        for found in _with_children(command)
        for option in found.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert silent == []


def _with_children(command: click.Command) -> list[click.Command]:
    children = command.commands.values() if isinstance(command, click.Group) else ()
    return [command, *(found for child in children for found in _with_children(child))]
