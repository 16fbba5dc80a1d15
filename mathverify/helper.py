"""What torchrun's other processes do: their share of a run, at the first one's word. No folder, screen or tracker."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mathverify.engine.ranks import Abandoned, Begin, Joined, Score, Step, own_device, place
from mathverify.errors import Interrupted, RunFailed, UserError

if TYPE_CHECKING:
    from mathverify.config import RunConfig
    from mathverify.engine.pack import Pack
    from mathverify.prepare import Workbench


def help_along() -> None:
    """Help with the run that the first process was asked for, until it says that it is over.

    Raises:
        SystemExit: with one line, when this process cannot go on; torchrun then ends the others.
    """
    from mathverify.run import heeding_signals

    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (open to the end of the process)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    here = place()
    try:
        ranks = Joined(here)  # before signals are heeded: one ends a process whose leader never comes
        with heeding_signals() as came:
            ranks.heed(came)
            config: RunConfig | None = ranks.hear()
            if config is not None:
                _help(ranks, replace(config, device=own_device(config.device, here)), came)
            ranks.leave()
    except (UserError, RunFailed) as error:
        sys.exit(f"error: process {here.rank}: {error}")


def _help(ranks: Joined, config: RunConfig, came: Callable[[], bool]) -> None:
    """Do what each word says. What is given up is given up by all, and the leader says what comes next."""
    import torch

    from mathverify.engine.evaluate import score
    from mathverify.prepare import prepare
    from mathverify.progress import silent
    from mathverify.run import interruptible

    def heed(tokens: int) -> None:
        if came():
            raise Interrupted

    ranks.use(config.device)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    bench: Workbench | None = None
    pack: Pack | None = None
    with suppress(Abandoned):
        bench = ranks.together(lambda: prepare(config, interruptible(silent, came)))
    for word in iter(ranks.hear, None):
        assert bench is not None
        with suppress(Abandoned):
            match word:
                case Begin():
                    pack = _begin(ranks, config, bench, word)
                case Step(at) if pack is not None:
                    _refuse_apart(pack, at)
                    pack.step()
                case Score(split, bare) if pack is not None:
                    adapters = [None if bare else pack.trials[0].adapter]
                    score(bench.model, adapters, bench.stores[split], bench.verdicts, bench.budget, heed, ranks)


def _begin(ranks: Joined, config: RunConfig, bench: Workbench, word: Begin) -> Pack:
    """The pack of the one trial, which stands where the leader's does."""
    from mathverify.engine.checkpoint import share_state
    from mathverify.engine.pack import Pack
    from mathverify.engine.trial import Trial

    def start() -> Trial:
        if (word.rows, word.base) != (bench.data_fingerprint, bench.model.base.fingerprint):
            raise UserError("its rows or its base are not those of the first process: give all the same files")
        return Trial.start(config, bench.stores["train"], bench.verdicts, bench.model)

    trial = ranks.together(start)
    share_state(trial, ranks)
    pack = Pack(bench.model, bench.budget, ranks)
    pack.add(trial)
    return pack


def _refuse_apart(pack: Pack, at: tuple[int, ...]) -> None:
    """Raise RunFailed when the leader's trial is at another step: what it computes next would be nonsense."""
    own = tuple(trial.step for trial in pack.running)
    if own != at:
        raise RunFailed(f"it is at step {own} where the first process is at {at}: the same command continues")
