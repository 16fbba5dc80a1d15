"""A comparison on a terminal of any width: tables that fold instead of breaking, then the verdict. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import rich.table
from rich.console import Console
from rich.text import Text

from mathverify.compare.reading import Comparison
from mathverify.compare.table import NONE, Table, tables, unfinished
from mathverify.compare.verdict import Verdict
from mathverify.compare.wording import sentences
from mathverify.printable import printable

STYLES = {
    "completed": "", "tie": "yellow", "better": "green", "worse": "", "chosen": "bold", "baseline": "bold",
    "failed": "red", "unreadable": "red", "killed": "red", "running": "cyan", "pruned": "dim", "interrupted": "dim",
}  # fmt: skip


def show(console: Console, comparison: Comparison, verdicts: Sequence[Verdict], limit: int) -> None:
    """Print everything; limit: most rows of a table and most explanations, 0 for all."""
    for table in tables(comparison, verdicts):
        _print_table(console, table, limit)
    _explain(console, comparison, verdicts, limit)
    if not verdicts:
        _say(console, "no verdict: no run has a test result yet", "bold")
    for number, verdict in enumerate(verdicts, 1):
        if len(verdicts) > 1:
            _say(console, f"test set {number} (runs of different test sets are not compared):", "bold")
        for place, sentence in enumerate(sentences(verdict)):
            _say(console, sentence, "bold" if place == 0 else "")


def _print_table(console: Console, table: Table, limit: int) -> None:
    left_out = max(0, len(table.rows) - limit) if limit else 0
    if left_out:
        table = replace(table, rows=table.rows[:limit])
    for part in fitted(table, console.width):
        _say(console, part.title, "bold")
        console.print(_drawn(part))
    if left_out:
        _say(console, f"... and {left_out:,} more (--limit 0 shows all, --table writes all to a file)")
    console.print()


def fitted(table: Table, width: int) -> list[Table]:
    """The table as it is where it fits; else with its settings in one column, then without extras, then in two."""
    joined = table.joined()
    few = joined.only("number", "settings", "quality", "end", "cost")
    for one in (table, joined, few):
        if one.width <= width:
            return [one]
    quality, cost = few.only("number", "settings", "quality", "end"), few.only("number", "settings", "cost")
    if any(column.part == "number" for column in few.columns):  # rows are known by their number
        cost = few.only("number", "cost")
    else:
        cost.rows = [row for row in cost.rows if any(cell.text != NONE for cell in row[1:])]
    cost.title = table.rest
    return [quality, cost] if cost.rows and any(column.part == "cost" for column in cost.columns) else [quality]


def _drawn(table: Table) -> rich.table.Table:
    drawn = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns:
        folds = column.part == "settings" or column.title == "run"
        drawn.add_column(
            Text(column.title, style="dim"), justify="right" if column.right else "left",
            overflow="fold", no_wrap=not folds,
        )  # fmt: skip
    for row in table.rows:
        drawn.add_row(*(Text(cell.text, style=STYLES.get(cell.text, "")) for cell in row))
    return drawn


def _explain(console: Console, comparison: Comparison, verdicts: Sequence[Verdict], limit: int) -> None:
    """One line for each run or place that gave less than a result."""
    lines = [f"{r.state.value} {r.label}: {r.error or _remedy(r.state.value)}" for r in unfinished(comparison)]
    lines += [f"not compared {run.label}: {why}" for verdict in verdicts for run, why in verdict.missing.items()]
    lines += [f"not read: {problem}" for problem in comparison.problems]
    shown = lines[:limit] if limit else lines
    for line in shown:
        _say(console, line)
    if len(shown) < len(lines):
        _say(console, f"... and {len(lines) - len(shown):,} more")
    if lines:
        console.print()


def _remedy(state: str) -> str:
    if state == "killed":
        return "its process is gone; the command that started it, on the same folder, continues it"
    return "no reason recorded"


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(printable(line), style=style), soft_wrap=False)
