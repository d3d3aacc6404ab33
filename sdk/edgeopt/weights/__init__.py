# SPDX-License-Identifier: Apache-2.0
"""How weights are put on a coarse grid: one module for each method, each `quantize(weight, grid, ...) -> Grouped`.

A weight is (outputs, inputs), float; a grid gives every `group` neighbouring inputs of an output a scale of their own.
All is NumPy on the host; what an operator of a runtime wants in bytes stands in `packing`.
"""
