"""LoRA dropout without a random state: a mask is a hash of (trial, step, example, position, linear, channel).

So it is the same however a step is cut into passes, whichever trials share a pass, and when a pass is repeated.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_MIX_1, _MIX_2, _CHANNEL = 0x7FEB352D, 0x846CA68B - (1 << 32), 0x9E3779B1 - (1 << 32)


def segment_key(seed: int, step: int, place: int) -> int:
    """Where the masks of one example come from. seed: the trial's; place: the example's place in its step."""
    return zlib.crc32(f"{seed}/{step}/{place}".encode())


def linear_key(name: str) -> int:
    """A signed 32-bit number for a linear's name, the same in every process."""
    return int(zlib.crc32(name.encode())) - (1 << 31)


def drop(x: Tensor, token_keys: Tensor, linear: int, probability: float) -> Tensor:
    """Zero each element with `probability` and scale the rest by 1 / (1 - probability).

    Args:
        x: [tokens, channels]. token_keys: int32 [tokens] (PassLayout.token_keys). linear: linear_key of the linear.
    """
    channels = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    hashed = _mix(_mix(token_keys ^ linear)[:, None] + channels[None, :] * _CHANNEL)
    # The upper 24 bits are a uniform number in [0, 2^24).
    keep = ((hashed >> 8) & 0xFFFFFF) >= round(probability * (1 << 24))
    return x * (keep.to(x.dtype) * (1.0 / (1.0 - probability)))


def _mix(h: Tensor) -> Tensor:
    """The 32-bit finaliser 'lowbias32' (C. Wellons, hash-prospector, 2018); int32 products wrap as it needs."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * _MIX_1
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _MIX_2
    return h ^ ((h >> 16) & 0xFFFF)
