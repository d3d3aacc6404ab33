# SPDX-License-Identifier: Apache-2.0
"""What a board says about itself while it is measured: CPU, governor, frequency, temperature, throttling, power mode.

Rules:
- What cannot be told is None or empty, never a default.
- Files are read below `root` and programs are asked through `ask`, so that a recorded board can be read anywhere.
- Reading never fails: a file that is absent, unreadable or odd says nothing.

Sources: kernel Documentation/admin-guide/pm/cpufreq.rst and driver-api/thermal/sysfs-api.rst; Raspberry Pi's
documentation of `vcgencmd get_throttled` (bits 0 to 3 hold now, 16 to 19 since boot); NVIDIA's Jetson Linux guide
(`nvpmodel -q`, over-current event counters in hwmon); Arm's MIDR part numbers as in the kernel's cputype.h.
"""

from __future__ import annotations

import os
import platform
import re
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeopt_wire.measurement import Thermal

ROOT = Path("/")
ASK_TIMEOUT_S = 2.0

TEMPERATURE_RISE_C = 10.0
"""A board that warms by more than this while measured has not reached its working temperature."""

_PI_THROTTLED_NOW = 0xF  # under-voltage, frequency capped, throttled, soft temperature limit
_PLAUSIBLE_C = (-40.0, 150.0)  # sensors that are off report 0 K, -274 or 200 and more
_THROTTLING_COOLERS = re.compile(r"thermal-cpufreq|cpufreq-cpu|throttl|thermal-devfreq", re.IGNORECASE)
_THROTTLE_COUNTERS = (
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",
    "sys/class/hwmon/hwmon*/oc*_event_cnt",
)
_ARM_PARTS = {
    "0x41": {
        "0xc07": "Cortex-A7",
        "0xd03": "Cortex-A53",
        "0xd04": "Cortex-A35",
        "0xd05": "Cortex-A55",
        "0xd07": "Cortex-A57",
        "0xd08": "Cortex-A72",
        "0xd09": "Cortex-A73",
        "0xd0a": "Cortex-A75",
        "0xd0b": "Cortex-A76",
        "0xd0c": "Neoverse-N1",
        "0xd40": "Neoverse-V1",
        "0xd42": "Cortex-A78AE",
    },
    "0x4e": {"0x003": "Denver 2", "0x004": "Carmel"},
}

Ask = Callable[[Sequence[str]], str]
"""Runs a program and returns what it printed; empty where it is not here or failed."""


@dataclass(frozen=True)
class Board:
    """What does not change while a variant is measured."""

    architecture: str
    cpu: str
    cores: int
    os: str
    power_mode: str
    governor: str


def ask(command: Sequence[str]) -> str:
    """Run a program of the board's vendor and return its output, or nothing."""
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout if found.returncode == 0 else ""


def architecture(machine: str | None = None, pointer_bytes: int | None = None) -> str:
    """Return the architecture of this process, e.g. `aarch64`: a 32-bit Python on a 64-bit kernel is `armv7l`."""
    machine = platform.machine() if machine is None else machine
    narrow = (struct.calcsize("P") if pointer_bytes is None else pointer_bytes) == 4
    return {"aarch64": "armv7l", "x86_64": "i686"}.get(machine, machine) if narrow else machine


def read_board(root: Path = ROOT, *, ask: Ask = ask, machine: str | None = None) -> Board:
    """Read what describes the board and its settings."""
    return Board(
        architecture=architecture(machine),
        cpu=_cpu(root),
        cores=len(_frequency_folders(root)) or os.cpu_count() or 1,
        os=_os(root),
        power_mode=_power_mode(root, ask),
        governor=_governor(root),
    )


def read_thermal(root: Path = ROOT, *, ask: Ask = ask, throttle_count_before: int | None = None) -> Thermal:
    """Read temperature, throttling, frequency and load now.

    Where a board only counts throttling events, `throttled` can be told only against `throttle_count_before`, an
    earlier `throttle_count`.
    """
    return Thermal(
        temperature_c=_temperature(root),
        throttled=_throttled(root, ask, throttle_count_before),
        frequency_khz=_frequency(root),
        load_average=_load(root),
    )


def throttle_count(root: Path = ROOT) -> int | None:
    """Return how many throttling and over-current events the kernel has counted since boot, or None."""
    counts = [_integer(path) for pattern in _THROTTLE_COUNTERS for path in sorted(root.glob(pattern))]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def warnings(board: Board, before: Thermal, after: Thermal) -> tuple[str, ...]:
    """Say what about the conditions makes a latency less comparable."""
    found = []
    if board.governor and board.governor != "performance":
        found.append(f"the CPU governor is {board.governor!r}; set it to 'performance' before measuring")
    if before.load_average is not None and before.load_average > board.cores:
        found.append(
            f"the load average was {before.load_average:.1f} on {board.cores} cores; stop other work and measure again"
        )
    if before.throttled or after.throttled:
        found.append("the board was throttled; check its cooling and its power supply")
    rise = (after.temperature_c or 0.0) - (before.temperature_c or 0.0)
    if before.temperature_c is not None and after.temperature_c is not None and rise > TEMPERATURE_RISE_C:
        found.append(f"the board warmed by {rise:.1f} degrees Celsius while it was measured")
    return tuple(found)


