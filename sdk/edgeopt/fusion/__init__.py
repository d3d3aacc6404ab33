# SPDX-License-Identifier: Apache-2.0
"""Fusing the operators of an ONNX graph: the same function in fewer, better known operators, float for float.

Rules:
- Every rule keeps the function: weights are folded in float64 and rounded to float32 once. Where a rule cannot prove
  that (unknown rank, a second reader, padding in between), the operator stays and `Fused.kept` says why.
- What other readers or the model's outputs need is never removed; a shared weight is copied before it changes.
- `fuse` is idempotent and knows constants only as initializers: fold constants first (`onnx_graphs.fold` does).
- Subgraphs of If and Loop are not entered.

Why not ONNX Runtime's or onnxoptimizer's own rules? ONNX Runtime 1.32 leaves Gemm and batch normalization, Sub and
Div behind a convolution, pads before max pools and lone batch normalizations; grouped transposed convolutions break
onnxscript's and onnxoptimizer's rules (microsoft/onnxscript#2867, onnx/optimizer#106), and none says what it did.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeopt.fusion.moments import Moments


@dataclass(frozen=True)
class Fused:
    """The fused program; how often which rule applied; what stayed and why.

    `statistics` holds what batch normalization promised about the tensors that it wrote, by their names now.
    """

    program: Any
    counts: dict[str, int]
    kept: tuple[str, ...]
    statistics: dict[str, Moments]

    def sentence(self) -> str:
        """What was fused in one line, or nothing where nothing was."""
        return ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))


def fuse(program: Any, *, running_statistics: bool = False) -> Fused:
    """Apply every rule until none applies any more; `program` itself is not touched.

    `running_statistics` takes batch normalization and dropout that were exported in training mode as if they were in
    evaluation mode, which changes what the model computes.
    """
    from edgeopt.fusion import activations, affine, lone, pads, pools, training
    from edgeopt.fusion.editing import Editor

    editor = Editor(program)
    counts: Counter[str] = Counter()
    kept = training.settle(editor, counts, running_statistics=running_statistics)
    rules = (*activations.RULES, *affine.RULES, *pads.RULES, *pools.RULES)
    while found := [said for rule in rules for node in editor.nodes() if (said := rule(editor, node))]:
        counts.update(found)
    while found := [said for rule in lone.RULES for node in editor.nodes() if (said := rule(editor, node))]:
        counts.update(found)
        counts.update(
            said for rule in affine.RULES for node in editor.nodes() if (said := rule(editor, node))
        )
    return Fused(editor.program(), dict(counts), (*kept, *lone.left(editor)), dict(editor.statistics))
