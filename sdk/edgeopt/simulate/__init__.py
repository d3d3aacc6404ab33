# SPDX-License-Identifier: Apache-2.0
"""What a quantized model computes on a CPU that is not here: integer arithmetic in numpy, rounding and all."""
