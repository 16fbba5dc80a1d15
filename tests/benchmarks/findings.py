"""The mission's questions, asked on the embedded model: does rank help, does batch size help, what does each cost?

python -m tests.benchmarks.findings                          three studies of three settings with eight seeds each
python -m tests.benchmarks.findings --only rank --seeds 4
python -m tests.benchmarks.findings -- data.test_rows=4000   overrides for every run

Writes docs/findings/: README.md with what may be said and the tables behind it, and for each study report.html, figures
and table.csv. The same command continues after a kill and repeats nothing that is done. Runs are trained one by one in
each worker, so that their seconds are their own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mathverify.compare.reading import Comparison, State, read_runs
from mathverify.compare.report.content import collect
from mathverify.compare.report.figures import write_figures
from mathverify.compare.report.page import write_report
from mathverify.compare.table import configuration_table, markdown, versus_table, write_table
from mathverify.compare.verdict import Verdict, judge
from mathverify.compare.wording import sentences
from mathverify.files import write_atomic

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Study:
    """One question. sweep: what is run; seeds are added. settings: how many there are without seeds.
    equal_examples: hold examples equal instead of steps."""

    name: str
    question: str
    sweep: str
    equal_examples: bool = False
    settings: int = 3


STUDIES = (
    Study("rank", "Does a higher rank help? (alpha = rank, equal steps, so equal examples)", "rank_grid"),
    Study("batch_equal_steps", "Does a bigger batch help at equal steps? (it sees more examples)", "batch_grid"),
    Study(
        "batch_equal_examples", "Does a bigger batch help at equal examples? (it takes fewer steps)", "batch_grid",
        equal_examples=True,
    ),
)  # fmt: skip

SHOWN = ("accuracy_by_lora_rank", "accuracy_by_train_batch_size", "cost_quality")
"""Figures that stand in the page itself."""

CLOSING = """\
These are the numbers of a tiny model (the embedded one, on generated word problems): they show how the question is asked,
and need not hold for a large one. On Llama-3.1-8B the mission reported 75.8% (rank 16), 78.6% (rank 64) and 80.3% (rank
64, batch 4 x 4), one run each and without intervals; these have not been reproduced here.
"""


def command(study: Study, options: argparse.Namespace, runs: Path) -> list[str]:
    """What runs a study, and continues it."""
    seeds = options.seeds
    length = f"train.max_examples={options.steps * 16}" if study.equal_examples else f"train.max_steps={options.steps}"
    return [
        sys.executable, "-m", "mathverify.train", "-m", f"sweep={study.sweep}", length,
        f"seed=range(1,{seeds + 1})", f"hydra.sweeper.n_trials={study.settings * seeds}", "hydra.sweeper.n_jobs=1",
        "hydra/launcher=basic", f"hydra.sweeper.study_name={study.name}", f"hydra.sweep.dir='{runs / study.name}'",
        "tracking=none", *options.overrides,
    ]  # fmt: skip


def run(study: Study, options: argparse.Namespace) -> None:
    """Bring a study to its end with several processes. Raises SystemExit when one of them fails."""
    words = command(study, options, options.runs)
    total = study.settings * options.seeds
    options.runs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = []
    for number in range(options.workers):
        log = options.runs / f"{study.name}.worker{number}.log"
        with log.open("ab") as file:
            workers.append((log, subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)))
    before = -1
    try:
        while any(worker.poll() is None for _, worker in workers):
            if (done := finished(options.runs / study.name)) != before:
                print(f"{study.name}: {done} of {total} runs done", flush=True)
                before = done
            time.sleep(2)
    except KeyboardInterrupt:  # the workers had the signal too: they save and end
        for _, worker in workers:
            worker.wait()
        raise
    failed = [f"{log} ends with: {log.read_text().strip()[-300:]}" for log, worker in workers if worker.returncode]
    if failed:
        sys.exit(f"{study.name}: a worker failed; {failed[0]}")


def finished(folder: Path) -> int:
    return sum('"status": "completed"' in path.read_text() for path in folder.glob("*/result.json"))


def write(studies: Sequence[Study], options: argparse.Namespace) -> Path:
    """Judge all studies and write the page; returns it."""
    parts = ["# Does rank help, does batch size help, and what does it cost?", CLOSING, _made_by(options, studies)]
    for study in studies:
        comparison = read_runs([options.runs / study.name])
        _require_all(study, comparison, options.seeds)
        (verdict,) = judge(comparison)
        parts.append(_section(study, comparison, verdict, options))
    page: Path = options.out / "README.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, ("\n\n".join(part.strip() for part in parts) + "\n").encode())
    return page


def _section(study: Study, comparison: Comparison, verdict: Verdict, options: argparse.Namespace) -> str:
    folder: Path = options.out / study.name
    folder.mkdir(parents=True, exist_ok=True)
    said = sentences(verdict)
    table = folder / "table.csv"
    write_table(table, comparison, [verdict])
    # Run folders as the commands below name them, not as they lie on this machine.
    write_atomic(table, table.read_text("utf-8").replace(f"{options.runs}/", "multirun/").encode())
    content = collect(comparison, [verdict])
    write_report(content, folder / "report.html")
    # PNGs would weigh megabytes in the repository
    written = write_figures(content, folder / "figures", kinds=("svg",))
    pictures = [path.stem for path in written if path.suffix == ".svg"]
    about = f"{verdict.rows:,} test rows of {verdict.questions:,} questions, mean over {options.seeds} seeds"
    shown = [configuration_table(verdict, about), versus_table(verdict)]
    words = command(study, options, Path("multirun"))
    links = (
        f"To look at: [report.html]({study.name}/report.html); for a paper: [figures]({study.name}/figures); every run: "
        f"[table.csv]({study.name}/table.csv)."
    )
    return "\n\n".join([
        f"## {study.question}",
        "\n".join(f"- {sentence}" for sentence in said),
        *(f"![{name}]({study.name}/figures/{name}.svg)" for name in pictures if name in SHOWN),
        markdown(shown).strip(),
        f"{links} Run by `python {shlex.join(words[1:])}`.",
    ])  # fmt: skip


def _require_all(study: Study, comparison: Comparison, seeds: int) -> None:
    done = [run for run in comparison.runs if run.state is State.completed]
    if len(done) != study.settings * seeds:
        others = ", ".join(f"{run.label} {run.state.value}" for run in comparison.runs if run not in done)
        sys.exit(f"{study.name}: {len(done)} of {study.settings * seeds} runs are completed ({others}): run it again")


def _made_by(options: argparse.Namespace, studies: Sequence[Study]) -> str:
    """Where the numbers come from, as the runs themselves recorded it."""
    run = read_runs([options.runs / studies[0].name]).runs[0]
    where = run.record().provenance
    return (
        f"Made by `make findings`, first run on {run.started[:10]}, on {where.cpu_count} CPU cores ({where.platform}), "
        f"{options.workers} runs at a time with one thread each, mathverify {where.mathverify} at commit "
        f"{(where.git_commit or 'unknown')[:12]}{' with changes' if where.git_dirty else ''}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[study.name for study in STUDIES], action="append")
    parser.add_argument("--seeds", type=int, default=8, help="of each setting (8)")
    parser.add_argument(
        "--steps", type=int, default=400, help="of every run, or with equal examples of 16 a step (400)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that share a study (2)")
    parser.add_argument("--runs", type=Path, default=ROOT / "multirun" / "findings", help="where run folders go")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "findings", help="where the page goes")
    parser.add_argument("overrides", nargs="*", help="behind --: settings of every run")
    options = parser.parse_args(arguments)
    options.runs = options.runs.absolute()
    studies = [study for study in STUDIES if not options.only or study.name in options.only]
    for study in studies:
        run(study, options)
    print(f"written: {write(studies, options)}")


if __name__ == "__main__":
    main()
