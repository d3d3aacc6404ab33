# SPDX-License-Identifier: Apache-2.0
"""How far a student is from its teacher, and from labels where there are any.

The float model teaches its own quantized form (self-distillation: Hinton et al. 2015; for quantization, Mishra and
Marr 2018, "Apprentice"), so training needs inputs only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

SMALLEST_SHARE = 1e-8
"""Floor of probabilities and variances."""


def distance(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    *,
    loss: str,
    are_shares: Sequence[bool],
) -> torch.Tensor:
    """Sum over the outputs; `are_shares` says which outputs are already probabilities."""
    total = torch.zeros(())
    for found, wanted, is_share in zip(student, teacher, are_shares, strict=True):
        if not wanted.is_floating_point():
            continue
        is_row = wanted.dim() == 2 and wanted.shape[1] > 1
        if loss != "kl" or not is_row:
            spread = wanted.var(correction=0).clamp_min(SMALLEST_SHARE)
            total = total + (found - wanted).square().mean() / spread
        if loss != "mse" and is_row:
            total = total + functional.kl_div(
                _log_shares(found, is_share=is_share),
                _log_shares(wanted, is_share=is_share),
                reduction="batchmean",
                log_target=True,
            )
    return total


def label_error(scores: torch.Tensor, labels: torch.Tensor, *, is_share: bool) -> torch.Tensor:
    """Return the cross entropy of class indices."""
    return functional.nll_loss(_log_shares(scores, is_share=is_share), labels)


def _log_shares(scores: torch.Tensor, *, is_share: bool) -> torch.Tensor:
    return scores.clamp_min(SMALLEST_SHARE).log() if is_share else functional.log_softmax(scores, -1)
