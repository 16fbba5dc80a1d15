"""One run from the command line: compose, prepare, train a pack of one, evaluate, record.

python -m mathverify.train lora=r64
python -m mathverify.train experiment=higher_batch_r64_b4
python -m mathverify.train --help
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from mathverify import entry
from mathverify.engine.ranks import leading, place
from mathverify.errors import Interrupted, RunFailed, empty_frames
from mathverify.judge import current_judge

if TYPE_CHECKING:
    from rich.console import Console

    from mathverify.config import RunConfig

INTERRUPTED = 130


def task(composed: DictConfig) -> float | None:
    """What Hydra calls for each job. Returns the validation accuracy, which sweepers maximise."""
    folder = entry.run_folder()
    try:
        with entry.refusing(folder):
            return train_one(entry.to_run_config(composed), folder, trial=entry.trial_number())
    except Exception as error:
        empty_frames(error)  # Hydra keeps it until the grid's last job has ended
        raise


def train_one(
    config: RunConfig, folder: Path, console: Console | None = None, trial: int | None = None
) -> float | None:
    """Do one run in `folder`, continuing it if it was cut short, and show it.

    Args:
        trial: its number in the study that it belongs to, which has a screen of its own.

    Returns:
        Accuracy on validation at the end.

    Raises:
        UserError: bad input of any kind.
        RunFailed: its loss was not finite, say; the folder's record has the reason.
        SystemExit: with code INTERRUPTED after a signal.
    """
    # From here on it is heavy: torch and transformers are not imported for --help, --cfg or bad config.
    import torch

    from mathverify.prepare import prepare
    from mathverify.progress import shown
    from mathverify.records import read_record
    from mathverify.run import PackRunner, heeding_signals, interruptible, open_run
    from mathverify.screen import RunScreen, TrialScreen
    from mathverify.tracking import uploads_in_background

    start = time.perf_counter()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    own = RunScreen(config, folder, console) if trial is None else TrialScreen(config, folder, trial, console)
    with uploads_in_background(), heeding_signals() as came, own as screen:
        try:
            with leading(config, config.device, came) as ranks:
                with shown() as progress:
                    bench = ranks.together(lambda: prepare(config, interruptible(progress, ranks.stop)))
                screen.prepared(bench)
                run = open_run(config, folder, bench, current_judge())
                if run is None:
                    return screen.finished_before(read_record(folder))
                run.spend("prepare", time.perf_counter() - start)
                PackRunner(bench, screen, ranks.stop, ranks=ranks).run([run])
        except Interrupted:
            screen.interrupted()
            sys.exit(INTERRUPTED)
        if run.error is not None:
            raise run.error
        accuracy = screen.result(run)
    if accuracy is None:
        raise RunFailed(run.record.reason)
    return accuracy


def main() -> None:
    """The command line. Of several processes that torchrun starts the first one is the run, the others help it."""
    if place().rank == 0:
        entry.main(task)
    elif entry.is_a_run(sys.argv[1:]):
        from mathverify.helper import help_along

        help_along()


if __name__ == "__main__":
    main()
