"""LoRA dropout without a random state: a mask is a hash of (trial, step, example, position, linear, channel).

So it is the same however a step is cut into passes, whichever trials share a pass, and when a pass is repeated.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mathverify.engine.layout import PassLayout, Rows

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
    keep = _uniform(token_keys, linear, x) >= round(probability * (1 << 24))
    return x * (keep.to(x.dtype) * (1.0 / (1.0 - probability)))


def _uniform(token_keys: Tensor, linear: int, x: Tensor) -> Tensor:
    """A number in [0, 2^24) for each element of x: the upper 24 bits of its hash."""
    channels = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    hashed = _mix(_mix(token_keys ^ linear)[:, None] + channels[None, :] * _CHANNEL)
    return (hashed >> 8) & 0xFFFFFF


class PassDropout:
    """Dropout of one pass in which adapters may differ in probability.

    keys: int32 [rows]. probabilities: by slot.
    """

    def __init__(self, keys: Tensor, rows: Rows, probabilities: Sequence[float]) -> None:
        self._keys = keys
        self._thresholds = rows.per_row([round(p * (1 << 24)) for p in probabilities])
        first = rows.first
        self._thresholds[:first] = 0  # rows of no adapter lose nothing
        self._thresholds = self._thresholds.to(torch.int32)
        self._factors = rows.per_row([1.0 / (1.0 - p) for p in probabilities])

    @classmethod
    def of(cls, layout: PassLayout, rows: Rows, probabilities: Sequence[float]) -> PassDropout | None:
        """The dropout of a training pass; None when no adapter of it drops anything. `rows`: tokens or segments."""
        if not any(probabilities):
            return None
        keys = layout.token_keys if rows is layout.token_rows else layout.token_keys[layout.last]
        return cls(keys, rows, probabilities)

    def apply(self, x: Tensor, span: slice, linear: int) -> Tensor:
        """`drop` for the rows of `span`, each with its adapter's probability. x: [rows of span, channels]."""
        keys, thresholds, factors = (t[span] for t in (self._keys, self._thresholds, self._factors))
        if x.is_cuda:
            from mathverify.engine import triton_kernels

            return triton_kernels.drop(x.contiguous(), keys, thresholds, factors, linear)
        return x * (_uniform(keys, linear, x) >= thresholds[:, None]).to(x.dtype) * factors[:, None].to(x.dtype)


def _mix(h: Tensor) -> Tensor:
    """The 32-bit finaliser 'lowbias32' (C. Wellons, hash-prospector, 2018); int32 products wrap as it needs."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * _MIX_1
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _MIX_2
    return h ^ ((h >> 16) & 0xFFFF)
