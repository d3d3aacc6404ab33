# SPDX-License-Identifier: Apache-2.0
"""Helpers that several test folders share are imported by their own names (`publishing`)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
