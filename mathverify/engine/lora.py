"""Low-rank adapters: their weights, and the linears that apply each adapter to its own tokens only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mathverify.config import LoraConfig
from mathverify.engine.dropout import drop, linear_key
from mathverify.engine.frozen import FrozenLinear
from mathverify.engine.layout import PassLayout, Span
from mathverify.errors import UserError


class Adapter:
    """One trial's A and B for every linear it targets, float32, all in one flat tensor.

    flat, grad: float32 [parameters]; the optimizer, clipping and the NaN check see these two only.
    pairs: {linear name: (A [rank, in], B [out, rank])}, views of `flat` whose .grad are views of `grad`.
    places: {linear name: offsets of A and B in `flat`}. The A's of linears with one input lie one behind the other, so
    that they are one matrix.

    A starts as PEFT's: uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B as zero, so training starts at the base.
    Each A has a random stream of its own name, so it does not depend on which other linears are targeted.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], lora: LoraConfig, seed: int, device: torch.device) -> None:
        self.lora = lora
        self.shapes = {name: shapes[name] for name in targets(shapes, lora)}
        rank = lora.rank
        count = sum(rank * (inputs + outputs) for inputs, outputs in self.shapes.values())
        self.flat = torch.zeros(count, device=device)
        self.grad = torch.zeros(count, device=device)
        self.places = _places(self.shapes, rank)
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, (inputs, outputs) in self.shapes.items():
            a_place, b_place = self.places[name]
            a, b = self._view(a_place, rank, inputs), self._view(b_place, outputs, rank)
            self.pairs[name] = (a, b)
            generator = torch.Generator().manual_seed((seed << 32) + (linear_key(name) & 0xFFFFFFFF))
            bound = 1.0 / math.sqrt(inputs)
            a.data.copy_(torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator))

    def _view(self, place: int, rows: int, columns: int) -> nn.Parameter:
        end = place + rows * columns
        view = nn.Parameter(self.flat[place:end].view(rows, columns))
        view.grad = self.grad[place:end].view(rows, columns)
        return view


SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of a decoder layer that read the same input."""


def _places(shapes: dict[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, int]]:
    """Offsets of A and B of every linear: for each set with a shared input first all A's, then all B's."""
    sets: dict[tuple[str, ...], list[str]] = {}
    for name in shapes:
        parent, _, last = name.rpartition(".")
        shared: tuple[str, ...] = next((group for group in SHARED_INPUT if last in group), (last,))
        sets.setdefault((parent, *shared), []).append(name)
    a_places, b_places, place = {}, {}, 0
    for (_, *order), names in sets.items():
        for name in sorted(names, key=lambda n: order.index(n.rpartition(".")[2])):
            a_places[name], place = place, place + rank * shapes[name][0]
        for name in names:
            b_places[name], place = place, place + rank * shapes[name][1]
    return {name: (a_places[name], b_places[name]) for name in shapes}


def targets(shapes: dict[str, tuple[int, int]], lora: LoraConfig) -> list[str]:
    """Names of the linears that `lora.target_modules` means: equal, or ending in `.name` (PEFT's rule).

    Raises:
        UserError: one of the target modules is no linear of the base, or the rank is larger than every one's own.
    """
    found: list[str] = []
    for target in lora.target_modules:
        hits = [name for name in shapes if name == target or name.endswith(f".{target}")]
        if not hits:
            known = sorted({name.rpartition(".")[2] for name in shapes})
            raise UserError(f"lora.target_modules: the base has no linear {target!r}, it has {', '.join(known)}")
        found += hits
    wanted = set(found)
    largest = max(min(shapes[name]) for name in wanted)
    if lora.rank > largest:
        raise UserError(f"lora.rank = {lora.rank} is more than the base's linears can have: use at most {largest}")
    return [name for name in shapes if name in wanted]


@dataclass(frozen=True)
class Active:
    """The adapters of the pass that is under way. layout None: adapter 0 applies to every token (generation)."""

    adapters: Sequence[Adapter | None]
    layout: PassLayout | None
    training: bool

    def spans(self, tokens: int) -> list[Span]:
        return self.layout.spans if self.layout is not None else [Span(0, 0, tokens)]


class PackLinear(nn.Module):
    """A linear of the base plus, for each span of tokens, the adapter of that span.

    y = W x + scale * B A dropout(x) (arXiv:2106.09685), x [..., in] -> [..., out] in x's dtype. Adapters are kept in
    float32 and rounded to x's dtype for the product.
    """

    def __init__(self, name: str, frozen: FrozenLinear, host: AdapterHost) -> None:
        super().__init__()
        self.name, self.key = name, linear_key(name)
        self.frozen = frozen
        self._host = [host]  # in a list: nn.Module would take it for a child

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(x)
        active = self._host[0].active
        if active is None or all(a is None or self.name not in a.pairs for a in active.adapters):
            return y
        rows_in, rows_out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        spans = active.spans(len(rows_in))
        # Split, not sliced: the gradient of a slice is a zero tensor of the whole pass, one for each span.
        sizes = [span.end - span.start for span in spans]
        parts = zip(rows_in.split(sizes), rows_out.split(sizes), spans, strict=True)
        pieces = [self._span(x_part, y_part, span, active) for x_part, y_part, span in parts]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(y.shape)

    def _span(self, x: Tensor, y: Tensor, span: Span, active: Active) -> Tensor:
        adapter = None if span.slot is None else active.adapters[span.slot]
        if adapter is None or self.name not in adapter.pairs:
            return y
        a, b = adapter.pairs[self.name]
        if active.training and adapter.lora.dropout > 0 and active.layout is not None:
            x = drop(x, active.layout.token_keys[span.start : span.end], self.key, adapter.lora.dropout)
        return torch.addmm(y, x @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=adapter.lora.scale)


class AdapterHost:
    """Wraps every linear of a base's decoder once, and says which adapters are active.

    shapes: {linear name: (in features, out features)}; names are those of the model's modules, as in PEFT's files.
    """

    def __init__(self, model: nn.Module, skip: nn.Module | None) -> None:
        self.active: Active | None = None
        self.linears: dict[str, PackLinear] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not skip:
                parent, _, attribute = name.rpartition(".")
                packed = PackLinear(name, FrozenLinear(module), self)
                setattr(model.get_submodule(parent), attribute, packed)
                self.linears[name] = packed
        if not self.linears:
            raise UserError(
                f"the base ({type(model).__name__}) has no linear layers of torch's kind: "
                "LoRA here needs a model built of nn.Linear, such as Llama, Mistral, Qwen or Gemma"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (p.frozen.in_features, p.frozen.out_features) for name, p in self.linears.items()}

    @contextmanager
    def applying(self, adapters: Sequence[Adapter | None], layout: PassLayout | None, training: bool) -> Iterator[None]:
        """Within the block, slot i of a layout means adapters[i]."""
        self.active = Active(adapters, layout, training)
        try:
            yield
        finally:
            self.active = None
