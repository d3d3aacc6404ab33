# SPDX-License-Identifier: Apache-2.0
"""Calibration samples as the int4 quantizers want them: in a list, because they copy their configuration and begin again."""

from __future__ import annotations

from typing import Any

from work import Work


def reader(base: type[Any], work: Work) -> Any:
    """A data reader of a quantizer's own class `base` over the samples of `work`."""

    class Reader(base):
        def __init__(self) -> None:
            self.rows = list(work.samples())
            self.at = 0

        def get_next(self) -> Any:
            self.at += 1
            return self.rows[self.at - 1] if self.at <= len(self.rows) else None

        def rewind(self) -> None:
            self.at = 0

    return Reader()
