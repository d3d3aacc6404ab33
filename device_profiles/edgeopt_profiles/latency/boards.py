# SPDX-License-Identifier: Apache-2.0
"""The boards of published latencies: which profile they are, and what of a CPU a speed is explained by.

Why here and not in profiles? Most of these boards have none; they only teach how speed follows clocks and cores.
Clocks and instruction sets: the boards' data sheets, as collected beside the latencies (devices.csv, with its sources).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log


@dataclass(frozen=True)
class Board:
    """Cores of the cluster that benchmarks run on, their clock, and what they multiply with."""

    cores: int
    mhz: int
    has_dot_products: bool = False
    has_half_floats: bool = False
    profile: str = ""


# not rpi3b: the published board throttled (MobileNetV1 455 ms, 114 to 123 ms on every other Cortex-A53)
BOARDS = {
    "rpi-zero-2w": Board(4, 1000),
    "rpi3b-plus": Board(4, 1400),
    "rpi4": Board(4, 1500, profile="raspberry-pi-4"),
    "rpi5": Board(4, 2400, True, True, profile="raspberry-pi-5"),
    "jetson-nano": Board(4, 1430),
    "jetson-agx-xavier": Board(8, 2265, False, True),
    "jetson-orin-nano-8gb": Board(6, 1510, True, True, profile="jetson-orin-nano"),
    "jetson-agx-orin-64gb": Board(12, 2200, True, True, profile="jetson-orin-agx"),
    "rk3588": Board(4, 2400, True, True),
    "graviton3": Board(8, 2600, True, True),
    "pixel-1": Board(1, 2150),
    "pixel-3": Board(4, 2500),
    "pixel-4": Board(4, 2420, True, True),
    "sd855": Board(1, 2840, True, True),
    "sd865": Board(1, 2840, True, True),
    "android-sd8gen2": Board(4, 2800, True, True),
    "apple-m1": Board(4, 3200, True, True),
    "intel-n5105": Board(4, 2900),
    "x86-avx512-c5": Board(8, 3400, True),
}


def descriptors(cores: int, mhz: float, *, dot_products: bool, half_floats: bool) -> tuple[float, ...]:
    """What the logarithm of a CPU's speed is linear in: cores, clock, dot products, half floats, and a constant."""
    return (1.0, log(cores), log(mhz / 1000), float(dot_products), float(half_floats))
