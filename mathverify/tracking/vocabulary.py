"""What W&B is told things are called. Plain data; imports no wandb."""

from __future__ import annotations

STEP = "train/step"

# (name or pattern, summary): how W&B keeps a metric's best, so that its runs table ranks without clicks.
DEFINITIONS = (
    ("train/*", None),
    ("validation/*", None),
    ("train/loss", "min"),
    ("validation/loss", "min"),
    ("validation/accuracy", "max"),
    ("validation/balanced_accuracy", "max"),
    ("validation/auroc", "max"),
    ("validation/brier", "min"),
    ("validation/ece", "min"),
)
