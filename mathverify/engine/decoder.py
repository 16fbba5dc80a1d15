"""A Llama-like decoder, forward and backward written out: the fast way through the base, for packs of adapters.

What that buys over running transformers' modules under autograd: linears with one input are one product; the low-rank
products of all adapters are few (products.py); between products there is one kernel where autograd has five
(elementwise.py); what the backward pass can make again in one read is not stored (normalised rows, the MLP's gated
product); the last layer computes only what the verdict needs; gradients go straight into the adapters' float32 tensors.
Bases that are not of this form run through transformers (model.py).

Per layer, x [rows, hidden]:   h = x + O attend(rotate(QKV norm(x)));   out = h + Down swiglu(GateUp norm(h))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mathverify.engine import elementwise as ew
from mathverify.engine.attention import Attended
from mathverify.engine.dropout import PassDropout
from mathverify.engine.frozen import FrozenGroup
from mathverify.engine.layout import PassLayout, Rows
from mathverify.engine.lora import AdapterHost, PackLinear
from mathverify.engine.products import Products, Weights

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2"})
"""Model types of transformers whose decoder layers are of this form."""


def is_supported(model: Any) -> bool:
    """Whether a transformers causal LM can run through `Decoder`."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        config.model_type in ARCHITECTURES
        and config.hidden_act == "silu"
        and head & (head - 1) == 0
        and not getattr(config, "sliding_window", None)
    )


@dataclass(frozen=True)
class PassAdapters:
    """The adapters of a pass: their weights, their dropout by slot, and whether gradients will be asked for."""

    weights: Weights
    dropouts: Sequence[float]
    training: bool


class Group:
    """Frozen linears with one input and what adapters add to them, on given rows."""

    def __init__(self, linears: Sequence[PackLinear]) -> None:
        self.names = tuple(linear.name for linear in linears)
        self.frozen = FrozenGroup([linear.frozen for linear in linears])

    def products(self, weights: Weights) -> Products | None:
        return weights.products(self.names, self.frozen.outs)

    def forward(self, x: Tensor, rows: Rows, on: PassContext) -> tuple[Tensor, Tensor | None]:
        """[rows, out], and the low-rank activations that backward needs."""
        products = self.products(on.weights)
        if products is None:
            return self.frozen.product(x), None
        low = products.down(x, rows, on.dropout(rows))
        if self.frozen.is_fp8:
            y = self.frozen.product(x)
            products.up(y, low, rows, fresh=False)
            return y, low
        # The small product first: the large one adds to it in its epilogue, and y is read and written once less.
        y = x.new_empty(len(x), self.frozen.out_features)
        products.up(y, low, rows, fresh=True)
        return self.frozen.product(x, y), low

    def grad(self, grad: Tensor, low: Tensor | None, rows: Rows, on: PassContext, wants_x: bool = True) -> Upward:
        """Gradient of the input, B's gradient on the way; A's follows when the input is at hand (`Upward.finish`)."""
        products = self.products(on.weights)
        if products is None or low is None:
            return Upward(self.frozen.grad(grad) if wants_x else None, None, None, rows, on)
        grad_low = products.grad_up(grad, low, rows)
        if not wants_x:
            return Upward(None, grad_low, products, rows, on)
        width, dropout = self.frozen.in_features, on.dropout(rows)
        if self.frozen.is_fp8:
            x_grad = products.spread(grad_low, width, rows, dropout, into=self.frozen.grad(grad))
        else:
            x_grad = self.frozen.grad(grad, into=products.spread(grad_low, width, rows, dropout))
        return Upward(x_grad, grad_low, products, rows, on)


@dataclass
class Upward:
    """The way back through a group: `x_grad` is there; `finish(x)` adds A's gradient."""

    _x_grad: Tensor | None
    _grad_low: Tensor | None
    _products: Products | None
    _rows: Rows
    _on: PassContext

    @property
    def x_grad(self) -> Tensor:
        assert self._x_grad is not None
        return self._x_grad

    def finish(self, x: Tensor) -> None:
        if self._products is not None and self._grad_low is not None:
            self._products.grad_down(self._grad_low, x, self._rows, self._on.dropout(self._rows))


class PassContext:
    """What every layer of one pass needs: layout, rotary angles (float32 [tokens, head size]), adapters, and whether
    only verdicts matter."""

    def __init__(self, layout: PassLayout, cos: Tensor, sin: Tensor, adapters: PassAdapters, last_only: bool) -> None:
        self.layout, self.cos, self.sin, self.last_only = layout, cos, sin, last_only
        self.weights, self.training = adapters.weights, adapters.training
        self._dropouts = adapters.dropouts if adapters.training else ()
        self._made: dict[int, PassDropout | None] = {}

    def dropout(self, rows: Rows) -> PassDropout | None:
        if id(rows) not in self._made:
            self._made[id(rows)] = PassDropout.of(self.layout, rows, self._dropouts)
        return self._made[id(rows)]


