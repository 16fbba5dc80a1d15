"""Work that test_ranks.py has done by one process and by two that torchrun starts; not a test by itself.

python -m torch.distributed.run --nproc-per-node 2 -m tests.engine.ranks_worker FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mathverify.base import Base
from mathverify.config import LossKind, OptimizerKind, RunConfig
from mathverify.engine.checkpoint import share_state
from mathverify.engine.evaluate import score
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.ranks import Abandoned, Joined, Ranks, Step, place
from mathverify.engine.trial import Trial
from mathverify.errors import UserError

from .conftest import VERDICTS, Rows, llama, make_config, random_rows

BUDGET = 10**6


class Team:
    """One process's view of all of this: what it trains with, and how it hears of a step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.model = PackedModel(Base(llama(), torch.device("cpu"), torch.float32, "random"))
        self.rows: Rows = random_rows(60)

    def start(self, config: RunConfig) -> Trial:
        return Trial.start(config, self.rows, VERDICTS, self.model)  # type: ignore[arg-type]

    def pack(self, *trials: Trial) -> Pack:
        pack = Pack(self.model, TokenBudget(BUDGET), self.ranks)
        for trial in trials:
            pack.add(trial)
        return pack

    def steps(self, pack: Pack, count: int) -> list[list[float]]:
        """Losses of each step, trial by trial."""
        losses = []
        for _ in range(count):
            if isinstance(self.ranks, Joined) and self.ranks.rank > 0:
                assert isinstance(self.ranks.hear(), Step)
            losses.append([report.loss for _, report in pack.step()])
        return losses

    def outcome(self, pack: Pack, losses: list[list[float]]) -> dict[str, Any]:
        return {"losses": losses, "adapters": [trial.adapter.flat.tolist() for trial in pack.trials]}

    def alike(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is bitwise the same on all processes."""
        mean = self.ranks.sum(lambda: tensor.double().numpy() / self.ranks.size, tensor.numel())
        differs = float((mean != tensor.double().numpy()).any())
        return float(self.ranks.sum(lambda: np.array([differs]), 1)[0]) == 0.0


def several_trials(team: Team) -> dict[str, Any]:
    """Trials of both losses, with dropout, clipping and batches of their own."""
    configs = [
        make_config(0, dropout=0.2, max_grad_norm=0.05),
        make_config(1, rank=2, loss=LossKind.sequence, batch_size=2),
    ]
    pack = team.pack(*map(team.start, configs))
    found = team.outcome(pack, team.steps(pack, 6))
    return found | {"alike": all(team.alike(trial.adapter.flat) for trial in pack.trials)}


def one_example(team: Team) -> dict[str, Any]:
    """One example a step: there is nothing for a second process to do."""
    pack = team.pack(team.start(make_config(batch_size=1, grad_accumulation=1)))
    return team.outcome(pack, team.steps(pack, 3))


def out_of_memory(team: Team) -> dict[str, Any]:
    """Memory that is too small on the last process only."""
    pack, whole = team.pack(team.start(make_config(dropout=0.1))), team.model.hidden

    def small(layout: Any, last_only: bool = False) -> Any:
        if layout.tokens > 30:  # of a segment or two
            raise torch.OutOfMemoryError("injected")
        return whole(layout, last_only)

    if team.ranks.rank == team.ranks.size - 1:
        team.model.hidden = small  # type: ignore[method-assign]
    try:
        found = team.outcome(pack, team.steps(pack, 3))
    finally:
        team.model.hidden = whole  # type: ignore[method-assign]
    halved = float(team.ranks.sum(lambda: np.array([float(pack.budget.tokens < BUDGET)]), 1)[0])
    return found | {"halved": halved}


def scores(team: Team) -> dict[str, Any]:
    adapter = team.start(make_config()).adapter
    adapter.flat.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    found = score(team.model, [None, adapter], team.rows, VERDICTS, TokenBudget(100), ranks=team.ranks)  # type: ignore[arg-type]
    return {"scores": found.tolist()}


def resumed(team: Team, kind: OptimizerKind = OptimizerKind.adamw_8bit) -> dict[str, Any]:
    """The leader has taken three steps by itself; the others start anew and are put where it stands."""
    config = make_config(rank=16, max_steps=6)
    config.optimizer.kind = kind
    trial = team.start(config)
    if team.ranks.rank == 0:
        alone = Pack(team.model, TokenBudget(BUDGET))
        alone.add(trial)
        for _ in range(3):
            alone.step()
    share_state(trial, team.ranks)
    pack = team.pack(trial)
    return team.outcome(pack, team.steps(pack, 3)) | {"alike": team.alike(trial.adapter.flat)}


def failing(ranks: Ranks) -> dict[str, Any]:
    """What each process learns when the last one fails, and whether they can go on."""

    def work() -> np.ndarray:
        if ranks.rank == ranks.size - 1:
            raise UserError("no luck here")
        return np.ones(2)

    told = ""
    try:
        ranks.sum(work, 2)
    except (UserError, Abandoned) as error:
        told = f"{type(error).__name__}: {error}"
    return {"told": told, "after": ranks.sum(lambda: np.ones(1), 1).tolist()}


def all_of_it(ranks: Ranks, signal_to_last: Callable[[], None]) -> dict[str, Any]:
    torch.set_num_threads(1)
    team = Team(ranks)
    found = {
        "several trials": several_trials(team),
        "one example": one_example(team),
        "out of memory": out_of_memory(team),
        "scores": scores(team),
        "resumed": resumed(team),
        "failing": failing(ranks),
    }
    before = ranks.stop()
    signal_to_last()
    ranks.together(lambda: None)
    return found | {"stop": [before, ranks.stop()]}


def main() -> None:
    came: list[int] = []
    here = place()
    before = threads()
    ranks = Joined(here)
    ranks.heed(lambda: bool(came))
    found = all_of_it(ranks, lambda: came.append(15) if here.rank == here.size - 1 else None)
    if here.rank > 0:
        assert ranks.hear() is None
    ranks.leave()
    if here.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found | {"threads left": sorted(threads() - before)}))


def threads() -> set[str]:
    """Of this process, torch's among them; by number and name."""
    return {f"{task.name} {(task / 'comm').read_text().strip()}" for task in Path("/proc/self/task").glob("*")}


if __name__ == "__main__":
    main()
