# SPDX-License-Identifier: Apache-2.0
"""Which samples teach and which judge. Without torch: builds that train nothing ask for it too."""

from __future__ import annotations

from edgeopt_wire.errors import RecipeError


def split(count: int, held_out: float) -> tuple[list[int], list[int]]:
    """Deal the samples evenly to learning and to judging, at least one each.

    Raises:
        RecipeError: There are fewer than two samples.
    """
    if count < 2:
        raise RecipeError(
            f"quantize_aware_training needs at least 2 samples, found {count}; give --calibration"
        )
    judges = min(max(1, round(count * held_out)), count - 1)
    judging = sorted({(2 * number + 1) * count // (2 * judges) for number in range(judges)})
    return [number for number in range(count) if number not in set(judging)], judging
