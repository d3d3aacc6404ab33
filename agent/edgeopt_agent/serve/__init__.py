# SPDX-License-Identifier: Apache-2.0
"""Local inference while the agent runs: models in memory, and a socket that speaks the Open Inference Protocol v2."""
