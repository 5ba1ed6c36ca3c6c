"""The learning rate's schedule."""

from __future__ import annotations

import math


def rate_factor(step: int, total: int, warmup_fraction: float, final_fraction: float) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to `final_fraction`.

    For total 100, warm-up 0.1, final 0: step 0 -> 0.1, step 9 -> 1.0, step 55 -> about 0.5, step 100 -> 0.
    """
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
