"""Causal attention inside segments only: torch's variable-length kernel on CUDA, a padded equivalent elsewhere.

Registered with transformers, so that any of its models runs packed tokens unchanged.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from mathverify.engine.layout import PassLayout

ATTENTION = "mathverify_packed"
"""Name under which packed attention is registered with transformers."""


def register() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers; its masks are never needed."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    packed: PassLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed pass, in transformers' calling convention.

    Args:
        query: [1, heads, tokens, head size]. key, value: the same with the model's number of key-value heads.
        scaling: factor on the dot products; 1 / sqrt(head size) when None.
        packed: the pass; passed to the model's forward as `packed=`.

    Returns:
        [1, tokens, heads, head size], and None for the attention weights.

    Raises:
        NotImplementedError: the model asks for a sliding window or soft-capped scores, which packing does not have.
    """
    if packed is None:
        raise ValueError("packed attention needs the pass: call the model with packed=PassLayout(...)")
    window = kwargs.get("sliding_window")
    if (window is not None and window < packed.longest) or kwargs.get("softcap"):
        raise NotImplementedError("this model's attention (sliding window or soft cap) is not supported here")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return attend(q, k, v, packed, scaling)[None], None


class Attended:
    """Attention of a packed pass together with its way back, outside of autograd.

    out: the query's shape. Arguments as `attend` takes them.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PassLayout,
        scaling: float,
        last_only: bool,
        training: bool,
    ) -> None:
        self._heads = query, key, value
        self._packed, self._scaling = packed, scaling
        self._lse: torch.Tensor | None = None
        size = query.shape[-1]
        if query.is_cuda and query.element_size() == 2 and not last_only and 16 <= size <= 128:
            from mathverify.engine import triton_attention

            self.out, self._lse = triton_attention.forward(query, key, value, packed, scaling)
            return
        self._heads = tuple(t.detach().requires_grad_(training) for t in self._heads)  # type: ignore[assignment]
        with torch.set_grad_enabled(training):
            self._graph = attend(*self._heads, packed=packed, scaling=scaling, last_only=last_only)
        self.out = self._graph.detach()

    def grads(self, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of query, key and value from that of `out`: one tensor with all heads side by side where they all
        have the same rows anyway and a kernel made it so, else three."""
        if self._lse is not None:
            from mathverify.engine import triton_attention

            return (triton_attention.backward(grad, *self._heads, self.out, self._lse, self._packed, self._scaling),)
        return torch.autograd.grad(self._graph, self._heads, grad)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PassLayout,
    scaling: float | None = None,
    last_only: bool = False,
) -> torch.Tensor:
    """Attention of a packed pass on [rows, heads, head size] tensors; differentiable.

    Args:
        query: of every token, or with `last_only` of each segment's last token. key, value: of every token; their
            number of heads divides the query's.

    Returns:
        The query's shape.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, packed, scaling, last_only)
    return _padded(query, key, value, packed, scaling, last_only)


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PassLayout, scaling: float | None, last_only: bool
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    extra = _varlen_options()
    if "enable_gqa" in extra:
        extra["enable_gqa"] = k.shape[1] != q.shape[1]
    # Without that option torch's kernel shares heads all the same (2.11; tests/engine/test_gpu.py).
    starts, longest = (packed.one_each, 1) if last_only else (packed.starts, packed.longest)
    # Causal rows are aligned at the end of the keys, so a segment's only query sees all of them.
    out = varlen_attn(q, k, v, starts, packed.starts, longest, packed.longest, scale=scaling, **extra)
    assert isinstance(out, torch.Tensor)
    return out


@cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_options() -> dict[str, Any]:
    """How this torch spells causal attention with shared key-value heads (2.11 to 2.13 differ)."""
    known = _varlen_parameters()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})


def _padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PassLayout, scaling: float | None, last_only: bool
) -> torch.Tensor:
    """The same on a [segments, longest] grid. Padding stands behind each segment, where causal rows never look."""
    grid_shape = (len(packed.segments), packed.longest)
    index = packed.padded_index
    shares_heads = k.shape[1] != q.shape[1]

    def to_grid(t: torch.Tensor) -> torch.Tensor:
        grid = t.new_zeros(grid_shape[0] * grid_shape[1], *t.shape[1:]).index_copy(0, index, t)
        return grid.view(*grid_shape, *t.shape[1:]).transpose(1, 2)

    if last_only:
        seen = packed.padded_mask[:, None, None, :]
        one = scaled_dot_product_attention(
            q[:, :, None], to_grid(k), to_grid(v), attn_mask=seen, scale=scaling, enable_gqa=shares_heads
        )
        return one[:, :, 0]
    out = scaled_dot_product_attention(
        to_grid(q), to_grid(k), to_grid(v), is_causal=True, scale=scaling, enable_gqa=shares_heads
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, index)
