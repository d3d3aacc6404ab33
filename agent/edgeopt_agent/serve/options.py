# SPDX-License-Identifier: Apache-2.0
"""The key `http` of the agent's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class HttpOptions:
    """`port` of 127.0.0.1 (0: none), and whether those who connect there may share memory.

    Every user of this machine can reach that port; the Unix socket only the agent's own.
    """

    port: int = 0
    shared_memory: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be from 0 to 65535, found {self.port}")
        if self.extra:
            raise ValueError(f"http: unknown keys {sorted(self.extra)}; known are port and shared_memory")
