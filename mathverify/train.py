"""One run from the command line: compose, prepare, train a pack of one, evaluate, record.

python -m mathverify.train lora=r64
python -m mathverify.train experiment=higher_batch_r64_b4
python -m mathverify.train --help
"""

from __future__ import annotations

import sys
import time
from typing import Any

from omegaconf import DictConfig

from mathverify import entry

INTERRUPTED = 130


def task(composed: DictConfig) -> Any:
    """What Hydra calls for each job. Returns the validation accuracy, which sweepers maximise."""
    config = entry.to_run_config(composed)
    folder = entry.run_folder()

    # From here on it is heavy: torch and transformers are not imported for --help, --cfg or bad config.
    import torch

    from mathverify.prepare import prepare
    from mathverify.progress import shown
    from mathverify.records import read_record
    from mathverify.run import Interrupted, PackRunner, heeding_signals, open_run
    from mathverify.screen import RunScreen

    start = time.perf_counter()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    with heeding_signals() as stop, RunScreen(config, folder) as screen:
        with shown() as progress:
            bench = prepare(config, progress)
        screen.prepared(bench)
        run = open_run(config, folder, bench)
        if run is None:
            return screen.finished_before(read_record(folder))
        run.spend("prepare", time.perf_counter() - start)
        try:
            PackRunner(bench, screen, stop).run([run])
        except Interrupted:
            screen.interrupted()
            sys.exit(INTERRUPTED)
        return screen.result(run)


if __name__ == "__main__":
    entry.main(task)
