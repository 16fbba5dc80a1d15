"""Comparisons as rows and columns: what a terminal, a CSV reader, Markdown and LaTeX each need. Computes no statistics.

Text that comes from runs (names, settings, reasons, paths) is foreign: it is made printable, and escaped for each form.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from mathverify import scoring
from mathverify.compare.power import Needs
from mathverify.compare.reading import Comparison, RunView, State, varying_keys
from mathverify.compare.seeds import ASIDE, Configuration, short_names, value_text
from mathverify.compare.verdict import By, Verdict, Versus
from mathverify.compare.wording import p_text, rounded, signed
from mathverify.errors import UserError
from mathverify.files import write_atomic
from mathverify.printable import printable
from mathverify.records import redact
from mathverify.scoring import Interval, Metrics

NONE = "-"


@dataclass(frozen=True)
class Cell:
    """Text of a place in a table. foreign: from a run, so to be escaped."""

    text: str = NONE
    foreign: bool = False


@dataclass(frozen=True)
class Column:
    """part: number, settings, quality, extra (left out where it does not fit), end or cost; tells how to fold."""

    title: str
    part: str
    right: bool = True


@dataclass
class Table:
    """A table with its title; all rows have a cell for each column. rest: title of its last columns, where they do not
    fit beside the first."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]] = field(default_factory=list)
    rest: str = "cost"

    def only(self, *parts: str) -> Table:
        """The columns of these parts."""
        kept = [i for i, column in enumerate(self.columns) if column.part in parts]
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in kept], rows=rows)

    @property
    def width(self) -> int:
        """Characters a row takes with two spaces between columns."""
        widths = [
            max([cell_len(column.title), *(cell_len(row[i].text) for row in self.rows)])
            for i, column in enumerate(self.columns)
        ]
        return sum(widths) + 2 * (len(widths) - 1)

    def joined(self) -> Table:
        """All settings in one column, as 'rank=16 alpha=32'."""
        places = [i for i, column in enumerate(self.columns) if column.part == "settings"]
        if len(places) < 2:
            return self
        rest = [i for i in range(len(self.columns)) if i not in places]
        before, after = [i for i in rest if i < places[0]], [i for i in rest if i > places[0]]
        columns = [*(self.columns[i] for i in before), Column("settings", "settings", right=False)]
        rows = []
        for row in self.rows:
            spelt = " ".join(f"{self.columns[i].title}={row[i].text}" for i in places if row[i].text != NONE)
            rows.append([*(row[i] for i in before), Cell(spelt or NONE, foreign=True), *(row[i] for i in after)])
        return Table(self.title, [*columns, *(self.columns[i] for i in after)], rows, self.rest)


# What is in the tables


