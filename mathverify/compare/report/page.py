"""report.html: one file with everything in it. Its policy forbids any network; all text of runs and data is escaped."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import mathverify
from mathverify.compare.reading import Comparison
from mathverify.compare.report import theme
from mathverify.compare.report.content import Content, make_folder
from mathverify.compare.report.facts import Facts, Parameter, Row, spelled
from mathverify.compare.report.rows import RowFacts
from mathverify.files import write_atomic
from mathverify.records import redact

HERE = Path(__file__).parent
EARLY = (
    'try{const t=localStorage.getItem("mathverify-theme");if(t==="light"||t==="dark")'
    "document.documentElement.dataset.theme=t}catch{}"
)
"""Runs before the first paint, so that a chosen ground does not flash."""
MOST_FILTERS = 5
MOST_OPTIONS = 40


def write_report(content: Content, path: Path) -> Path:
    """Write the page, whole or not at all; returns its path."""
    make_folder(path.parent)
    write_atomic(path, render(content).encode("utf-8", "replace"))
    return path


def render(content: Content) -> str:
    """The page's HTML."""
    import jinja2

    facts = content.facts
    program = (HERE / "page.js").read_text("utf-8")
    library = vega_library()
    columns = _columns(facts)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        title=_title(facts),
        subtitle=_subtitle(content.comparison, facts),
        version=mathverify.__version__,
        policy=_policy([EARLY, library, program]),
        early=EARLY,
        css=(HERE / "page.css").read_text("utf-8"),
        library=library,
        program=program,
        data=as_script(_data(content)),
        sentences=[redact(sentence) for sentence in content.sentences],
        tiles=_tiles(facts),
        sections=[part for part in content.sections if not part.absent],
        left_out=[part for part in content.sections if part.absent],
        filters=_filters(facts),
        runs=facts.runs,
        columns=columns,
        table=[{"run": row["run"], "cells": [column.cell(row) for column in columns]} for row in facts.runs],
        verdict_tables=content.tables,
        pair=content.pair,
        pair_runs=[row for row in facts.runs if row["run"] in facts.predictions],
        options=_options,
        notes=_notes(content),
    )


@functools.cache
def vega_library() -> str:
    """Vega, Vega-Lite and vega-embed as one script (BSD-3-Clause), which sets window.vegaEmbed; from vl-convert."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stubs know no default
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def as_script(tree: Any) -> str:
    """JSON that can stand within a <script> element whatever texts it holds; JSON.parse gives them back unchanged."""
    text = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy(scripts: Sequence[str]) -> str:
    """Only the page's own scripts run, and nothing can be fetched from anywhere."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src 'none'; "
        "base-uri 'none'; form-action 'none'"
    )


def _data(content: Content) -> dict[str, Any]:
    from scipy.stats import norm

    facts = content.facts
    return {
        "tables": content.data,
        "parameters": [p.title for p in facts.parameters],
        "scores": facts.scores,
        "score_edges": facts.score_edges,
        "calibration": facts.calibration,
        "slices": facts.slice_accuracy,
        "z": float(norm.isf((1 - facts.confidence) / 2)),
        "pair": content.pair,
        "rows": None if isinstance(content.rows, str) else _packed(content.rows),
        "specs": {figure.id: figure.spec for section in content.sections for figure in section.figures},
        "config": {ground: theme.config(ground) for ground in ("light", "dark")},
        "palette": {ground: theme.palette(ground) for ground in ("light", "dark")},
    }


def _packed(rows: RowFacts) -> dict[str, Any]:
    names = ("rows", "slices", "labels", "groups", "slice_codes", "runs", "listed")
    return {name: getattr(rows, name) for name in names}


# Words and cells


def _title(facts: Facts) -> str:
    varying = [p.title for p in facts.parameters if p.key != "seed"]
    count = f"{facts.total_runs:,} run" + "s" * (facts.total_runs != 1)
    if facts.total_runs == 1:
        return f"One run: {facts.runs[0]['configuration']}"
    if not varying:
        return f"{count} of one configuration"
    return f"{count} compared: {', '.join(varying[:4])}" + (" and more" if len(varying) > 4 else "")


