"""The pack: trials that share a base take their steps together, in passes of at most N tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mathverify.config import LossKind
from mathverify.engine.budget import has_room_beside, share_of_step
from mathverify.engine.layout import PassLayout, Segment
from mathverify.engine.lora import Adapter
from mathverify.engine.model import PackedModel, Ready
from mathverify.engine.passes import TokenBudget, cut
from mathverify.engine.ranks import Ranks, Step
from mathverify.engine.replay import Replays, is_small
from mathverify.engine.trial import StepReport, Trial, TrialState


class Pack:
    """Trials in training. One call of `step` (a round) is one optimizer step of every running trial.

    After an out-of-memory the round is repeated with a smaller budget; since nothing random has a state, it is the
    same round. shares: of the last round's tokens, by trial; trials that failed in it are among them.

    ranks: processes that have the same pack. Each computes its share of a round's segments, as its own memory allows;
    gradients are summed, so all make the same update.
    """

    def __init__(self, model: PackedModel, budget: TokenBudget, ranks: Ranks | None = None) -> None:
        self.model = model
        self.budget = budget
        self.ranks = ranks or Ranks()
        self.trials: list[Trial] = []
        self.shares: dict[Trial, float] = {}
        self._kept: _Kept | None = None
        own = weakref.ref(self)  # the budget outlives the pack, whose memory the next one wants
        budget.spare = lambda: (pack := own()) is not None and pack._let_go_of_recorded()

    def add(self, trial: Trial) -> None:
        """A trial joins from the next round on."""
        self.trials.append(trial)
        self._kept = None

    def remove(self, trial: Trial) -> None:
        """A trial leaves; the others do not notice."""
        self.trials.remove(trial)
        self.shares.pop(trial, None)
        self._kept = None

    @property
    def replays(self) -> Replays | None:
        """The passes that this round's trial has recorded, if they are kept for its next one."""
        return None if self._kept is None else self._kept.replays

    @property
    def running(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state is TrialState.running]

    def step(self) -> list[tuple[Trial, StepReport]]:
        """One round. A trial that fails in it, or must repeat its step, has no report.

        Raises:
            UserError: a single segment does not fit into memory.
        """
        trials = self.running
        self.ranks.tell(Step(tuple(trial.step for trial in trials)))
        rounds = [trial.segments(slot) for slot, trial in enumerate(trials)]
        segments = [segment for own in rounds for segment in own]
        losses = self._summed(trials, segments)
        tokens = [sum(len(segment) for segment in own) for own in rounds]
        self.shares = {trial: count / sum(tokens) for trial, count in zip(trials, tokens, strict=True)}
        reports = []
        for trial, count, loss in zip(trials, tokens, losses, strict=True):
            report = trial.update(loss / trial.loss_scale, count)
            if report is not None:
                reports.append((trial, report))
        return reports

    def _summed(self, trials: Sequence[Trial], segments: Sequence[Segment]) -> list[float]:
        """`_passes` over all processes, each with its share of the segments."""
        own = [segments[i] for i in self.ranks.share([len(s) for s in segments])]

        def passes() -> NDArray[np.float64]:
            lengths = [len(s) for s in own]
            return np.array(self.budget.until_it_fits(lengths, lambda: self._passes(trials, own)))

        losses: list[float] = self.ranks.sum(passes, len(trials)).tolist()
        for trial in trials:
            self.ranks.add(trial.adapter.grad)
        return losses

    def _passes(self, trials: Sequence[Trial], segments: Sequence[Segment]) -> list[float]:
        """Forward and backward of a whole round: gradients into the adapters, summed weighted losses by slot."""
        for trial in trials:
            trial.adapter.grad.zero_()
        totals = torch.zeros(len(trials), device=self.model.device)
        kept = self._ready(trials)
        for kind, part in self._cut(trials, segments):
            self._one_pass(trials, kept, kind, part, totals)
        sums: list[float] = totals.tolist()
        return sums

    def _ready(self, trials: Sequence[Trial]) -> _Kept:
        """The trials' adapters as passes need them, kept for the next round of the same trials if that is worth it."""
        adapters: list[Adapter | None] = [trial.adapter for trial in trials]
        if self._kept is not None and self._kept.ready.adapters == adapters:
            self._kept.ready.refresh()
            return self._kept
        self._kept = None  # before others take memory
        kept = _Kept(self.model.ready(adapters), Replays(self.model.device, self._room(trials[0])))
        if kept.ready.is_lasting:
            self._kept = kept
        return kept

    def _let_go_of_recorded(self) -> bool:
        return self._kept is not None and self._kept.replays.make_room()

    def _room(self, trial: Trial) -> Callable[[int], bool]:
        """Whether there is memory for a recorded pass of a trial beside the largest that is not."""
        model, budget, processes = self.model, self.budget, self.ranks.size  # not the pack, which holds what is kept

        def has_room(tokens: int) -> bool:
            largest = int(trial.store.lengths.max()) * share_of_step([trial.config], processes)
            return has_room_beside(model, trial.config, min(budget.tokens, largest), tokens, tokens <= budget.held)

        return has_room

    def _cut(self, trials: Sequence[Trial], segments: Sequence[Segment]) -> Iterator[tuple[LossKind, list[Segment]]]:
        """Passes of one kind of loss each."""
        for kind in LossKind:
            own = [s for s in segments if s.slot is not None and trials[s.slot].config.train.loss is kind]
            for indices in cut([len(s) for s in own], self.budget.tokens):
                yield kind, [own[i] for i in indices]

    def _one_pass(
        self, trials: Sequence[Trial], kept: _Kept, kind: LossKind, segments: Sequence[Segment], totals: Tensor
    ) -> None:
        def work(layout: PassLayout) -> Tensor:
            with self.model.applying(kept.ready, layout, training=True):
                weighted = self._losses(trials[0], kind, layout) * layout.weights
                # Inside the block: with recomputed activations the backward pass runs the adapters again.
                weighted.sum().backward()
            return weighted.detach()

        if self._replays(trials, kind, segments):
            totals += kept.replays.losses(segments, work).sum()
            return
        layout = PassLayout(segments, self.model.device)
        weighted = work(layout)
        # Row sums, not index_add_, which on a GPU adds in whatever order its threads come. Chosen, not multiplied by
        # zero: a trial whose loss is not a number stays the only one.
        own = layout.slots[None, :] == torch.arange(len(totals), device=totals.device)[:, None]
        totals += torch.where(own, weighted, 0.0).sum(dim=1)

    def _replays(self, trials: Sequence[Trial], kind: LossKind, segments: Sequence[Segment]) -> bool:
        """Whether a pass is of the kind that is rounded up and recorded."""
        small = is_small(sum(len(segment) for segment in segments), self.budget.tokens)
        return small and len(trials) == 1 and kind is LossKind.label and self.model.replays

    def _losses(self, trial: Trial, kind: LossKind, layout: PassLayout) -> Tensor:
        if kind is LossKind.sequence:
            return self.model.sequence_losses(layout)
        return self.model.verdict_losses(layout, trial.verdicts.true_id, trial.verdicts.false_id)


@dataclass(frozen=True)
class _Kept:
    """What rounds of the same trials share: their adapters, ready for passes, and the passes recorded with them."""

    ready: Ready
    replays: Replays
