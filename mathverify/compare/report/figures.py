"""Figures for a paper: the page's own specs as SVG and PNG, with larger type, no tools, and captions in a file."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mathverify.compare.report import charts, theme
from mathverify.compare.report.content import Content, make_folder
from mathverify.compare.report.facts import Facts, Row
from mathverify.compare.report.pair import pair_tables
from mathverify.compare.report.sections import Figure
from mathverify.files import write_atomic
from mathverify.records import redact

COLUMN, PAGE = 340, 680
"""Widths in CSS pixels (96 an inch): one column of a paper, and two."""
PPI = 300


def write_figures(content: Content, folder: Path, kinds: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write every figure that has something to show, as NAME.svg and NAME.png, and captions.md; returns the paths."""
    import vl_convert

    facts, pair = content.facts, content.pair
    figures = [figure for section in content.sections for figure in section.figures]
    if facts.completed:
        caption = (
            f"The best {min(charts.MOST_RANKED, len(facts.completed))} finished runs by test accuracy, with "
            "{facts.level} intervals over test questions."
        )
        figures.insert(0, Figure("ranking", charts.ranking(facts), caption, "runs", wide=True))
    tables = content.data | (pair_tables(facts, *pair) if facts.predictions else {})
    make_folder(folder)
    written: list[Path] = []
    for figure in figures:
        spec = on_paper(figure, facts, tables, pair)
        for kind in kinds:
            written.append(folder / f"{figure.id}.{kind}")
            if kind == "svg":
                write_atomic(written[-1], vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]).encode())
            else:
                write_atomic(written[-1], vl_convert.vegalite_to_png(spec, ppi=PPI, allowed_base_urls=[]))
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
    spec["datasets"] = spec.get("datasets", {}) | {name: tables[name] for name in named}
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


def _captions(facts: Facts, figures: list[Figure], pair: tuple[int, int]) -> str:
    lines = ["# Figures", ""]
    if facts.predictions:
        lines += [f"A is {facts.runs[pair[0]]['label']}, B is {facts.runs[pair[1]]['label']}.", ""]
    lines += [f"- `{figure.id}`: {figure.caption}" for figure in figures]
    return str(redact("\n".join(lines))) + "\n"