def _subtitle(comparison: Comparison, facts: Facts) -> str:
    tests = {(row["rows"], row["questions"]) for row in facts.completed}
    devices = sorted({run.device for run in comparison.runs if run.device})
    parts = [f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by mathverify {mathverify.__version__}"]
    if len(tests) == 1:
        rows, questions = next(iter(tests))
        parts.append(f"{rows:,} test rows of {questions:,} questions")
    elif tests:
        parts.append(f"{len(tests)} different test sets: accuracies of different sets do not compare")
    if devices:
        parts.append("ran on " + ", ".join(devices[:3]) + (", ..." if len(devices) > 3 else ""))
    return " · ".join(str(redact(part)) for part in parts)


def _tiles(facts: Facts) -> list[dict[str, str]]:
    done = facts.completed
    states: dict[str, int] = {}
    for row in facts.runs:
        states[row["state"]] = states.get(row["state"], 0) + 1
    tiles = [
        {
            "name": "Runs",
            "value": f"{len(done)} finished",
            "note": ", ".join(f"{n} {state}" for state, n in states.items() if state != "completed") or "and no other",
        }
    ]
    if done:
        best = done[0]
        tiles.insert(
            0, {"name": "Highest test accuracy", "value": f"{best['accuracy']:.1%}",
                "note": f"{facts.level} {best['accuracy_low']:.1%} to {best['accuracy_high']:.1%}, {best['label']}"
                if best["accuracy_low"] is not None else best["label"]}
        )  # fmt: skip
    if (zero := facts.zero_shot) is not None and zero.value is not None:
        note = (
            f"{facts.level} {zero.low:.1%} to {zero.high:.1%}" if zero.low is not None and zero.high is not None else ""
        )
        tiles.append({"name": "Base without adapter", "value": f"{zero.value:.1%}", "note": note})
    if seconds := [row["all_seconds"] for row in facts.runs if row["all_seconds"]]:
        tiles.append(
            {"name": "Time of all runs", "value": _duration(sum(seconds)), "note": "as each run counted its own phases"}
        )
    return tiles


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _filters(facts: Facts) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = [
        {"title": p.title, "field": f"{p.field}_text", "options": [spelled(v) for v in p.values]}
        for p in facts.parameters
        if 1 < len(p.values) <= MOST_OPTIONS
    ][:MOST_FILTERS]
    states = sorted({row["state"] for row in facts.runs})
    if len(states) > 1:
        shown.append({"title": "state", "field": "state", "options": states})
    return shown


def _options(shown: Sequence[Row], chosen: int) -> Any:
    from markupsafe import Markup

    option = Markup('<option value="{}"{}>#{} {} ({:.1%})</option>')
    return Markup("").join(
        option.format(
            row["run"],
            Markup(" selected") if row["run"] == chosen else "",
            row["run"] + 1,
            row["label"],
            row["accuracy"],
        )
        for row in shown
    )


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, whether it holds numbers, and the cell of a run (text, what it sorts by, "
    "...)."""

    title: str
    number: bool
    cell: Callable[[Row], dict[str, Any]]
    hint: str = ""


def _columns(facts: Facts) -> list[Column]:
    """Columns that have something in them, accuracy as near to the left as it can be for narrow screens."""
    bar = _bar_of(facts)
    columns = [
        Column("#", True, lambda row: _number(row["run"] + 1, "{}")),
        Column("run", False, lambda row: _text(row["name"])),
        Column(f"test accuracy, {facts.level}", True, lambda row: _accuracy(row, bar)),
        *(Column(p.brief, p.is_number, partial(_setting, parameter=p), p.title) for p in facts.parameters),
    ]
    for title, name, form in (
        ("AUROC", "auroc", "{:.3f}"),
        ("Brier", "brier", "{:.3f}"),
        ("validation", "validation", "{:.1%}"),
        ("examples", "examples", "{:,}"),
        ("train s", "seconds", "{:,.1f}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
        ("GiB", "memory", "{:.2f}"),
    ):
        columns.append(Column(title, True, partial(_field, name=name, form=form)))
    columns.append(Column("state", False, lambda row: _text(row["state"]) | {"badge": row["state"]}))
    columns.append(Column("reason", False, lambda row: _text(row["reason"]) | {"css": "wrapping"}))
    return [column for column in columns if any(column.cell(row)["sort"] != "" for row in facts.runs)]


def _text(value: str | None) -> dict[str, Any]:
    return {"text": value or "", "sort": value or "", "css": "", "badge": None, "bar": None}


def _number(value: Any, form: str) -> dict[str, Any]:
    """Right-aligned; a dash where there is nothing."""
    if value is None:
        return _text("") | {"text": "\N{EN DASH}", "css": "number"}
    return _text("") | {"text": form.format(value), "sort": value, "css": "number"}


def _field(row: Row, name: str, form: str) -> dict[str, Any]:
    return _number(row[name], form)


def _setting(row: Row, parameter: Parameter) -> dict[str, Any]:
    text = row[f"{parameter.field}_text"]
    return _text(text) | {"sort": row[parameter.field], "css": "number"} if parameter.is_number else _text(text)


def _bar_of(facts: Facts) -> Callable[[float], float]:
    """Accuracy -> per cent of the width of the interval bars."""
    ends = [row[name] for row in facts.completed for name in ("accuracy_low", "accuracy", "accuracy_high")]
    known = [end for end in ends if end is not None] or [0.0, 1.0]
    low, span = min(known), (max(known) - min(known)) or 1.0
    return lambda value: round(100 * (value - low) / span, 1)


def _accuracy(row: Row, bar: Callable[[float], float]) -> dict[str, Any]:
    value, low, high = row["accuracy"], row["accuracy_low"], row["accuracy_high"]
    cell = _number(value, "{:.1%}")
    if value is None or low is None or high is None:
        return cell
    drawn = {"low": bar(low), "width": round(bar(high) - bar(low), 1), "value": bar(value)}
    return cell | {"text": f"{value:.1%} [{low:.1%}, {high:.1%}]", "bar": drawn}


def _notes(content: Content) -> list[str]:
    facts, rows = content.facts, content.rows
    notes = [
        f"Intervals are at {facts.level}; those of validations are as the runs logged them. Those of one run are over "
        "test questions: the luck of the test set. Those of configurations count the luck of the seed too. Those of a "
        "mean over all runs at a setting are Student's: the luck of everything that differs between them.",
        "Accuracy is at threshold 0, on test rows that training never saw. A run that is picked by looking at this "
        "page is picked on test, and its accuracy is flattered a little by that; the verdict at the top picks on "
        "validation.",
        "Nothing on this page is fetched from a network, and nothing is sent.",
    ]
    sampled = facts.sampled + ([] if isinstance(rows, str) else rows.sampled)
    notes.append(f"What was sampled: {'; '.join(sampled)}." if sampled else "Not sampled: all runs and rows are here.")
    if facts.training:
        notes.append("Training losses are averages of up to 60 stretches of each run; score histograms have 40 bins.")
    return notes + [f"Could not be read: {redact(text)}" for text in [*content.comparison.problems, *facts.problems]]
