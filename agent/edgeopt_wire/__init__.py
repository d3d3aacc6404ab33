# SPDX-License-Identifier: Apache-2.0
"""What crosses the wire between the SDK, the fleet and a device: values, their bytes and their errors.

Standard library only, Python 3.10: a board imports this before it imports anything else.
"""

__version__ = "0.1.0"
