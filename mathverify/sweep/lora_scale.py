"""Alpha searched by what it does: as a ratio to the rank. Turns two extra keys of a space into lora.alpha.

The adapter adds scale * B A x to each linear, with scale = alpha / rank (alpha / sqrt(rank) with rsLoRA). A space over
rank with alpha fixed therefore changes two things at once: alpha 32 is a scale of 2 at r16 and of 0.5 at r64, a four
times smaller update for the same B A, as if r64 had been trained with a smaller step. More terms in B A make up for
half of it only: AdamW moves every entry of B by about the learning rate whatever the scale is, and the norm of B A
grows with the square root of the rank. On the embedded default, after 20 steps at one constant rate, the weight change
of r64 had 0.57 times the norm of r16's at alpha 32, and 2.3 times at alpha = rank. Part of what looks like the effect
of rank is thus the effect of scale, whichever is held fixed, which is why the ratio can be searched too.

Three ways to write a space:

    lora.alpha=choice(16,32,64)                    alpha as such (the mission's way; scale differs between ranks)
    lora.alpha_per_rank=choice(0.5,1,2)            alpha = ratio * rank: every rank is tried at the same scales
    lora.alpha_per_sqrt_rank=choice(2,4,8)         alpha = ratio * sqrt(rank), with lora.rslora=true (arXiv:2312.03732)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mathverify.errors import UserError

PER_RANK = "lora.alpha_per_rank"
PER_SQRT_RANK = "lora.alpha_per_sqrt_rank"
ALPHA_KEYS = {"lora.alpha", PER_RANK, PER_SQRT_RANK}


def searched(keys: Sequence[str]) -> str | None:
    """The ratio key among these keys, if any.

    Raises:
        UserError: alpha is searched in two ways at once.
    """
    found = sorted(ALPHA_KEYS & set(keys), reverse=True)
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} are both searched: each decides alpha, keep one")
    return found[0] if found and found[0] != "lora.alpha" else None


def is_ratio(override: str) -> bool:
    """Whether an override is one of ours, which no config knows."""
    return override.partition("=")[0] in (PER_RANK, PER_SQRT_RANK)


def alpha_overrides(key: str, ratio: float, rank: int) -> list[str]:
    """The overrides of the config that a ratio stands for, at this rank."""
    if key == PER_SQRT_RANK:
        return [f"lora.alpha={ratio * math.sqrt(rank):.10g}", "lora.rslora=true"]
    return [f"lora.alpha={ratio * rank:.10g}"]
