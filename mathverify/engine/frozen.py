"""The frozen linears of the base, whatever they are stored as: y = W x + b with gradients for x only.

Quantised weights are made dense for each use, forward and backward, unless dense copies are kept (`keep_dense`) or they
are FP8, which is multiplied as it is. bitsandbytes makes them dense for more than a few rows too; its modules are not
called, because after an evaluation pass on AVX512-BF16 CPUs they repack the weight and let later gradients go wrong
without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mathverify.engine.fp8 import quantize_rows, scaled_product


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

    def keep_dense(self, wanted: bool, dtype: torch.dtype) -> None:
        """Hold a dense copy of a quantised weight from now on, or none. With it: the same numbers, no work per pass,
        more memory."""
        if not wanted:
            self.kept = None
        elif self.dense_weight is not None and self.kept is None:
            self.kept = self.dense_weight(dtype)

    def write_dense(self, out: Tensor) -> None:
        """Write the dense weight of a quantised linear into `out` [out, in]."""
        state = getattr(self.original.weight, "quant_state", None)
        if state is not None and state.dtype is out.dtype and out.is_cuda:  # on a CPU it cannot write into a tensor
            from bitsandbytes.functional import dequantize_4bit

            dequantize_4bit(self.original.weight.data, state, out=out)
        else:
            assert self.dense_weight is not None
            out.copy_(self.dense_weight(out.dtype))

    def become_fp8(self, codes: Tensor, scales: Tensor) -> None:
        """Use these FP8 weights (fp8.quantize_rows) from now on; the dense ones are let go."""
        self.dense_weight = lambda dtype: (codes.to(torch.float32) * scales[:, None]).to(dtype)
        self.original.weight.data = codes.new_empty(0, dtype=torch.bfloat16)

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


class FrozenGroup:
    """Frozen linears with one input, as one matrix [sum of out, in]: one product where a model has two or three.

    Dense weights are put side by side once and the linears keep views of them, so nothing is held twice. Quantised
    ones are made dense into a scratch that all groups share, unless `keep_dense` was asked for.
    """

    def __init__(self, linears: Sequence[FrozenLinear]) -> None:
        self.linears = list(linears)
        self.in_features = self.linears[0].in_features
        self.outs = tuple(linear.out_features for linear in self.linears)
        self.out_features = sum(self.outs)
        biases = [linear.original.bias for linear in self.linears]
        self.bias: Tensor | None = None if any(b is None for b in biases) else torch.cat([b.data for b in biases])
        self._dense: Tensor | None = None
        self._codes: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # of W and of its transpose
        if not self.linears[0].is_quantized:
            self._merge([linear.original.weight.data for linear in self.linears])
            for own, one in zip(self._split(), self.linears, strict=True):
                one.original.weight.data = own

    @property
    def is_fp8(self) -> bool:
        return self._codes is not None

    def product(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x W^T + bias, added to `y` in place if given (not for FP8). x: [rows, in]. Returns [rows, out]."""
        if self._codes is not None:
            assert y is None, "FP8 products do not add"
            y = scaled_product(x, *self._codes[0])
        else:
            weight = self.dense(x.dtype).t()
            y = torch.mm(x, weight) if y is None else y.addmm_(x, weight)
        return y if self.bias is None else y.add_(self.bias)

    def grad(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        """Gradient of x from that of the product, grad W, added to `into` if given. grad: [rows, out]."""
        if self._codes is not None:
            own = scaled_product(grad, *self._codes[1])
            return own if into is None else into.add_(own)
        weight = self.dense(grad.dtype)
        return torch.mm(grad, weight) if into is None else into.addmm_(grad, weight)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in]; valid until another group's are asked for."""
        if self._dense is not None:
            return self._dense
        scratch = _scratch(self.out_features * self.in_features, dtype, self.linears[0].original.weight.device)
        return self._written(scratch.view(self.out_features, self.in_features))

    def _written(self, whole: Tensor) -> Tensor:
        for own, one in zip(whole.split(self.outs), self.linears, strict=True):
            one.write_dense(own)
        return whole

    def keep_dense(self, wanted: bool, dtype: torch.dtype) -> None:
        """Hold the dense weights of quantised linears from now on, or none."""
        if not self.linears[0].is_quantized:
            return
        if not wanted:
            self._dense = None
            for one in self.linears:
                one.kept = None
        elif self._dense is None:
            device = self.linears[0].original.weight.device
            self._dense = self._written(torch.empty(self.out_features, self.in_features, dtype=dtype, device=device))
            for own, one in zip(self._split(), self.linears, strict=True):
                one.kept = own

    def to_fp8(self) -> None:
        """Store the weights as FP8, once for x W^T and once for its gradient; the dense ones are let go."""
        dense = self._dense
        assert dense is not None, "FP8 starts from dense weights"
        self._codes = quantize_rows(dense), quantize_rows(dense.t().contiguous())
        codes, scales = self._codes[0]
        for own, scale, one in zip(codes.split(self.outs), scales.split(self.outs), self.linears, strict=True):
            one.become_fp8(own, scale)
        self._dense = None

    def _merge(self, weights: Sequence[Tensor]) -> None:
        self._dense = weights[0] if len(weights) == 1 else torch.cat(list(weights))

    def _split(self) -> tuple[Tensor, ...]:
        assert self._dense is not None
        parts: tuple[Tensor, ...] = self._dense.split(self.outs)
        return parts


_scratches: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _scratch(numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The first `numbers` of a buffer that all dequantised weights take turns in: streams run in order."""
    found = _scratches.get((dtype, device))
    if found is None or found.numel() < numbers:
        found = _scratches[(dtype, device)] = torch.empty(numbers, dtype=dtype, device=device)
    return found[:numbers]


def scratch_held() -> int:
    """Bytes of the buffers that weights have been made dense in so far."""
    return sum(scratch.numel() * scratch.element_size() for scratch in _scratches.values())


def drop_scratch() -> None:
    """Let go of these buffers until a weight is made dense again."""
    _scratches.clear()


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