def tables(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[Table]:
    """Per test set: configurations where there are seeds, what they are compared to, and runs, best first; runs that
    belong to no test set are in the last table (the only one's, where there is one test set)."""
    made = []
    several = len(verdicts) > 1
    shown: set[RunView] = set()
    for number, verdict in enumerate(verdicts, 1):
        about = f"test set {number}: " if several else ""
        about += f"{verdict.rows:,} rows of {verdict.questions:,} questions" if verdict.rows else "no predictions"
        runs = [r for r in comparison.runs if (r.test_set or "unknown") == verdict.test_set or not several]
        shown.update(runs)
        if verdict.by is By.configuration:
            made.append(configuration_table(verdict, f"configurations ({about})"))
        if verdict.versus:
            made.append(versus_table(verdict))
        made.append(run_table(runs, verdict, f"runs ({about})"))
    if rest := [run for run in comparison.runs if run not in shown]:
        made.append(run_table(rest, None, "runs without a test result"))
    return made


def in_order(runs: Sequence[RunView]) -> list[RunView]:
    """Best on test first; then those without a test result by validation, the unfinished ones last."""

    def key(run: RunView) -> tuple[bool, float, bool, float]:
        accuracy = run.accuracy.value if run.accuracy is not None else None
        validation = run.validation_accuracy
        return accuracy is None, -(accuracy or 0.0), validation is None, -(validation or 0.0)

    return sorted(runs, key=key)


def run_table(runs: Sequence[RunView], verdict: Verdict | None, title: str) -> Table:
    """Runs, best first. verdict: of their test set, for the confidence of intervals."""
    ordered, varying = in_order(runs), varying_keys(runs)
    numbers = {run: number for number, run in enumerate(ordered, 1)}
    columns = [
        Column("#", "number"),
        *(Column(printable(name), "settings") for name in short_names(list(varying)).values()),
        Column("accuracy", "quality", right=False),
        Column("AUROC", "quality"),
        Column("Brier", "quality"),
        Column("validation", "extra"),
        Column("state", "end", right=False),
        Column("examples", "cost"),
        Column("seconds", "cost"),
        Column("tokens/s", "cost"),
        Column("memory", "cost"),
        Column("run", "cost", right=False),
    ]
    confidence = None if verdict is None else verdict.confidence
    rows = []
    for run in ordered:
        metrics, costs = metrics_at(run, confidence), run.costs
        rows.append([
            Cell(str(numbers[run])),
            *(_setting(run.params, key) for key in varying),
            Cell(_share(None if metrics is None else metrics.accuracy)),
            Cell(_plain(None if metrics is None else metrics.auroc.value, "{:.3f}")),
            Cell(_plain(None if metrics is None else metrics.brier.value, "{:.3f}")),
            Cell(_plain(run.validation_accuracy, "{:.1%}")),
            Cell(_state(run, numbers)),
            Cell(_plain(costs.examples_seen or None, "{:,}")),
            Cell(_plain(run.seconds, "{:,.1f}")),
            Cell(_plain(costs.tokens_per_second, "{:,.0f}")),
            Cell(_memory(costs.peak_memory_bytes)),
            Cell(printable(run.label), foreign=True),
        ])  # fmt: skip
    return Table(title, columns, rows)


def configuration_table(verdict: Verdict, title: str) -> Table:
    """Settings with mean and spread over their seeds, best first."""
    runs = [run for entry in verdict.entries for run in entry.runs]
    keys = [key for key in varying_keys(runs) if not key.startswith(ASIDE)]
    columns = [
        Column("#", "number"),
        *(Column(printable(name), "settings") for name in short_names(keys).values()),
        Column("seeds", "quality"),
        Column("mean accuracy", "quality", right=False),
        Column("spread (SD)", "quality"),
        Column("lowest", "extra"),
        Column("highest", "extra"),
        Column("validation", "extra"),
        Column("verdict", "end", right=False),
        Column("examples", "cost"),
        Column("seconds", "cost"),
        Column("parameters", "cost"),
    ]
    rows = []
    for number, entry in enumerate(verdict.entries, 1):
        low, high = verdict.intervals.get(entry, (None, None))
        seconds = [run.seconds for run in entry.runs if run.seconds is not None]
        rows.append([
            Cell(str(number)),
            *(_setting(entry.params, key) for key in keys),
            Cell(str(len(entry.runs))),
            Cell(_share(Interval(entry.mean, low, high, "crossed analysis of variance"))),
            Cell(NONE if entry.spread is None else f"{100 * entry.spread:.2f}"),
            Cell(f"{entry.accuracies.min():.1%}"),
            Cell(f"{entry.accuracies.max():.1%}"),
            Cell(_plain(entry.validation, "{:.1%}")),
            Cell(_standing(entry, verdict)),
            Cell(_plain(entry.runs[0].costs.examples_seen or None, "{:,}")),
            Cell(_plain(sum(seconds) / len(seconds) if seconds else None, "{:,.1f}")),
            Cell(_plain(entry.runs[0].costs.trainable_parameters, "{:,}")),
        ])  # fmt: skip
    return Table(title, columns, rows)


def versus_table(verdict: Verdict) -> Table:
    """Every other against the reference: difference with interval, p, and what would settle a tie."""
    assert verdict.reference is not None
    what = "the baseline" if verdict.is_baseline else f"the best on {verdict.chosen_on}"
    columns = [
        Column("other", "settings", right=False),
        Column("points", "quality", right=False),
        Column("p", "quality"),
        Column("p corrected", "quality"),
        *([Column("only it right", "extra"), Column("only the reference", "extra")] if verdict.by is By.run else []),
        Column("verdict", "end", right=False),
        Column("rows to settle", "cost"),
        *([Column("seeds to settle", "cost")] if verdict.by is By.configuration else []),
    ]
    rows = []
    for versus in sorted(verdict.versus, key=lambda versus: -versus.difference):
        needs = versus.needs
        discordant = [Cell(_plain(n, "{:,}")) for n in (versus.only_other, versus.only_reference)]
        rows.append([
            Cell(printable(verdict.name(versus.other)), foreign=True),
            Cell(_points(versus)),
            Cell(p_text(versus.p).removeprefix("p ").removeprefix("= ")),
            Cell(p_text(versus.corrected).removeprefix("p ").removeprefix("= ")),
            *(discordant if verdict.by is By.run else []),
            Cell(versus.outcome.value),
            Cell(_needed(needs, 0)),
            *([Cell(_needed(needs, 1))] if verdict.by is By.configuration else []),
        ])  # fmt: skip
    title = f"against {what}: {printable(verdict.name(verdict.reference))}"
    return Table(title, columns, rows, rest="what would settle ties")


def _needed(needs: Needs | None, place: int) -> str:
    """Rows (place 0) or seeds (1) that would settle it; 'both: n' where it takes both together."""
    if needs is None:
        return NONE
    if needs.both is not None:
        return f"both: {rounded(needs.both[place])}"
    number = (needs.rows, needs.seeds)[place]
    return NONE if number is None else rounded(number)


def metrics_at(run: RunView, confidence: float | None) -> Metrics | None:
    """Its test metrics with intervals at this confidence: as recorded, or measured again from the predictions; values
    without intervals where these are not there."""
    if run.test is None or confidence is None or run.test.confidence == confidence:
        return run.test
    try:
        rows = run.predictions()
        return scoring.measure(rows.scores, rows.labels, rows.groups, confidence=confidence)
    except UserError:
        bare = {name: replace(getattr(run.test, name), low=None, high=None) for name in scoring.NAMES}
        return replace(run.test, confidence=confidence, confusion={}, **bare)


# Cells


def _setting(params: dict[str, Any], key: str) -> Cell:
    return Cell(printable(value_text(params[key])), foreign=True) if key in params else Cell()


def _plain(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _share(interval: Interval | None) -> str:
    if interval is None or interval.value is None:
        return NONE
    if interval.low is None or interval.high is None:
        return f"{interval.value:.1%}"
    return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _points(versus: Versus) -> str:
    if versus.low is None or versus.high is None:
        return signed(versus.difference)
    return f"{signed(versus.difference)} [{signed(versus.low)}, {signed(versus.high)}]"


def _memory(size: int | None) -> str:
    return NONE if size is None else f"{size / 2**30:.1f} GiB"


def _state(run: RunView, numbers: dict[RunView, int]) -> str:
    if run.repeats is not None:
        return f"repeats #{numbers[run.repeats]}" if run.repeats in numbers else "repeats another"
    return run.state.value


def _standing(entry: Configuration, verdict: Verdict) -> str:
    if entry is verdict.reference:
        return "baseline" if verdict.is_baseline else "chosen"
    found = next((versus.outcome.value for versus in verdict.versus if versus.other is entry), None)
    return found or "not tested"


# Forms


def write_table(path: Path, comparison: Comparison, verdicts: Sequence[Verdict]) -> None:
    """Write the tables in the form that the suffix names, whole or not at all.

    Raises:
        UserError: a suffix other than those of `FORMS`, or a disk that refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, FORMS[checked_suffix(path)](comparison, verdicts).encode("utf-8", "backslashreplace"))


def checked_suffix(path: Path) -> str:
    """The path's suffix. Raises UserError when it names no form."""
    if path.suffix.lower() not in FORMS:
        raise UserError(f"--table {path}: its suffix says no form: use one of {', '.join(FORMS)}")
    return path.suffix.lower()


def as_csv(comparison: Comparison, verdicts: Sequence[Verdict]) -> str:
    """One line a run, every number in full. A text that a spreadsheet would run as a formula gets a ' in front."""
    text = io.StringIO()
    lines = _records(comparison, verdicts)
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _unarmed(value) for key, value in line.items()} for line in lines)
    return text.getvalue()


