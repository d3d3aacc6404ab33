# SPDX-License-Identifier: Apache-2.0
"""From one model format to another."""
