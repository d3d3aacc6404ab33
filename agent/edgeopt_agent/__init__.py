# SPDX-License-Identifier: Apache-2.0
"""The light agent on a device: pull, verify, install, measure and serve."""
