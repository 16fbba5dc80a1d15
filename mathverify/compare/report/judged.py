"""Verdicts -> rows of figures and the tables of the page: what compare concluded, in its own words. Concludes "
"nothing."""

from __future__ import annotations

from collections.abc import Sequence

from mathverify.compare.reading import Comparison, RunView
from mathverify.compare.report.facts import Row
from mathverify.compare.table import Table, tables
from mathverify.compare.verdict import By, Verdict
from mathverify.compare.wording import sentences
from mathverify.printable import printable

MOST_SHOWN = 30
"""Configurations and differences in a figure; the tables have all."""


def said(verdicts: Sequence[Verdict]) -> list[str]:
    """The sentences of all verdicts, each with a capital."""
    lines = []
    for number, verdict in enumerate(verdicts, 1):
        own = [printable(sentence) for sentence in sentences(verdict)]
        about = f"Test set {number} of {len(verdicts)}: " if len(verdicts) > 1 else ""
        lines += [about + own[0], *own[1:]]
    return [line[:1].upper() + line[1:] for line in lines]


def verdict_tables(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[Table]:
    """Those of the terminal but for the tables of runs, which the page has its own way of."""
    return [table for table in tables(comparison, verdicts) if not any(c.part == "number" for c in table.columns)]


def verdict_rows(verdicts: Sequence[Verdict], numbers: dict[RunView, int], runs: Sequence[Row]) -> dict[str, list[Row]]:
    """Data of the figures of the first verdict: configurations (means), members (their runs), versus (differences)."""
    made: dict[str, list[Row]] = {"configurations": [], "members": [], "versus": []}
    if not verdicts:
        return made
    verdict = verdicts[0]
    outcomes = {versus.other: versus.outcome.value for versus in verdict.versus}
    if verdict.by is By.configuration:
        for entry in verdict.entries[:MOST_SHOWN]:
            low, high = verdict.intervals.get(entry, (None, None))
            standing = "reference" if entry is verdict.reference else outcomes.get(entry, "not tested")
            label = printable(entry.label)
            made["configurations"].append(
                {"entry": label, "mean": entry.mean, "low": low, "high": high, "seeds": len(entry.runs),
                 "verdict": standing}
            )  # fmt: skip
            made["members"] += [
                {**runs[numbers[run]], "entry": label} for run in entry.runs if numbers.get(run, len(runs)) < len(runs)
            ]
    for versus in sorted(verdict.versus, key=lambda versus: -versus.difference)[:MOST_SHOWN]:
        low, high = (None if bound is None else 100 * bound for bound in (versus.low, versus.high))
        made["versus"].append(
            {"other": printable(versus.other.label), "difference": 100 * versus.difference, "low": low, "high": high,
             "p": versus.corrected, "verdict": versus.outcome.value}
        )  # fmt: skip
    return made