@dataclass
class _Saved:
    """What a layer's backward reads. total: the residual stream at its start; middle: the same behind attention.

    Only `total` is there when activations are recomputed.
    """

    total: Tensor
    scale: Tensor | None = None
    attended: Attended | None = None
    lows: tuple[Tensor | None, ...] = ()
    middle: Tensor | None = None
    middle_scale: Tensor | None = None
    gate_up: Tensor | None = None


class Layer:
    """One decoder layer. In the last one (`is_last`) of a pass that wants verdicts only, the rows behind the keys and
    values are the segments' last tokens; so there the query is a product of its own."""

    def __init__(self, layer: Any, config: Any, is_first: bool, is_last: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.is_first, self.is_last = is_first, is_last
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self.inputs = [Group([q]), Group([k, v])] if is_last else [Group([q, k, v])]
        self.out, self.down = Group([attention.o_proj]), Group([mlp.down_proj])
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj])
        self.norm, self.middle_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scaling: float = attention.scaling

    @property
    def groups(self) -> list[Group]:
        return [*self.inputs, self.out, self.gate_up, self.down]

    # Forward

    def forward(self, residual: Tensor, delta: Tensor | None, on: PassContext) -> tuple[Tensor, Tensor, _Saved]:
        """The residual stream behind attention and the MLP's output, still to be added to it."""
        total, x, scale = ew.add_norm(residual, delta, *_norm(self.norm))
        last_only = self.is_last and on.last_only
        rows = on.layout.segment_rows if last_only else on.layout.token_rows
        heads, lows = self._heads(x, on, last_only)
        attended = Attended(*heads, on.layout, self.scaling, last_only, on.training)
        y, low_out = self.out.forward(attended.out.flatten(1), rows, on)
        start = total[on.layout.last] if last_only else total
        middle, x, middle_scale = ew.add_norm(start, y, *_norm(self.middle_norm))
        gate_up, low_gate_up = self.gate_up.forward(x, rows, on)
        y, low_down = self.down.forward(ew.swiglu(gate_up), rows, on)
        saved = _Saved(total, scale, attended, (*lows, low_out, low_gate_up, low_down), middle, middle_scale, gate_up)
        return middle, y, saved

    def _heads(
        self, x: Tensor, on: PassContext, last_only: bool
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor | None]]:
        """Rotated query and key, and value: [rows, heads, size]."""
        sizes = [self.queries, self.keys, self.keys]
        if self.is_last:
            last = on.layout.last
            own, rows = (x[last], on.layout.segment_rows) if last_only else (x, on.layout.token_rows)
            q, low_q = self.inputs[0].forward(own, rows, on)
            query = q.view(len(q), self.queries, self.size)
            ew.rotate(query, *((on.cos[last], on.sin[last]) if last_only else (on.cos, on.sin)))
            kv, low_kv = self.inputs[1].forward(x, on.layout.token_rows, on)
            key, value = kv.view(len(kv), -1, self.size).split(sizes[1:], dim=1)
            ew.rotate(key, on.cos, on.sin)
            lows = [low_q, low_kv]
        else:
            qkv, low = self.inputs[0].forward(x, on.layout.token_rows, on)
            whole = qkv.view(len(qkv), -1, self.size)
            ew.rotate(whole[:, : self.queries + self.keys], on.cos, on.sin)
            query, key, value = whole.split(sizes, dim=1)
            lows = [low]
        return (query, key, value), lows

    # Backward

    def backward(self, grad: Tensor, saved: _Saved, on: PassContext) -> Tensor:
        """Gradient of the residual stream at the layer's start; `grad` is that at its end, and is overwritten.

        What is behind the first layer is frozen: there the result is not computed, and what is returned means nothing.
        """
        if saved.middle is None:  # recomputed rather than kept
            _, _, saved = self.forward(saved.total, None, on)
        assert saved.middle is not None and saved.middle_scale is not None
        assert saved.gate_up is not None and saved.attended is not None
        last_only = self.is_last and on.last_only
        rows = on.layout.segment_rows if last_only else on.layout.token_rows
        *lows, low_out, low_gate_up, low_down = saved.lows

        way = self.down.grad(grad, low_down, rows, on)
        x_grad, gate_up_grad = way.x_grad, saved.gate_up
        ew.swiglu_grad(x_grad, gate_up_grad)
        way.finish(x_grad)  # which is the MLP's gated product now
        way = self.gate_up.grad(gate_up_grad, low_gate_up, rows, on)
        x_grad = way.x_grad
        ew.norm_grad(x_grad, saved.middle, saved.middle_scale, _norm(self.middle_norm)[0], grad)
        way.finish(x_grad)  # which is the normalised rows now
        way = self.out.grad(grad, low_out, rows, on)
        way.finish(saved.attended.out.flatten(1))
        head_grads = saved.attended.grads(way.x_grad.view_as(saved.attended.out))
        if last_only:
            grad = torch.zeros_like(saved.total).index_copy_(0, on.layout.last, grad)
        ways = self._heads_back(head_grads, lows, on, last_only)
        self._start_back(grad, ways, saved, on, last_only)
        return grad

    def _heads_back(
        self, grads: Sequence[Tensor], lows: Sequence[Tensor | None], on: PassContext, last_only: bool
    ) -> list[Upward]:
        """From gradients of rotated heads back through the products that made them."""
        token_rows, wants_x = on.layout.token_rows, not self.is_first
        if not self.is_last:
            whole = grads[0] if len(grads) == 1 else torch.cat(list(grads), dim=1)
            ew.rotate(whole[:, : self.queries + self.keys], on.cos, on.sin, inverse=True)
            return [self.inputs[0].grad(whole.flatten(1), lows[0], token_rows, on, wants_x)]
        last = on.layout.last
        rows = on.layout.segment_rows if last_only else token_rows
        if len(grads) == 1:
            query, both = (t.contiguous() for t in grads[0].split([self.queries, 2 * self.keys], dim=1))
        else:
            query, both = grads[0].contiguous(), torch.cat(list(grads[1:]), dim=1)
        ew.rotate(query, *((on.cos[last], on.sin[last]) if last_only else (on.cos, on.sin)), inverse=True)
        ew.rotate(both[:, : self.keys], on.cos, on.sin, inverse=True)
        return [
            self.inputs[0].grad(query.flatten(1), lows[0], rows, on, wants_x),
            self.inputs[1].grad(both.flatten(1), lows[1], token_rows, on, wants_x),
        ]

    def _start_back(
        self, grad: Tensor, ways: Sequence[Upward], saved: _Saved, on: PassContext, last_only: bool
    ) -> None:
        """Through the first normalisation: its share is added to `grad`, and A's gradients are finished."""
        if self.is_first:
            x = ew.add_norm(saved.total, None, *_norm(self.norm))[1]
        else:
            x = ways[-1].x_grad
            if self.is_last:
                x = x.index_add_(0, on.layout.last, ways[0].x_grad) if last_only else x.add_(ways[0].x_grad)
            assert saved.scale is not None
            ew.norm_grad(x, saved.total, saved.scale, _norm(self.norm)[0], grad)
        ways[-1].finish(x)
        if self.is_last:
            ways[0].finish(x[on.layout.last] if last_only else x)


