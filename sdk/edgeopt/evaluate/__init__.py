# SPDX-License-Identifier: Apache-2.0
"""How good a model is: samples, outputs, metrics, and what a sample of this size can tell."""
