"""The frozen linears of the base, whatever they are stored as: y = W x + b with gradients for x only.

Quantised weights are made dense for each use, forward and backward. That is what bitsandbytes does for more than a few
rows too; its own modules are not called, because after an evaluation pass on AVX512-BF16 CPUs they repack the weight
and let later gradients go wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class FrozenLinear(nn.Module):
    """A linear of the base with its weight frozen.

    Shapes: x [..., in_features] -> [..., out_features], in x's dtype. No gradient ever reaches weight or bias.
    """

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        self.original = module
        self.dense_weight = _dense_weight(module)
        self.kept: Tensor | None = None

    @property
    def is_quantized(self) -> bool:
        return self.dense_weight is not None

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Hold a dense copy of a quantised weight from now on: the same numbers, no work per pass, more memory."""
        if self.dense_weight is not None and self.kept is None:
            self.kept = self.dense_weight(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.original.bias
        if self.dense_weight is None:
            return linear(x, self.original.weight, bias)
        if self.kept is not None:
            return linear(x, self.kept, bias)
        y: Tensor = _QuantizedMatmul.apply(x, self.dense_weight)
        return y if bias is None else y + bias.to(y.dtype)


class _QuantizedMatmul(torch.autograd.Function):
    """x W^T with W made dense anew in forward and in backward, so that no dense copy is kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense_weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.dense_weight = dense_weight
        return linear(x, dense_weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.dense_weight(grad.dtype), None


def _dense_weight(module: nn.Linear) -> Callable[[torch.dtype], Tensor] | None:
    """How to get the dense [out, in] weight of a quantised linear; None when it is dense already."""
    kind = type(module).__name__
    if kind == "Linear4bit":
        return lambda dtype: _dequantize_4bit(module, dtype)
    if kind == "Linear8bitLt":
        return lambda dtype: _dequantize_int8(module, dtype)
    return None


def _dequantize_4bit(module: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return dense.to(dtype)


def _dequantize_int8(module: Any, dtype: torch.dtype) -> Tensor:
    """Row-wise: W = codes * row maximum / 127 (LLM.int8(), arXiv:2208.07339). Activations are not quantised, so that
    a token's result does not depend on which other tokens are in the pass."""
    codes, maxima = module.weight.data, module.weight.SCB
    if maxima is None:
        maxima = module.state.SCB
    dense: Tensor = codes.to(dtype) * (maxima.to(codes.device, torch.float32) / 127.0).to(dtype)[:, None]
    return dense
