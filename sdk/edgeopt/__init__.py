# SPDX-License-Identifier: Apache-2.0
"""The edgeopt SDK."""

from edgeopt_wire import __version__

__all__ = ["__version__"]
