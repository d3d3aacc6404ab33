# SPDX-License-Identifier: Apache-2.0
"""Facts of boards and rules of runtimes."""
