# SPDX-License-Identifier: Apache-2.0
"""Boards as files: what each says about itself, and what it cannot say."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from edgeopt_agent import conditions
from edgeopt_wire.measurement import Thermal

CPU = "sys/devices/system/cpu"
THERMAL = "sys/class/thermal"
PI_4 = {
    "proc/cpuinfo": (
        "processor\t: 0\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\n"
        "processor\t: 1\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"
    ),
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
    "proc/sys/kernel/osrelease": "6.6.31+rpt-rpi-v8\n",
    "proc/loadavg": "0.25 0.31 0.20 1/180 1234\n",
    f"{CPU}/cpu0/cpufreq/scaling_governor": "ondemand\n",
    f"{CPU}/cpu1/cpufreq/scaling_governor": "ondemand\n",
    f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "600000\n",
    f"{CPU}/cpu1/cpufreq/scaling_cur_freq": "1500000\n",
    f"{THERMAL}/thermal_zone0/temp": "48199\n",
}
ORIN = {
    "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin NX\0",
    "etc/nvpmodel.conf": "",
    "var/lib/nvpmodel/status": "pmode:0002",
    f"{THERMAL}/thermal_zone0/temp": "51500\n",
    f"{THERMAL}/thermal_zone1/temp": "-256000\n",
    f"{THERMAL}/thermal_zone2/temp": "62750\n",
    f"{THERMAL}/cooling_device0/type": "pwm-fan\n",
    f"{THERMAL}/cooling_device0/cur_state": "3\n",
    f"{THERMAL}/cooling_device1/type": "cpu-throttle-alert\n",
    f"{THERMAL}/cooling_device1/cur_state": "0\n",
    "sys/class/hwmon/hwmon2/oc1_event_cnt": "4\n",
}


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def silent(command: object) -> str:
    return ""


def test_raspberry_pi_names_its_core_board_and_governor(tmp_path: Path) -> None:
    board = conditions.read_board(write(tmp_path, PI_4), ask=silent, machine="aarch64")
    assert board.cpu == "Cortex-A72 (Raspberry Pi 4 Model B Rev 1.4)"
    assert board.governor == "ondemand"
    assert board.cores == 2
    assert board.os == "Debian GNU/Linux 12 (bookworm), Linux 6.6.31+rpt-rpi-v8"
    assert board.power_mode == ""


def test_raspberry_pi_reads_heat_frequency_and_load(tmp_path: Path) -> None:
    found = conditions.read_thermal(write(tmp_path, PI_4), ask=lambda command: "throttled=0x0\n")
    assert found == Thermal(temperature_c=48.199, throttled=False, frequency_khz=1_500_000, load_average=0.25)


@pytest.mark.parametrize(
    ("said", "throttled"),
    [
        ("throttled=0x0", False),
        ("throttled=0x50000", False),  # happened since boot, not now
        ("throttled=0x50005", True),
        ("throttled=0x8", True),
        ("", None),
        ("VCHI initialization failed", None),
    ],
)
def test_raspberry_pi_throttling_through_the_firmwares_tool(
    tmp_path: Path, said: str, throttled: bool | None
) -> None:
    assert conditions.read_thermal(write(tmp_path, PI_4), ask=lambda command: said).throttled is throttled


def test_raspberry_pi_throttling_through_sysfs_needs_no_tool(tmp_path: Path) -> None:
    write(tmp_path, {**PI_4, "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n"})
    assert conditions.read_thermal(tmp_path, ask=silent).throttled is True


def test_jetson_reads_its_power_mode_and_hottest_plausible_zone(tmp_path: Path) -> None:
    write(tmp_path, ORIN)
    board = conditions.read_board(tmp_path, ask=lambda command: "NV Power Mode: 15W\n2\n", machine="aarch64")
    assert board.power_mode == "15W (nvpmodel 2)"
    assert board.cpu == "Cortex-A78AE (NVIDIA Jetson Orin NX)"
    assert conditions.read_thermal(tmp_path, ask=silent).temperature_c == 62.75


def test_jetson_without_the_right_to_ask_falls_back_on_the_stored_mode(tmp_path: Path) -> None:
    assert conditions.read_board(write(tmp_path, ORIN), ask=silent).power_mode == "nvpmodel 2"


def test_jetson_fan_is_not_throttling_but_its_throttle_alert_is(tmp_path: Path) -> None:
    write(tmp_path, ORIN)
    assert conditions.read_thermal(tmp_path, ask=silent).throttled is False
    write(tmp_path, {f"{THERMAL}/cooling_device1/cur_state": "1\n"})
    assert conditions.read_thermal(tmp_path, ask=silent).throttled is True


def test_over_current_event_between_two_readings_is_throttling(tmp_path: Path) -> None:
    before = conditions.throttle_count(write(tmp_path, ORIN))
    assert before == 4
    assert conditions.read_thermal(tmp_path, ask=silent, throttle_count_before=before).throttled is False
    write(tmp_path, {"sys/class/hwmon/hwmon2/oc1_event_cnt": "5\n"})
    assert conditions.read_thermal(tmp_path, ask=silent, throttle_count_before=before).throttled is True


def test_x86_counter_alone_says_nothing_before_a_second_reading(tmp_path: Path) -> None:
    write(tmp_path, {f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "12\n"})
    assert conditions.read_thermal(tmp_path, ask=silent).throttled is None
    assert conditions.read_thermal(tmp_path, ask=silent, throttle_count_before=11).throttled is True


def test_x86_laptop_names_its_processor_profile_and_frequency(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/cpuinfo": "model name\t: AMD EPYC\ncpu MHz\t\t: 2596.144\n\nmodel name\t: AMD EPYC\ncpu MHz\t\t: 2600.0\n",
            "sys/firmware/acpi/platform_profile": "low-power\n",
        },
    )
    board = conditions.read_board(tmp_path, ask=silent, machine="x86_64")
    assert (board.cpu, board.power_mode, board.governor) == ("AMD EPYC", "low-power", "")
    assert conditions.read_thermal(tmp_path, ask=silent).frequency_khz == 2_600_000


def test_big_little_names_both_cores(tmp_path: Path) -> None:
    cores = [("0x41", "0xd05")] * 4 + [("0x41", "0xd0b")] * 4 + [("0x51", "0x802")]
    text = "".join(f"CPU implementer\t: {vendor}\nCPU part\t: {part}\n\n" for vendor, part in cores)
    board = conditions.read_board(write(tmp_path, {"proc/cpuinfo": text}), ask=silent)
    assert board.cpu == "Cortex-A55 + Cortex-A76 + Arm 0x51/0x802"


def test_board_that_says_nothing_gives_nothing(tmp_path: Path) -> None:
    board = conditions.read_board(tmp_path, ask=silent, machine="riscv64")
    assert (board.architecture, board.cpu, board.os, board.power_mode, board.governor) == (
        "riscv64",
        "",
        "",
        "",
        "",
    )
    assert board.cores >= 1
    assert conditions.read_thermal(tmp_path, ask=silent) == Thermal()
    assert conditions.throttle_count(tmp_path) is None


def test_garbage_in_every_file_is_as_good_as_nothing(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(PI_4.keys() | ORIN.keys(), "\x00\xff?"))
    assert conditions.read_thermal(tmp_path, ask=lambda command: "\x00") == Thermal()
    conditions.read_board(tmp_path, ask=lambda command: "\x00")


@pytest.mark.parametrize(
    ("machine", "pointer_bytes", "expected"),
    [("aarch64", 8, "aarch64"), ("aarch64", 4, "armv7l"), ("x86_64", 8, "x86_64"), ("armv7l", 4, "armv7l")],
)
def test_architecture_is_the_processs_not_the_kernels(
    machine: str, pointer_bytes: int, expected: str
) -> None:
    assert conditions.architecture(machine, pointer_bytes) == expected


def test_program_that_is_not_here_says_nothing() -> None:
    assert conditions.ask(["/no/such/vcgencmd", "get_throttled"]) == ""


def test_each_bad_condition_is_one_warning() -> None:
    board = conditions.Board("aarch64", "", 4, "", "", "ondemand")
    cool = Thermal(temperature_c=40.0, throttled=False, load_average=0.1)
    assert len(conditions.warnings(board, cool, cool)) == 1
    found = conditions.warnings(
        board, Thermal(temperature_c=40.0, load_average=4.5), Thermal(temperature_c=50.5, throttled=True)
    )
    assert [
        word for word in ("governor", "load average", "throttled", "warmed") if word in " ".join(found)
    ] == [
        "governor",
        "load average",
        "throttled",
        "warmed",
    ]


def test_good_or_unknown_conditions_give_no_warning() -> None:
    steady = Thermal(temperature_c=40.0, throttled=False, load_average=4.0)
    assert conditions.warnings(conditions.Board("", "", 4, "", "", "performance"), steady, steady) == ()
    assert conditions.warnings(conditions.Board("", "", 4, "", "", ""), Thermal(), Thermal()) == ()
