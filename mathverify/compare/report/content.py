"""Everything the page and the figures share, made once: numbers, data sets by name, sections, the first pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mathverify.compare.reading import Comparison, RunView
from mathverify.compare.report import charts
from mathverify.compare.report.facts import Facts, Row, gather, pair_of, rank
from mathverify.compare.report.importance import importance
from mathverify.compare.report.judged import said, verdict_rows, verdict_tables
from mathverify.compare.report.rows import RowFacts, row_facts
from mathverify.compare.report.sections import Section, sections
from mathverify.compare.table import Table
from mathverify.compare.verdict import Verdict
from mathverify.errors import UserError


@dataclass(frozen=True)
class Content:
    """pair: numbers of the runs A and B shown first. rows: the test rows, or why they cannot be compared."""

    comparison: Comparison
    facts: Facts
    rows: RowFacts | str
    data: dict[str, list[Row]]
    sections: list[Section]
    sentences: list[str]
    tables: list[Table]
    pair: tuple[int, int]


def collect(
    comparison: Comparison, verdicts: Sequence[Verdict] = (), baseline: RunView | None = None, confidence: float = 0.95
) -> Content:
    """Read what is to be shown. verdicts: of `verdict.judge`; baseline: B of the first pair."""
    ranked = sorted(comparison.runs, key=rank)
    numbers = {run: number for number, run in enumerate(ranked)}
    facts = gather(comparison, confidence)
    rows = row_facts(dict(enumerate(ranked)), facts.predictions)
    weights = importance(facts)
    judged = verdict_rows(verdicts, numbers, facts.runs)
    named = {"configurations": "entry", "members": "entry", "versus": "other"}
    data = charts.tables(facts, weights) | {k: charts.with_lines(judged[k], field) for k, field in named.items()}
    return Content(
        comparison=comparison,
        facts=facts,
        rows=rows,
        data=data,
        sections=sections(facts, weights, rows, verdicts, data),
        sentences=said(verdicts),
        tables=verdict_tables(comparison, verdicts),
        pair=pair_of(facts, None if baseline is None else numbers.get(baseline)),
    )


def make_folder(path: Path) -> None:
    """The folder and its parents. Raises UserError when they cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}): choose another folder") from None
