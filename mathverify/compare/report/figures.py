"""Figures for a paper: the page's own specs as SVG and PNG, with larger type, no tools, and captions in a file."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from mathverify.compare.reading import Comparison, RunView
from mathverify.compare.report import charts, theme
from mathverify.compare.report.facts import Facts, Row, gather, pair_of, rank
from mathverify.compare.report.importance import importance
from mathverify.compare.report.pair import pair_tables
from mathverify.compare.report.rows import row_facts
from mathverify.compare.report.sections import Figure, sections
from mathverify.files import write_atomic
from mathverify.records import redact

COLUMN, PAGE = 340, 680
"""Widths in CSS pixels (96 an inch): one column of a paper, and two."""
PPI = 300


def write_figures(comparison: Comparison, folder: Path, *, baseline: RunView | None = None) -> list[Path]:
    """Write NAME.svg and NAME.png of every figure that has something to show, and captions.md; returns the paths."""
    import vl_convert

    ranked = sorted(comparison.runs, key=rank)
    facts = gather(comparison)
    rows = row_facts(dict(enumerate(ranked)), facts.predictions, with_text=False)
    weights = importance(facts)
    figures = [figure for section in sections(facts, weights, rows) for figure in section.figures]
    if facts.completed:
        caption = (
            f"The best {charts.MOST_RANKED} finished runs by test accuracy, with 95% intervals over test questions."
        )
        figures.insert(0, Figure("ranking", charts.ranking(facts), caption, "runs", wide=True))
    pair = pair_of(facts, ranked.index(baseline) if baseline in ranked else None)
    tables = _tables(facts, weights, pair)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for figure in figures:
        spec = on_paper(figure, facts, tables, pair)
        for ending, content in (
            ("svg", vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]).encode()),
            ("png", vl_convert.vegalite_to_png(spec, ppi=PPI, allowed_base_urls=[])),
        ):
            written.append(folder / f"{figure.id}.{ending}")
            write_atomic(written[-1], content)
    written.append(folder / "captions.md")
    write_atomic(written[-1], _captions(facts, figures, pair).encode("utf-8", "replace"))
    return written


def on_paper(figure: Figure, facts: Facts, tables: dict[str, list[Row]], pair: tuple[int, int]) -> dict[str, Any]:
    """A spec that stands alone: its data within, its size fixed, its A and B named."""
    spec: dict[str, Any] = theme.painted(deepcopy(figure.spec), theme.palette("paper"))
    spec["config"] = theme.config("paper")
    spec["width"] = PAGE if figure.wide else COLUMN
    spec["height"] = min(spec["height"], 240) if not figure.wide else spec["height"]
    del spec["autosize"]
    for parameter in spec["params"]:
        if parameter["name"] == "most":
            parameter["value"] = max((row["rows"] for row in tables["pair_scores"]), default=1)
    named = {name for name in charts.data_names(spec) if name in tables}
    spec["datasets"] = spec.get("datasets", {}) | {name: redact(tables[name]) for name in named}
    _name_sides(spec, facts, pair)
    return spec


def _name_sides(spec: Any, facts: Facts, pair: tuple[int, int]) -> None:
    """Give every colour of A and B a legend that says which runs they are: on paper nothing else does."""
    if isinstance(spec, list):
        for part in spec:
            _name_sides(part, facts, pair)
    elif isinstance(spec, dict):
        colour = spec.get("color")
        if isinstance(colour, dict) and colour.get("field") == "side":
            a, b = (str(redact(facts.runs[n]["label"])).replace("\\", "\\\\").replace("'", "\\'") for n in pair)
            colour["legend"] = {"labelExpr": f"datum.label === 'A' ? 'A: {a}' : 'B: {b}'", "direction": "vertical",
                                "labelLimit": 320, "symbolOpacity": 1}  # fmt: skip
        for part in spec.values():
            _name_sides(part, facts, pair)


def _tables(facts: Facts, weights: list[Row] | str, pair: tuple[int, int]) -> dict[str, list[Row]]:
    pairs = pair_tables(facts, *pair) if facts.predictions else {}
    return charts.tables(facts, weights) | pairs


def _captions(facts: Facts, figures: list[Figure], pair: tuple[int, int]) -> str:
    lines = ["# Figures", ""]
    if facts.predictions:
        lines += [f"A is {facts.runs[pair[0]]['label']}, B is {facts.runs[pair[1]]['label']}.", ""]
    lines += [f"- `{figure.id}`: {figure.caption}" for figure in figures]
    return str(redact("\n".join(lines))) + "\n"
