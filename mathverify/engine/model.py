"""The base as the engine sees it: packed tokens in, verdict scores or token losses out. No optimizer here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from mathverify.base import Base
from mathverify.config import QuantizationKind
from mathverify.engine.attention import ATTENTION, register
from mathverify.engine.decoder import Decoder, PassAdapters, is_supported
from mathverify.engine.frozen import FrozenLinear, drop_scratch
from mathverify.engine.layout import PassLayout
from mathverify.engine.lora import Adapter, AdapterHost
from mathverify.engine.products import Weights, weights_of
from mathverify.errors import UserError

LOGIT_ROWS = 1024
"""Positions whose vocabulary-wide logits are held at once (sequence loss only)."""


@dataclass(frozen=True)
class Ready:
    """Adapters by slot, and their weights as passes need them (None where transformers runs the base)."""

    adapters: Sequence[Adapter | None]
    weights: Weights | None

    @property
    def is_lasting(self) -> bool:
        """Whether it is worth keeping for the next round of the same adapters."""
        return self.weights is not None and self.weights.lasting

    def refresh(self) -> None:
        """Take over what the adapters have become."""
        if self.weights is not None:
            self.weights.refresh()


class PackedModel:
    """A base adopted by the engine: linears wrapped, attention packed. One per base and process (`adopt`)."""

    def __init__(self, base: Base) -> None:
        register()
        self.base, self.device = base, base.device
        head = base.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(f"the base ({type(base.model).__name__}) has no linear output layer: verdicts need one")
        self.head = head
        self.decoder: nn.Module = base.model.get_decoder()
        base.model.set_attn_implementation(ATTENTION)
        self.host = AdapterHost(base.model, skip=head)
        self.fast = Decoder(base.model, self.host) if is_supported(base.model) else None
        if base.quantization is QuantizationKind.fp8:
            self._to_fp8()
        self._finish = _logit_finish(base.model.config)
        self._bare = self.ready([])
        self._now: tuple[Ready, bool] | None = None

    def _to_fp8(self) -> None:
        if self.fast is None:
            kind = self.base.model.config.model_type
            raise UserError(f"quantization = fp8 is not there for {kind} models: use quantization=nf4, int8 or none")
        for group in self.fast.groups:
            group.frozen.to_fp8()

    @property
    def replays(self) -> bool:
        """Whether training passes of one adapter may be recorded as CUDA graphs.

        Not where memory was too short for dense weights: there it is for graphs too.
        """
        fast = self.fast is not None and self.fast.is_steady and not self.fast.recompute
        return fast and self.device.type == "cuda" and self.base.dtype.itemsize == 2 and self.is_dense

    def ready(self, adapters: Sequence[Adapter | None]) -> Ready:
        """Adapters for coming passes, prepared once; stale as soon as one of them changes (`Ready.refresh`)."""
        weights = None if self.fast is None else weights_of(adapters, self.base.dtype, self.device)
        return Ready(adapters, weights)

    def hidden(self, layout: PassLayout, last_only: bool = False) -> Tensor:
        """Final hidden states of a pass: [tokens, hidden], or [segments, hidden] at the last tokens.

        Adapters as `applying` says; none outside of it.
        """
        if self.fast is not None:
            return self.fast.hidden(layout, self._pass_adapters(), last_only)
        out = self.decoder(input_ids=layout.ids, position_ids=layout.positions, use_cache=False, packed=layout)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden[layout.last] if last_only else hidden

    @contextmanager
    def applying(self, ready: Ready, layout: PassLayout | None, training: bool) -> Iterator[None]:
        """Within the block, slot i of a layout means the i-th of these adapters."""
        self._now = (ready, training)
        try:
            with self.host.applying(ready.adapters, layout, training):
                yield
        finally:
            self._now = None

    def _pass_adapters(self) -> PassAdapters:
        ready, training = self._now or (self._bare, False)
        assert ready.weights is not None
        dropouts = [0.0 if adapter is None else adapter.lora.dropout for adapter in ready.adapters]
        return PassAdapters(ready.weights, dropouts, training)

    def scores(self, layout: PassLayout, true_id: int, false_id: int) -> Tensor:
        """Log-odds of True: logit(True) - logit(False) at each segment's last token, float32 [segments].

        Only two rows of the output layer are used. Order: that of `layout.segments`.
        """
        at_verdict = self.hidden(layout, last_only=True).float()
        rows = torch.stack([self.head.weight[true_id], self.head.weight[false_id]]).to(self.device).float()
        logits: Tensor = at_verdict @ rows.t()
        if self.head.bias is not None:
            bias = torch.stack([self.head.bias[true_id], self.head.bias[false_id]])
            logits = logits + bias.to(self.device).float()
        logits = self._finish(logits)
        return logits[:, 0] - logits[:, 1]

    def verdict_losses(self, layout: PassLayout, true_id: int, false_id: int) -> Tensor:
        """Two-way cross-entropy of each segment's verdict, float32 [segments]: softplus(-score) for True."""
        return softplus(-layout.signs * self.scores(layout, true_id, false_id))

    def sequence_losses(self, layout: PassLayout) -> Tensor:
        """Summed next-token cross-entropy of each segment, float32 [segments].

        Segments must include their verdict token; the first token of a segment is never a target.
        """
        self.lend_head(False)
        hidden = self.hidden(layout)
        source = torch.ones(layout.tokens, dtype=torch.bool, device=self.device)
        source[layout.last] = False
        places = source.nonzero()[:, 0]
        targets = layout.ids[0, places + 1]
        owner = torch.repeat_interleave(
            torch.arange(len(layout.segments), device=self.device), torch.as_tensor(layout.lengths - 1).to(self.device)
        )
        losses = hidden.new_zeros(len(layout.segments), dtype=torch.float32)
        for start in range(0, len(places), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            # Recomputed in the backward pass: vocabulary-wide logits of a whole pass would not fit.
            values: Tensor = checkpoint(self._token_losses, hidden[places[part]], targets[part], use_reentrant=False)
            losses = losses.index_add(0, owner[part], values)
        return losses

    def _token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._finish(self.head(hidden).float())
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    @property
    def _dequantised(self) -> list[FrozenLinear]:
        """Linears whose weights passes need dense and which are not stored so; FP8's are multiplied as they are."""
        if self.base.quantization is QuantizationKind.fp8:
            return []
        return [packed.frozen for packed in self.host.linears.values() if packed.frozen.is_quantized]

    def dense_bytes(self) -> int:
        """Bytes that dense copies of the quantised linears take, kept or not; 0 where passes need none."""
        return sum(f.in_features * f.out_features for f in self._dequantised) * self.base.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether passes find every weight as they need it, without dequantising."""
        return all(frozen.kept is not None for frozen in self._dequantised)

    def keep_dense(self, wanted: bool) -> None:
        """Hold dense copies of all quantised linears from now on, or none. With them: the same numbers, without
        dequantising in every pass."""
        if self.base.quantization is QuantizationKind.fp8:
            return
        for group in () if self.fast is None else self.fast.groups:
            group.frozen.keep_dense(wanted, self.base.dtype)
        for packed in self.host.linears.values():
            packed.frozen.keep_dense(wanted, self.base.dtype)
        if wanted:
            drop_scratch()

    def lend_head(self, wanted: bool) -> None:
        """Move the output layer to the host's memory, of which verdicts read two rows, or back to the device.

        A layer that shares its weights with the embedding stays where it is.
        """
        shared = self.head.weight is getattr(self.base.model.get_input_embeddings(), "weight", None)
        if not shared:
            self.head.to("cpu" if wanted else self.device)

    def recompute_activations(self, wanted: bool) -> None:
        """Activation checkpointing of every decoder layer, or none."""
        if self.fast is not None:
            self.fast.recompute = wanted
            return
        layers: Sequence[Any] = getattr(self.decoder, "layers", [])
        for layer in layers:
            layer.gradient_checkpointing = wanted
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            layer.training = wanted  # transformers recomputes in training mode only; the layer's children stay in eval


def adopt(base: Base) -> PackedModel:
    """The engine's view of a base, made once and kept as long as the base is warm."""
    if PackedModel not in base.views:
        base.views[PackedModel] = PackedModel(base)
    view: PackedModel = base.views[PackedModel]
    return view


def _logit_finish(config: Any) -> Any:
    """What some architectures do to logits after the output layer (Gemma's soft cap, Cohere's and Granite's scale)."""
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    def finish(logits: Tensor) -> Tensor:
        logits = logits * factor if factor != 1.0 else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return finish
