# SPDX-License-Identifier: Apache-2.0
"""Every profile that ships can be trusted and planned for, unlisted; a wrong one is refused by name and place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgeopt.plan import make_plan
from edgeopt.recipe import Recipe
from edgeopt_agent import runtimes
from edgeopt_profiles import reader
from edgeopt_profiles.profile import HOST, Target, load_profile, profile_ids
from edgeopt_wire.errors import RecipeError

EVERY = pytest.mark.parametrize("profile_id", profile_ids())
BOARD = """
schema = "edgeopt.device/1"
id = "board"
title = "A board"
family = "linux-arm"
architectures = ["aarch64"]

[cpu]
name = "4x Cortex-A55"

[[targets]]
runtime = "onnxruntime"
format = "onnx"
precision = "int8"
threads = [1]
scheme = "s8s8"

[[sources]]
what = "cpu"
where = "datasheet, page 3"
confidence = "vendor"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of profiles that holds one board."""
    shutil.copyfile(reader.DATA / "_schemes.toml", tmp_path / "_schemes.toml")
    (tmp_path / "board.toml").write_text(BOARD)
    return tmp_path


@EVERY
def test_profile_can_be_planned_for(profile_id: str) -> None:
    plan = make_plan(load_profile(profile_id), Recipe())

    assert plan.device.id == profile_id
    assert [candidate for candidate in plan.candidates if not candidate.reference]


@EVERY
def test_profile_names_only_runtimes_that_the_agent_has(profile_id: str) -> None:
    for target in load_profile(profile_id).targets:
        assert target.runtime in runtimes.names()


@EVERY
def test_profile_has_sources_and_no_zero_for_unknown(profile_id: str) -> None:
    profile = load_profile(profile_id)

    assert profile.sources
    for figure in (profile.cpu.cores, profile.cpu.max_mhz, profile.memory_mib, profile.memory_bandwidth_gbps):
        assert figure is None or figure > 0


@EVERY
def test_every_class_that_a_package_fits_exists_and_shares_an_architecture(profile_id: str) -> None:
    profile = load_profile(profile_id)

    for name in set(profile.device_classes) - {HOST}:
        assert set(load_profile(name).architectures) & set(profile.architectures), name


@EVERY
def test_threads_never_exceed_the_cores(profile_id: str) -> None:
    profile = load_profile(profile_id)

    assert profile.cpu.cores is None or max(profile.threads) <= profile.cpu.cores


def test_one_power_mode_at_most_is_the_default() -> None:
    for profile_id in profile_ids():
        assert sum(mode.is_default for mode in load_profile(profile_id).power_modes) <= 1


def test_family_has_the_figures_of_its_default_module_and_fits_all_modules() -> None:
    family, module = load_profile("jetson-orin"), load_profile("jetson-orin-nano")

    assert family.default_module == "jetson-orin-nano"
    assert (family.cpu, family.memory_mib, family.accelerators) == (
        module.cpu,
        module.memory_mib,
        module.accelerators,
    )
    assert set(family.modules) < set(family.device_classes)
    assert module.device_classes == ("jetson-orin-nano",)
    assert module.targets == family.targets


def test_tensorrt_gets_symmetric_activations_and_the_edge_tpu_integers_at_its_edges() -> None:
    assert load_profile("jetson-orin").schemes["tensorrt"].symmetric_activations
    assert load_profile("coral-usb").schemes["edgetpu"].io == "int8"
    assert load_profile("x86-64").schemes["u8s8-safe"].activation_dtype == "uint8"
    assert load_profile("raspberry-pi-4").schemes["s8s8"].activation_dtype == "int8"


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'raspberry-pi-4' or 'raspberry-pi-5'"):
        load_profile("rasberry-pi-4")


def test_new_device_needs_one_file(folder: Path) -> None:
    board = reader.read("board", folder)

    assert reader.ids(folder) == ("board",)
    assert board.device_classes == ("board",)
    assert board.cpu.cores is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "4x Cortex-A55"', 'nme = "4x"', r"board.toml: cpu: .*nme"),
        ('title = "A board"', 'title = "A board"\nmemory_mib = 0', r"memory_mib: 0"),
        ('scheme = "s8s8"', 'scheme = "s8s9"', r"unknown scheme 's8s9'; did you mean 's8s8'"),
        ('scheme = "s8s8"', 'scheme = "s8s8"\naccelerator = "npu"', r"unknown accelerator 'npu'"),
        ('scheme = "s8s8"', "", r"int8 needs a scheme"),
        ('precision = "int8"', 'precision = "int4"', r"targets\[0\].precision: 'int4'"),
        ('id = "board"', 'id = "other"', r"id must be the file's name, 'board', found 'other'"),
        ('family = "linux-arm"', "", r"'family' is missing"),
        ('[cpu]\nname = "4x Cortex-A55"', "", r"'cpu' is missing"),
        (
            'title = "A board"',
            'title = "A board"\nextends = "bord"',
            r"unknown device 'bord'; did you mean 'board'",
        ),
        ("[cpu]", "[cpu", r"cannot read .*board.toml"),
        ('title = "A board"', 'title = "A board"\ndevice_classes = ["x"]', r"add it to device_classes"),
    ],
)
def test_wrong_file_is_refused_with_its_name_and_place(
    folder: Path, old: str, new: str, message: str
) -> None:
    assert old in BOARD
    (folder / "board.toml").write_text(BOARD.replace(old, new, 1))

    with pytest.raises(RecipeError, match=message) as caught:
        reader.read("board", folder)
    assert "board.toml" in str(caught.value)


def test_shared_scheme_cannot_be_redefined(folder: Path) -> None:
    own = "[schemes.s8s8]\n" + BOARD_SCHEME
    (folder / "board.toml").write_text(BOARD + own)

    with pytest.raises(RecipeError, match=r"already in _schemes\.toml"):
        reader.read("board", folder)


def test_device_may_add_a_scheme_of_its_own(folder: Path) -> None:
    text = BOARD.replace('scheme = "s8s8"', 'scheme = "per-tensor"') + "[schemes.per-tensor]\n" + BOARD_SCHEME
    (folder / "board.toml").write_text(text)

    assert not reader.read("board", folder).schemes["per-tensor"].per_channel


BOARD_SCHEME = """
activation_dtype = "int8"
weight_dtype = "int8"
per_channel = false
symmetric_activations = false
"""


@pytest.mark.parametrize("threads", [(), (0,), (1, 1)])
def test_target_refuses_odd_threads(threads: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="threads must differ and be positive"):
        Target("onnxruntime", "onnx", "fp32", threads)
