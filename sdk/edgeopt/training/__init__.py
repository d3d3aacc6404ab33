# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training on PyTorch's exported program: grids that learn, a student graph, a loop that resumes."""