class Decoder:
    """All layers of a base whose linears are wrapped (lora.AdapterHost). recompute: keep a layer's input only."""

    def __init__(self, model: Any, host: AdapterHost) -> None:
        decoder: Any = model.get_decoder()
        count = len(decoder.layers)
        self.layers = [
            Layer(layer, model.config, place == 0, place == count - 1) for place, layer in enumerate(decoder.layers)
        ]
        self._embed, self._rotary, self._norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        self.recompute = False

    @property
    def groups(self) -> list[Group]:
        return [group for layer in self.layers for group in layer.groups]

    @property
    def is_steady(self) -> bool:
        """Whether a pass launches the same whatever its positions are; some rotary embeddings look at the longest."""
        return getattr(self._rotary, "rope_type", None) in ("default", "linear", "llama3", "yarn")

    def hidden(self, layout: PassLayout, adapters: PassAdapters, last_only: bool) -> Tensor:
        """Final hidden states: [segments, hidden] at the last tokens (`last_only`) or [tokens, hidden].

        While training, backward through the result adds to the adapters' gradients.
        """
        x = self._embed(layout.ids)[0]
        angles = self._rotary(x.new_empty(1, dtype=torch.float32), layout.positions)
        cos, sin = (t[0].float().contiguous() for t in angles)
        on = PassContext(layout, cos, sin, adapters, last_only)
        if not adapters.training:
            with torch.no_grad():
                return self._forward(x, on, [])[0]
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        hidden: Tensor = _Through.apply(anchor, self, x, on)
        return hidden

    def _forward(self, x: Tensor, on: PassContext, saved: list[_Saved]) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised final rows, and the residual stream and scale that their backward reads."""
        residual, delta = x, None
        for layer in self.layers:
            residual, delta, own = layer.forward(residual, delta, on)
            if on.training:
                saved.append(_Saved(own.total) if self.recompute else own)
            del own
        total, hidden, scale = ew.add_norm(residual, delta, *_norm(self._norm))
        return hidden, total, scale

    def _backward(self, grad: Tensor, total: Tensor, scale: Tensor, saved: list[_Saved], on: PassContext) -> None:
        stream = torch.zeros_like(total)
        ew.norm_grad(grad.to(total.dtype).clone(), total, scale, _norm(self._norm)[0], stream)
        for layer in reversed(self.layers):
            stream = layer.backward(stream, saved.pop(), on)


class _Through(torch.autograd.Function):
    """Ties a pass into autograd: losses on the hidden states call `Decoder._backward`, which fills the adapters'."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, decoder: Decoder, x: Tensor, on: PassContext) -> Tensor:
        ctx.decoder, ctx.on, ctx.layers = decoder, on, []
        hidden, ctx.total, ctx.scale = decoder._forward(x, on, ctx.layers)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ctx.decoder._backward(grads[0], ctx.total, ctx.scale, ctx.layers, ctx.on)
        return None, None, None, None


def _norm(module: nn.Module) -> tuple[Tensor, float]:
    """Weight and epsilon of an RMSNorm, whoever wrote it."""
    found: Any = module
    return found.weight, found.variance_epsilon
