"""Verdicts -> rows of figures and the tables of the page: what compare concluded, in its own words. Concludes "
"nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mathverify.compare.reading import Comparison, RunView
from mathverify.compare.report.facts import Row, shown
from mathverify.compare.seeds import Configuration
from mathverify.compare.table import Table, tables
from mathverify.compare.verdict import By, Verdict
from mathverify.compare.wording import all_sentences

MOST_SHOWN = 30
"""Configurations and differences in a figure; the tables have all."""


def said(verdicts: Sequence[Verdict]) -> list[str]:
    """The sentences of all verdicts, each with a capital."""
    lines = [shown(sentence) for sentence in all_sentences(verdicts)]
    return [line[:1].upper() + line[1:] for line in lines]


def verdict_tables(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[Table]:
    """Those of the terminal but for the tables of runs, which the page has its own way of."""
    found = [table for table in tables(comparison, verdicts) if not any(c.title == "run" for c in table.columns)]
    return [replace(table, title=table.title[:1].upper() + table.title[1:]) for table in found]


def verdict_rows(verdicts: Sequence[Verdict], numbers: dict[RunView, int], runs: Sequence[Row]) -> dict[str, list[Row]]:
    """Data of the figures of the first verdict: configurations (means), members (their runs), versus (differences)."""
    made: dict[str, list[Row]] = {"configurations": [], "members": [], "versus": []}
    if not verdicts:
        return made
    verdict = verdicts[0]
    names = _names(verdict, numbers, runs)
    outcomes = {versus.other: versus.outcome.value for versus in verdict.versus}
    if verdict.by is By.configuration:
        for entry in verdict.entries[:MOST_SHOWN]:
            low, high = verdict.intervals.get(entry, (None, None))
            standing = "reference" if entry is verdict.reference else outcomes.get(entry, "not tested")
            made["configurations"].append(
                {"entry": names[entry], "mean": entry.mean, "low": low, "high": high, "seeds": len(entry.runs),
                 "verdict": standing}
            )  # fmt: skip
            members = [runs[numbers[run]] for run in entry.runs if numbers.get(run, len(runs)) < len(runs)]
            made["members"] += [{**row, "entry": names[entry]} for row in members]
    for versus in sorted(verdict.versus, key=lambda versus: -versus.difference)[:MOST_SHOWN]:
        low, high = (None if bound is None else 100 * bound for bound in (versus.low, versus.high))
        made["versus"].append(
            {"other": names[versus.other], "difference": 100 * versus.difference, "low": low, "high": high,
             "p": versus.corrected, "verdict": versus.outcome.value}
        )  # fmt: skip
    return made


def _names(verdict: Verdict, numbers: dict[RunView, int], runs: Sequence[Row]) -> dict[Configuration, str]:
    """What the figures call the entries: as the page calls their runs, led by the verdict's own names ('#3', 'run 12')
    where it has such for any."""
    of_seeds = verdict.by is By.configuration
    own = {entry: shown(verdict.name(entry)) for entry in verdict.entries}
    are_led = any(name.startswith(("configuration #", "run ")) for name in own.values())
    names = {}
    for place, entry in enumerate(verdict.entries, 1):
        number = numbers.get(entry.runs[0], len(runs))
        settings = str(runs[number]["configuration" if of_seeds else "label"]) if number < len(runs) else own[entry]
        lead = f"#{place}" if of_seeds else f"run {shown(entry.runs[0].label)}"
        names[entry] = f"{lead}, {settings}" if are_led and settings != own[entry] else settings
    return names if len(set(names.values())) == len(names) else own