def _cpu(root: Path) -> str:
    text = _text(root / "proc/cpuinfo")
    fields = re.findall(r"^([^\t:\n]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE)
    values: dict[str, list[str]] = {}
    for key, value in fields:
        values.setdefault(key, []).append(value.strip())
    board = _text(root / "proc/device-tree/model").strip("\0 \n") or values.get("Model", [""])[0]
    name = values.get("model name", [""])[0] if "CPU part" not in values else _arm_cores(values)
    name = name or values.get("Hardware", [""])[0]
    return f"{name} ({board})" if name and board else name or board


def _arm_cores(values: dict[str, list[str]]) -> str:
    pairs = dict.fromkeys(zip(values.get("CPU implementer", []), values["CPU part"], strict=False))
    names = [_ARM_PARTS.get(vendor, {}).get(part, f"Arm {vendor}/{part}") for vendor, part in pairs]
    return " + ".join(names)


def _os(root: Path) -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)"?$', _text(root / "etc/os-release"), re.MULTILINE)
    kernel = _text(root / "proc/sys/kernel/osrelease").strip()
    return ", ".join(
        part for part in (found.group(1) if found else "", f"Linux {kernel}" if kernel else "") if part
    )


def _power_mode(root: Path, ask: Ask) -> str:
    if (root / "etc/nvpmodel.conf").exists():
        said = ask(["nvpmodel", "-q"])
        name = re.search(r"NV Power Mode:\s*(\S+)", said)
        number = re.search(r"^\s*(\d+)\s*$", said, re.MULTILINE)
        if name:
            return name.group(1) + (f" (nvpmodel {number.group(1)})" if number else "")
        stored = re.search(r"pmode:0*(\d+)", _text(root / "var/lib/nvpmodel/status"))
        return f"nvpmodel {stored.group(1)}" if stored else ""
    return _text(root / "sys/firmware/acpi/platform_profile").strip()


def _governor(root: Path) -> str:
    found = {_text(folder / "scaling_governor").strip() for folder in _frequency_folders(root)}
    return ",".join(sorted(found - {""}))


def _frequency(root: Path) -> int | None:
    """Return the highest current frequency: on big.LITTLE that is the big cores', where one thread ends up."""
    found = [_integer(folder / "scaling_cur_freq") for folder in _frequency_folders(root)]
    known = [frequency for frequency in found if frequency is not None]
    if not known:
        mhz = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
        known = [round(float(value) * 1000) for value in mhz]
    return max(known, default=None)


def _frequency_folders(root: Path) -> list[Path]:
    return sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq"))


def _temperature(root: Path) -> float | None:
    found = [_integer(path) for path in root.glob("sys/class/thermal/thermal_zone*/temp")]
    celsius = [value / 1000 for value in found if value is not None]
    return max((value for value in celsius if _PLAUSIBLE_C[0] < value < _PLAUSIBLE_C[1]), default=None)


def _throttled(root: Path, ask: Ask, count_before: int | None) -> bool | None:
    signs = [_pi_throttled(root, ask), _coolers_throttle(root)]
    count = throttle_count(root)
    if count is not None and count_before is not None:
        signs.append(count > count_before)
    known = [sign for sign in signs if sign is not None]
    return any(known) if known else None


def _pi_throttled(root: Path, ask: Ask) -> bool | None:
    for path in sorted(root.glob("sys/devices/platform/soc*/soc*firmware/get_throttled")):
        flags = _text(path).strip()
        if re.fullmatch(r"[0-9a-fA-F]{1,8}", flags):
            return bool(int(flags, 16) & _PI_THROTTLED_NOW)
    if "Raspberry Pi" not in _text(root / "proc/device-tree/model"):
        return None
    said = re.search(r"throttled=0x([0-9a-fA-F]+)", ask(["vcgencmd", "get_throttled"]))
    return bool(int(said.group(1), 16) & _PI_THROTTLED_NOW) if said else None


def _coolers_throttle(root: Path) -> bool | None:
    states = [
        _integer(folder / "cur_state")
        for folder in sorted(root.glob("sys/class/thermal/cooling_device*"))
        if _THROTTLING_COOLERS.search(_text(folder / "type"))
    ]
    known = [state for state in states if state is not None]
    return any(state > 0 for state in known) if known else None


def _load(root: Path) -> float | None:
    found = re.match(r"\d+(\.\d+)?", _text(root / "proc/loadavg"))
    return float(found.group()) if found else None


def _integer(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
