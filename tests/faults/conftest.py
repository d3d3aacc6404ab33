# SPDX-License-Identifier: Apache-2.0
"""The fault tests' modules import each other by their own names, as their child processes do."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
