# SPDX-License-Identifier: Apache-2.0
"""Where a build works: its cache, its scratch folder and its progress, and the one way to make a cached stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeopt.cache import Cache
from edgeopt.progress import Progress, Step


@dataclass(frozen=True)
class Workbench:
    """`scratch` is removed when the build ends, `cache` outlives it; `tools` (name -> version) enter every key."""

    cache: Cache
    scratch: Path
    progress: Progress
    tools: Mapping[str, str]

    def partial(self, key: Mapping[str, Any]) -> Path:
        """Where the stage `key` may keep its state while it works."""
        return self.cache.partial({**key, "tools": dict(self.tools)}, self.scratch)

    def stage(
        self,
        name: str,
        key: Mapping[str, Any],
        make: Callable[[Path, Step], None],
        *,
        total: int | None = None,
        describe: Callable[[Path], str] = lambda _: "",
    ) -> Path:
        """Return the folder of a finished stage, made now or taken from the cache, and show its progress."""
        with self.progress.stage(name, total) as step:
            whole = {**key, "tools": dict(self.tools)}
            folder, step.cached = self.cache.stage(whole, lambda entry: make(entry, step), self.scratch)
            step.detail = describe(folder)
        return folder
