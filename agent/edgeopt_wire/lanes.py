# SPDX-License-Identifier: Apache-2.0
"""Lanes: streams of chunks that several devices share, each at the rate that is its name.

A lane is a number of KiB a second; its topic is `topics.blob`. The control plane offers lanes to a device that says with
its `Pull` that it knows them and whose package others pull too; the device listens to one that it can keep, and asks there.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt_wire.manifest import check_digest

LANES_KIB_S = (64, 512, 4096)
"""What the control plane offers: 0.5, 4 and 32 Mbit/s. A factor of 8 apart, so that alike devices choose alike."""
BURST = 4
"""Chunks that a lane sends at once; how long a burst takes to arrive says what a listener could take."""


@dataclass(frozen=True)
class Lanes:
    """Several devices pull this blob: it may be heard on these lanes (KiB a second, ascending)."""

    SCHEMA = "edgeopt.lanes/1"

    sha256: str
    kib_s: tuple[int, ...]

    def __post_init__(self) -> None:
        check_digest(self.sha256)
        if not self.kib_s or list(self.kib_s) != sorted(set(self.kib_s)) or self.kib_s[0] < 1:
            raise ValueError(f"lanes are ascending rates of at least 1 KiB a second, found {self.kib_s}")
