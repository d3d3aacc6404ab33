# SPDX-License-Identifier: Apache-2.0
"""The fuzzing modules import each other by their own names, as `python fuzz_run.py` lets them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
