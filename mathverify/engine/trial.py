"""One trial: its adapter, optimizer, data order and progress. It does not know what else is in the pack."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from mathverify.config import LossKind, RunConfig
from mathverify.engine.dropout import segment_key
from mathverify.engine.layout import Segment
from mathverify.engine.lora import Adapter
from mathverify.engine.optimizer import make_optimizer
from mathverify.engine.schedule import learning_rate

if TYPE_CHECKING:
    from mathverify.engine.model import PackedModel
    from mathverify.tokens.store import TokenStore
    from mathverify.tokens.verdicts import VerdictTokens


class TrialState(Enum):
    """running: more steps to go. finished: all steps done. stopped: ended early on request. failed: see the reason."""

    running = "running"
    finished = "finished"
    stopped = "stopped"
    failed = "failed"


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step of one trial did. loss: mean over examples (label) or over target tokens (sequence)."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    examples: int
    tokens: int


@dataclass(eq=False)
class Trial:
    """A trial's whole state. Everything random is a function of (seed, step), so `step` says where it stands.

    store: training rows as segments. loss_scale: factor on the loss of float16 passes, undone before the update.
    validation_due: it is to be validated at this step before it takes the next one.
    """

    config: RunConfig
    store: TokenStore
    verdicts: VerdictTokens
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    loss_scale: float = 1.0
    step: int = 0
    examples: int = 0
    tokens: int = 0
    validation_due: bool = False
    state: TrialState = TrialState.running
    reason: str | None = None
    _order: tuple[int, NDArray[np.int64]] | None = field(default=None, repr=False)

    @classmethod
    def start(cls, config: RunConfig, store: TokenStore, verdicts: VerdictTokens, model: PackedModel) -> Trial:
        """A trial at step 0 with a fresh adapter on the model's device.

        Raises:
            UserError: a target module is not in the base.
        """
        adapter = Adapter(model.host.shapes, config.lora, config.seed, model.device)
        scale = 2.0**14 if model.base.dtype is torch.float16 else 1.0
        return cls(config, store, verdicts, adapter, make_optimizer(adapter, config.optimizer), scale)

    @property
    def steps(self) -> int:
        return self.config.train.steps

    def segments(self, slot: int) -> list[Segment]:
        """The examples of the coming step. Weights make the sum of weighted losses the step's mean loss."""
        rows = self._rows(self.step)
        with_verdict = self.config.train.loss is LossKind.sequence
        ids = [self._ids(int(row), with_verdict) for row in rows]
        targets = sum(len(i) - 1 for i in ids) if with_verdict else len(ids)
        return [
            Segment(
                ids=row_ids,
                label=bool(self.store.labels[row]),
                slot=slot,
                weight=self.loss_scale / targets,
                key=segment_key(self.config.seed, self.step, place),
            )
            for place, (row, row_ids) in enumerate(zip(rows, ids, strict=True))
        ]

    def _ids(self, row: int, with_verdict: bool) -> NDArray[np.int32]:
        ids: NDArray[np.int32] = self.store.ids(row)
        if not with_verdict:
            return ids
        verdict = self.verdicts.true_id if self.store.labels[row] else self.verdicts.false_id
        return np.append(ids, np.int32(verdict))

    def _rows(self, step: int) -> NDArray[np.int64]:
        """Rows of a step: consecutive places in an endless stream of shuffled epochs."""
        size = self.config.train.examples_per_step
        places = np.arange(step * size, (step + 1) * size)
        epochs, inside = np.divmod(places, len(self.store))
        return np.array([self._epoch(int(e))[i] for e, i in zip(epochs, inside, strict=True)], dtype=np.int64)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.config.seed, epoch]))
            self._order = (epoch, generator.permutation(len(self.store)))
        return self._order[1]

    def update(self, loss: float, tokens: int) -> StepReport | None:
        """Clip, step the optimizer, advance. None when the trial fails, or must repeat the step at a lower loss scale.

        loss: the step's mean loss, as computed from the passes. tokens: how many went into them.
        """
        grad = self.adapter.grad
        if self.loss_scale != 1.0:
            grad.div_(self.loss_scale)
        norm = float(torch.linalg.vector_norm(grad))
        if not math.isfinite(loss):
            self.fail(f"loss is {loss} at step {self.step + 1}")
            return None
        if not math.isfinite(norm):
            if self.loss_scale > 1.0:
                self.loss_scale /= 2.0  # float16 overflow: not the trial's fault
            else:
                self.fail(f"gradient norm is {norm} at step {self.step + 1}")
            return None
        clip = self.config.optimizer.max_grad_norm
        if clip is not None and norm > clip:
            grad.mul_(clip / norm)
        rate = learning_rate(self.config.optimizer, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            self.optimizer.step()
        except torch.OutOfMemoryError:  # its state is made in the first step
            self.fail(f"out of memory for the optimizer's state at step {self.step + 1}: use optimizer=adamw_8bit")
            return None
        size = self.config.train.examples_per_step
        self.step, self.examples, self.tokens = self.step + 1, self.examples + size, self.tokens + tokens
        if self.step >= self.steps:
            self.state = TrialState.finished
        return StepReport(self.step, loss, rate, norm, size, tokens)

    def fail(self, reason: str) -> None:
        """Leave the pack: no update is made, the parameters stay as they were."""
        self.state, self.reason = TrialState.failed, reason
