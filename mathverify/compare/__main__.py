"""Which run is better, by how much, and is it real?

python -m mathverify.compare outputs/2026-11-23/10-00-00 outputs/2026-11-23/11-00-00
python -m mathverify.compare multirun/rank_grid --table table.csv --table table.md
python -m mathverify.compare multirun/rank_grid --baseline multirun/rank_grid/0
python -m mathverify.compare multirun/rank_grid --report --figures figures
python -m mathverify.compare journal://multirun/rank_grid/study.journal
python -m mathverify.compare --wandb ENTITY/PROJECT
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mathverify.errors import UserError

if TYPE_CHECKING:
    from mathverify.compare.reading import Comparison, RunView
    from mathverify.compare.report.content import Content
    from mathverify.compare.verdict import Verdict

BAD_INPUT, INTERRUPTED = 2, 130
BESIDE = Path("report.html")
"""--report without a path: this, in the folder that is compared, or here where that is not one folder."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}: see python -m mathverify.compare --help", file=sys.stderr)
        sys.exit(BAD_INPUT)


def parser() -> Parser:
    made = Parser(
        prog="python -m mathverify.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "places", nargs="*", metavar="PLACE",
        help="run folder, folder of runs at any depth, or study URL (journal:///path, sqlite:///path, "
        "postgresql://...; #NAME picks one study)",
    )  # fmt: skip
    made.add_argument("--baseline", metavar="RUN", help="compare all others with this run (folder, label or name)")
    made.add_argument(
        "--by", choices=["auto", "run", "configuration"], default="auto",
        help="compare single runs, or settings over their seeds; auto: settings where any has several seeds",
    )  # fmt: skip
    made.add_argument("--confidence", type=float, default=0.95, help="of intervals, and 1 - level of tests (0.95)")
    made.add_argument(
        "--table", metavar="PATH", type=Path, action="append", default=[],
        help="also write the tables: .csv, .md or .tex; may be repeated",
    )  # fmt: skip
    made.add_argument(
        "--report", metavar="PATH.html", type=Path, nargs="?", const=BESIDE,
        help="also write a page to look at, one file; without a path report.html in the folder compared",
    )  # fmt: skip
    made.add_argument(
        "--figures", metavar="FOLDER", type=Path, help="also write its figures as SVG and PNG, for a paper"
    )
    made.add_argument(
        "--wandb", metavar="ENTITY/PROJECT",
        help="make the saved view and the report of this W&B project, also without any PLACE; needs an online account",
    )  # fmt: skip
    made.add_argument("--limit", type=int, default=40, help="most rows of a table on the terminal, 0 for all (40)")
    made.add_argument("--resamples", type=int, default=2000, help="bootstrap draws of questions (2000)")
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; returns the exit code: 0, or 2 for bad input."""
    options = parser().parse_args(arguments)
    stray = options.report is not None and options.report.suffix.lower() not in (".html", ".htm")
    if not options.places and options.wandb is None and not stray:  # a stray place after --report is told of by itself
        parser().error("the following arguments are required: PLACE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal's encoding lacks a name's letters
    try:
        compare(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        from mathverify.printable import printable

        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return BAD_INPUT
    return 0


def compare(options: argparse.Namespace) -> None:
    """Read, judge, show, write.

    Raises:
        UserError: nothing to read, or an option that cannot be.
    """
    _check(options)
    if not options.places:
        _save_views(options.wandb, [])
        return
    from mathverify.compare.reading import read_runs

    comparison = read_runs(options.places)
    baseline = None if options.baseline is None else comparison.find(options.baseline)
    if baseline is not None and baseline.repeats is not None:
        baseline = baseline.repeats
    if baseline is not None and not baseline.counts:
        raise UserError(f"--baseline {options.baseline}: is {baseline.state.value}: choose a run that was completed")
    from rich.console import Console

    from mathverify.compare.show import show
    from mathverify.compare.verdict import By, judge

    verdicts = judge(
        comparison, baseline=baseline, by=By(options.by), confidence=options.confidence,
        resamples=options.resamples, seed=options.seed,
    )  # fmt: skip
    show(Console(highlight=False), comparison, verdicts, options.limit)
    _write(options, comparison, verdicts, baseline)
    if options.wandb is not None:
        _save_views(options.wandb, comparison.varying)


def _write(
    options: argparse.Namespace, comparison: Comparison, verdicts: Sequence[Verdict], baseline: RunView | None
) -> None:
    """The files that were asked for. Raises UserError when a place cannot be written."""
    from mathverify.compare.table import write_table

    for path in options.table:
        with _writing(path):
            write_table(path, comparison, verdicts)
    if options.report is not None or options.figures is not None:
        from mathverify.compare.report.content import collect

        _draw(collect(comparison, verdicts, baseline, options.confidence), options)


def _draw(content: Content, options: argparse.Namespace) -> None:
    """Write what --report and --figures ask for."""
    if options.report is not None:
        from mathverify.compare.report.page import write_report

        only = Path(options.places[0]) if len(options.places) == 1 else None
        beside = options.report is BESIDE and only is not None and only.is_dir()
        target: Path = only / BESIDE if beside and only is not None else options.report
        with _writing(target):
            write_report(content, target)
    if options.figures is not None:
        from mathverify.compare.report.figures import write_figures

        with _writing(options.figures):
            write_figures(content, options.figures)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say what was written, or why it was not."""
    from mathverify.printable import printable

    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): choose another place") from None
    print(f"written: {printable(str(path))}")


def _save_views(target: str, varying: Sequence[str]) -> None:
    from mathverify.compare.wandb_views import SEARCHED, save_views

    for address in save_views(target, [key for key in varying if key != "seed"] or SEARCHED):
        print(f"saved: {address}")


def _check(options: argparse.Namespace) -> None:
    if options.report is not None and options.report.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report {options.report}: a page ends in .html (folders to compare come before --report)")
    if not 0.5 <= options.confidence < 1.0:
        raise UserError(f"--confidence {options.confidence} is not possible: use a number in [0.5, 1)")
    if options.resamples < 100:
        raise UserError(f"--resamples {options.resamples} is not possible: use a whole number >= 100")
    if options.limit < 0 or options.seed < 0:
        raise UserError(f"--limit {options.limit} --seed {options.seed}: neither can be below 0")
    if options.table:
        from mathverify.compare.table import checked_suffix

        for path in options.table:
            checked_suffix(path)
    if options.report is not None or options.figures is not None:
        from mathverify.compare.report import require_extra

        require_extra("--figures" if options.report is None else "--report")
        _check_targets(options)


def _check_targets(options: argparse.Namespace) -> None:
    """What cannot be written is told before everything is read."""
    if options.report is not None and options.report.is_dir():
        raise UserError(f"--report {options.report}: is a folder: give a file such as {options.report / BESIDE}")
    if options.figures is not None and options.figures.exists() and not options.figures.is_dir():
        raise UserError(f"--figures {options.figures}: is a file: give a folder")


if __name__ == "__main__":
    sys.exit(main())
