"""The learning rate of each step, as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from mathverify.config import OptimizerConfig, ScheduleKind


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (0 .. steps-1).

    Warm-up rises linearly and reaches the full rate at step `warmup_steps` - 1; the last step is the smallest
    positive one of the decay, not zero, so that no step is wasted at either end.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)
    match config.schedule:
        case ScheduleKind.linear:
            return config.learning_rate * left
        case ScheduleKind.cosine:
            return config.learning_rate * 0.5 * (1.0 - math.cos(math.pi * left))
        case ScheduleKind.constant:
            return config.learning_rate
