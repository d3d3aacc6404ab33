# SPDX-License-Identifier: Apache-2.0
"""int8 without a single sample: what batch normalization remembers of the data stands in for calibration.

A batch normalization writes channels of mean beta and standard deviation |gamma|, because it was trained so, and knows
the mean and variance of what it reads. From there the values of every other tensor follow (`propagate`), the ends of
their integers are chosen (`spread.REACH`) and found again in whatever the model is lowered to (`promises`).

Rules:
- It is asked for (`[calibration] method = "batchnorm"`), never a fall-back, and every file so made is called
  `LABEL` wherever it is named.
- A model without batch normalizations is refused: there is nothing to read.
- Samples of noise (`noise`) only tell tensors apart and weigh the columns of weights against each other while they
  are rounded. No figure of quality is ever taken on them.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", sections 4.2 and 5.
Why not distil samples from the statistics by gradients (Cai et al. 2020, "ZeroQ")? It needs PyTorch and minutes, and gave
no more on EfficientNet-Lite0: docs/quantization.md has the figures.
"""

from __future__ import annotations

LABEL = "uncalibrated"
"""What a file is called whose ranges no data has seen: in manifests, reports, tables and logs."""

METHOD = "batchnorm"
"""The calibration method of a recipe that asks for it."""

SAID = (
    "uncalibrated: ranges come from the statistics of batch normalization, no data was seen; calibrate with "
    "--calibration DATA where there is some"
)
"""The note that each such file carries."""
