"""Learning-rate schedules: a linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, num_steps: int, *, schedule: str, warmup_ratio: float) -> float:
    """Return what the peak learning rate is multiplied by at `step` (0 is the first of `num_steps`); never 0.

    cosine is SGDR's half wave (arXiv 1608.03983, eq. 5) without restarts.
    """
    warmup = round(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, num_steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "linear":
        return 1.0 - done
    return 1.0
