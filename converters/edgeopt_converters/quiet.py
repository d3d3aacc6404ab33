# SPDX-License-Identifier: Apache-2.0
"""Keep what libraries say of themselves off a user's terminal, for as long as they work."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*loggers: str, warned: tuple[type[Warning], ...] = (Warning,)) -> Iterator[None]:
    """Let `loggers` say errors only, and hide warnings of the classes `warned`; everything is as before afterwards."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in warned:
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)
