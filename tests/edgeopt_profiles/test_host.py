# SPDX-License-Identifier: Apache-2.0
"""The host is described as it is found, and offers only runtimes that are installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeopt_profiles import host
from edgeopt_profiles.profile import load_profile

PI_5 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes crc32 fphp asimdhp cpuid asimdrdm asimddp
CPU implementer\t: 0x41
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a recorded Raspberry Pi 5."""
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(PI_5)
    (tmp_path / "proc/meminfo").write_text("MemTotal:        8256592 kB\nMemFree: 1 kB\n")
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    clock = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    clock.mkdir(parents=True)
    (clock / "cpuinfo_max_freq").write_text("2400000\n")
    return tmp_path


def test_recorded_board_is_read(root: Path) -> None:
    found = host.detect(root)

    assert found.cpu.name == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.cpu.isa == ("asimd", "asimdhp", "asimddp")
    assert found.cpu.max_mhz == 2400
    assert found.memory_mib == 8063


def test_machine_that_tells_nothing_has_unknowns_and_no_zeros(tmp_path: Path) -> None:
    found = host.detect(tmp_path)

    assert (found.memory_mib, found.cpu.max_mhz, found.cpu.isa) == (None, None, ())
    assert found.cpu.name


def test_runtime_that_is_not_installed_is_no_target() -> None:
    found = host.detect(is_installed=lambda module: module == "onnxruntime")

    assert {target.runtime for target in found.targets} == {"onnxruntime"}
    assert "int8" not in found.schemes


def test_bare_machine_can_still_be_listed() -> None:
    assert host.detect(is_installed=lambda module: False).targets == ()


@pytest.mark.parametrize(
    ("machine", "scheme"), [("x86_64", "u8s8"), ("AMD64", "u8s8"), ("aarch64", "s8s8"), ("arm64", "s8s8")]
)
def test_activations_are_what_the_architecture_multiplies_fast(
    monkeypatch: pytest.MonkeyPatch, machine: str, scheme: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)

    found = host.detect(is_installed=lambda module: True)

    assert {scheme, f"{scheme}-safe"} & set(found.schemes)
    assert ("openvino" in {target.runtime for target in found.targets}) == (scheme == "u8s8")
    assert found.architectures == ({"u8s8": "x86_64", "s8s8": "aarch64"}[scheme],)


@pytest.mark.parametrize(("flags", "scheme"), [("avx2 avx512_vnni", "u8s8"), ("avx2 fma", "u8s8-safe")])
def test_a_cpu_that_saturates_gets_weights_that_cannot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, scheme: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"model name : CPU\nflags : {flags}\n")

    targets = host.detect(tmp_path, is_installed=lambda module: True).targets

    assert {target.scheme for target in targets if target.runtime == "onnxruntime"} == {scheme, ""}
    # int8 products of int8 overflow without VNNI, so that zero points stay what they are there
    wanted = {"u8s8": "u8s8-zero", "u8s8-safe": "u8s8-safe"}[scheme]
    assert {target.scheme for target in targets if target.runtime == "openvino"} == {wanted, ""}


def test_threads_are_one_two_and_all_cores_up_to_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert host.detect(is_installed=lambda module: True).threads == (1, 2, 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert host.detect(is_installed=lambda module: True).threads == (1,)


def test_host_is_this_machine() -> None:
    found = load_profile("host")

    assert found.cpu.cores == len(os.sched_getaffinity(0))
    assert found.device_classes == ("host",)