def _unarmed(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and re.match(r"[=+\-@\t\r]", value) else value


def _records(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    by_set = {verdict.test_set: verdict for verdict in verdicts}
    lines = []
    for run in in_order(comparison.runs):
        verdict = by_set.get(run.test_set or "unknown")
        metrics = metrics_at(run, None if verdict is None else verdict.confidence)
        line: dict[str, Any] = {"run": printable(run.label), "state": run.state.value}
        line |= {key: _flat_value(run.params.get(key)) for key in comparison.varying}
        for name in ("accuracy", "auroc", "brier"):
            interval = None if metrics is None else getattr(metrics, name)
            line |= {f"{name}{end}": getattr(interval, part, None) for end, part in
                     (("", "value"), ("_low", "low"), ("_high", "high"))}  # fmt: skip
        line |= {
            "validation_accuracy": run.validation_accuracy,
            "examples": run.costs.examples_seen or None,
            "steps": run.costs.optimizer_steps or None,
            "seconds": run.seconds,
            "tokens": run.costs.tokens or None,
            "tokens_per_second": run.costs.tokens_per_second,
            "peak_memory_bytes": run.costs.peak_memory_bytes,
            "trainable_parameters": run.costs.trainable_parameters,
            **_against(run, verdict),
            "test_set": run.test_set,
            "repeats": None if run.repeats is None else printable(run.repeats.label),
            "reason": None if run.error is None else printable(run.error),
            "folder": printable(str(redact(str(run.folder)))),
        }
        lines.append(line)
    return lines


def _against(run: RunView, verdict: Verdict | None) -> dict[str, Any]:
    """How its entry stands against the reference; empty columns where it was not compared."""
    found: Versus | None = None
    standing = None
    if verdict is not None and (entry := next((e for e in verdict.entries if run in e.runs), None)) is not None:
        found = next((versus for versus in verdict.versus if versus.other is entry), None)
        standing = _standing(entry, verdict)
    keys = ("difference", "low", "high", "p", "corrected")
    names = ("difference", "difference_low", "difference_high", "p", "p_corrected")
    return {name: getattr(found, key, None) for name, key in zip(names, keys, strict=True)} | {"standing": standing}


def _flat_value(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else (
        None if value is None else printable(value_text(value))
    )  # fmt: skip


def as_markdown(comparison: Comparison, verdicts: Sequence[Verdict]) -> str:
    """GitHub's tables, one after another with their titles."""
    return markdown(tables(comparison, verdicts))


def markdown(several: Sequence[Table]) -> str:
    """These tables in Markdown."""
    parts = []
    for table in several:
        lines = [
            f"**{_markdown(table.title)}**", "",
            _piped([_markdown(column.title) for column in table.columns]),
            _piped(["---:" if column.right else ":---" for column in table.columns]),
            *(_piped([_markdown(cell.text) if cell.foreign else cell.text for cell in row]) for row in table.rows),
        ]  # fmt: skip
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    """Text that stands for itself: no markup, no HTML, no end of the cell."""
    escaped = re.sub(r"([\\`*_{}\[\]|#~!$])", r"\\\1", text)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_latex(comparison: Comparison, verdicts: Sequence[Verdict]) -> str:
    """One tabular after another, their titles as comments; needs no package."""
    parts = []
    for table in tables(comparison, verdicts):
        kinds = "".join("r" if column.right else "l" for column in table.columns)
        lines = [
            f"% {table.title}",
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\hline",
            _ampersands([_latex(column.title) for column in table.columns]),
            r"\hline",
            *(
                _ampersands([_latex(cell.text) if cell.foreign else _latex_number(cell.text) for cell in row])
                for row in table.rows
            ),
            r"\hline",
            r"\end{tabular}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \tabularnewline"


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "[": "{[}", "]": "{]}",
}  # fmt: skip


def _latex_number(text: str) -> str:
    """Our own cells: a minus is a minus, not a hyphen."""
    return re.sub(r"-(?=\d)", "$-$", _latex(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


FORMS: dict[str, Callable[[Comparison, Sequence[Verdict]], str]] = {
    ".csv": as_csv,
    ".md": as_markdown,
    ".tex": as_latex,
}


def unfinished(comparison: Comparison) -> list[RunView]:
    """Runs that want explaining: failed, killed, cut short, unreadable."""
    return [run for run in comparison.runs if run.state not in (State.completed, State.running)]
