"""Runs -> the numbers that figures show: plain rows, small enough to travel in one page. Draws nothing.

What is too much for a page is sampled here, and `Facts.sampled` says in words what was left out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from mathverify.compare.reading import Comparison, RunView, State
from mathverify.compare.table import metrics_at
from mathverify.errors import UserError
from mathverify.printable import printable
from mathverify.records import Predictions, redact
from mathverify.scoring import ECE_BINS, Interval, Metrics, evaluate, wilson

MOST_RUNS = 500
"""Rows of the page's table."""
MOST_DETAILED = 100
"""Runs with curves, distributions, ROC and verdicts of every row."""
CURVE_POINTS = 60
SCORE_BINS = 40
ROC_POINTS = 41
ROC_RESAMPLES = 200

Row = dict[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Parameter:
    """A setting that differs between the runs. field: its column in `Facts.runs`. values: in order.

    with_it: settings that change exactly when this one does, so that their effects cannot be told apart.
    """

    key: str
    short: str
    field: str
    values: list[Any]
    with_it: tuple[str, ...] = ()

    @property
    def is_number(self) -> bool:
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)

    @property
    def title(self) -> str:
        return f"{self.short} (with {', '.join(self.with_it)})" if self.with_it else self.short

    @property
    def brief(self) -> str:
        """'rank', or 'rank +1' where another setting goes with it."""
        return f"{self.short} +{len(self.with_it)}" if self.with_it else self.short


@dataclass
class Facts:
    """Everything the page and the figures show, as rows. Runs are numbered by rank, the best first (0)."""

    runs: list[Row]
    parameters: list[Parameter]
    configurations: list[str]
    confidence: float = 0.95
    validation: list[Row] = field(default_factory=list)
    training: list[Row] = field(default_factory=list)
    scores: dict[int, Any] = field(default_factory=dict)
    score_edges: list[float] = field(default_factory=list)
    calibration: dict[int, list[Row]] = field(default_factory=dict)
    roc: dict[int, list[Row]] = field(default_factory=dict)
    slices: list[str] = field(default_factory=list)
    slice_accuracy: dict[int, list[Row]] = field(default_factory=dict)
    predictions: dict[int, Predictions] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    zero_shot: Interval | None = None
    sampled: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    total_runs: int = 0

    @property
    def level(self) -> str:
        """The confidence as it is written, e.g. 95%."""
        return f"{100 * self.confidence:g}%"

    @property
    def completed(self) -> list[Row]:
        return [row for row in self.runs if row["accuracy"] is not None]


def gather(comparison: Comparison, confidence: float = 0.95) -> Facts:
    """Rank the runs and make every figure's numbers. Reads curves and predictions of `MOST_DETAILED` runs.

    confidence: of all intervals but those of validations, which stay as they were logged.
    """
    ranked = sorted(comparison.runs, key=rank)
    kept = ranked[:MOST_RUNS]
    parameters = find_parameters(kept, comparison.varying)
    facts = Facts([], parameters, [], confidence, total_runs=len(ranked))
    if len(ranked) > len(kept):
        facts.sampled.append(f"table and figures hold the best {len(kept)} of {len(ranked):,} runs")
    order = {run: place for place, run in enumerate(sorted(kept, key=lambda run: (run.started == "", run.started)))}
    facts.runs = [_run_row(number, run, parameters, order[run], confidence) for number, run in enumerate(kept)]
    same = Counter(row["label"] for row in facts.runs)
    for row in facts.runs:
        if same[row["label"]] > 1:
            row["label"] += f" ({row['name']})"
    facts.configurations = list(dict.fromkeys(row["configuration"] for row in facts.runs))
    settings = next((run.settings for run in kept if run.settings), {})
    facts.fixed = {key: value for key, value in settings.items() if key not in comparison.varying}
    zero = [run.zero_shot.accuracy for run in kept if run.zero_shot and run.zero_shot.confidence == confidence]
    facts.zero_shot = zero[0] if zero and len({z.value for z in zero}) == 1 else None
    _add_details(facts, kept)
    return facts


def rank(run: RunView) -> tuple[int, float, str]:
    """Best first; then what repeats another run, what is unfinished, and what failed."""
    if run.counts and run.test is not None and run.test.accuracy.value is not None:
        return (0, -run.test.accuracy.value, run.label)
    return (1 if run.repeats else 3 if run.state in (State.failed, State.unreadable) else 2, 0.0, run.label)


# Settings that differ


def find_parameters(runs: Sequence[RunView], varying: Sequence[str]) -> list[Parameter]:
    """Settings that differ, the mission's three first and the seed last; those that only move together become one."""
    keys = sorted(varying, key=_importance)
    columns = {key: [run.settings.get(key) for run in runs if run.settings] for key in keys}
    short = _short_names(keys)
    groups: list[list[str]] = []
    for key, column in columns.items():
        group = next((g for g in groups if "seed" not in (key, g[0]) and _together(columns[g[0]], column)), None)
        if group is None:
            groups.append([key])
        else:
            group.append(key)
    return [
        Parameter(g[0], short[g[0]], f"p{place}", _in_order(columns[g[0]]), tuple(short[k] for k in g[1:]))
        for place, g in enumerate(groups)
    ]


_FIRST = ("lora.rank", "lora.alpha", "train.batch_size", "optimizer.learning_rate")


def _importance(key: str) -> int:
    return _FIRST.index(key) if key in _FIRST else len(_FIRST) + (key == "seed")


def _hashable(value: Any) -> str:
    """JSON text: tells True from 1, and lists can be compared."""
    return json.dumps(value, sort_keys=True)


def _together(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether each value of one goes with exactly one value of the other, and the reverse."""
    pairs = {(_hashable(a), _hashable(b)) for a, b in zip(one, other, strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _in_order(column: Sequence[Any]) -> list[Any]:
    values = list({_hashable(v): v for v in column}.values())
    return sorted(values, key=lambda v: (v is None, isinstance(v, str), v if isinstance(v, int | float) else 0, str(v)))


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: (end.replace("_", " ") if last[end := key.rpartition(".")[2]] == 1 else key) for key in keys}


def spelled(value: Any) -> str:
    """A setting's value as a person writes it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ", ".join(spelled(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else shown(str(value))


def shown(text: str) -> str:
    """Text of runs without secrets, and with what would turn or hide text written out."""
    return printable(str(redact(text)))


# One row a run


def _run_row(number: int, run: RunView, parameters: Sequence[Parameter], order: int, confidence: float) -> Row:
    costs, test = run.costs, metrics_at(run, confidence) if run.counts else None
    values = {p.field: run.settings.get(p.key) for p in parameters}
    said = [(p, f"{p.short} {spelled(values[p.field])}") for p in parameters if run.settings]
    reason = f"the same run as {run.repeats.label}" if run.repeats is not None else run.error
    return {
        "run": number,
        "name": shown(run.label),
        "label": ", ".join(text for _, text in said) or shown(run.name or run.label),
        "configuration": ", ".join(text for p, text in said if p.key != "seed") or shown(run.name or run.label),
        "state": "repeated" if run.repeats is not None else run.state.value,
        "reason": None if reason is None else shown(reason),
        "order": order + 1,
        "seed": run.seed,
        **{name: value if isinstance(value, int | float | None) else spelled(value) for name, value in values.items()},
        **{f"{name}_text": spelled(value) for name, value in values.items()},
        **_numbers("accuracy", test),
        **_numbers("auroc", test),
        **_numbers("brier", test),
        **_numbers("accuracy", run.validation, "validation"),
        "rows": test.rows if test else None,
        "questions": test.questions if test else None,
        "seconds": costs.seconds.get("train"),
        "all_seconds": run.seconds,
        "tokens_per_second": costs.tokens_per_second,
        "memory": costs.peak_memory_bytes / 2**30 if costs.peak_memory_bytes else None,
        "examples": costs.examples_seen or None,
        "steps": costs.optimizer_steps or None,
        "trainable": costs.trainable_parameters,
        "slot": (number * 0.618034) % 1.0,  # where among its neighbours a point stands: spread, and the same every time
    }


def _numbers(name: str, metrics: Metrics | None, as_name: str | None = None) -> Row:
    interval = Interval(None, None, None, "none") if metrics is None else getattr(metrics, name)
    shown = as_name or name
    return {shown: interval.value, f"{shown}_low": interval.low, f"{shown}_high": interval.high}


# Details of the runs that are shown closely


def _add_details(facts: Facts, runs: Sequence[RunView]) -> None:
    chosen = _sample(list(range(len(runs))), MOST_DETAILED)
    if len(chosen) < len(runs):
        facts.sampled.append(
            f"learning curves, scores, ROC and rows are of {len(chosen)} runs: the best {MOST_DETAILED // 2} and "
            "others spread evenly over the ranking"
        )
    for number in chosen:
        validation, training = curves(runs[number], number)
        facts.validation += validation
        facts.training += training
        if runs[number].counts:
            try:
                facts.predictions[number] = runs[number].predictions()
            except UserError as error:
                facts.problems.append(str(error))
    if not facts.predictions:
        return
    facts.slices = sorted({name for p in facts.predictions.values() for name in p.slices if name is not None})
    facts.score_edges = _edges([p.scores for p in facts.predictions.values()])
    for number, predictions in facts.predictions.items():
        facts.scores[number] = _histogram(predictions, facts.score_edges)
        facts.calibration[number] = calibration(predictions, facts.confidence)
        facts.roc[number] = roc(predictions, facts.confidence)
        facts.slice_accuracy[number] = [
            {"slice": name, "place": place, "rows": found.rows,
             "accuracy": found.accuracy.value, "low": found.accuracy.low, "high": found.accuracy.high}
            for place, (name, found) in enumerate(_slices(runs[number], predictions, facts.confidence))
        ]  # fmt: skip


def _slices(run: RunView, predictions: Predictions, confidence: float) -> list[tuple[str, Metrics]]:
    """Metrics of each slice: as recorded, or measured again where these are at another confidence."""
    recorded = run.record().metrics.slices
    if all(metrics.confidence == confidence for metrics in recorded.values()):
        return sorted(recorded.items())
    p = predictions
    return sorted(evaluate(p.scores, p.labels, p.groups, p.slices, confidence=confidence).slices.items())


def _sample(numbers: list[int], most: int) -> list[int]:
    """The first half of `most`, and as many more spread evenly over the rest."""
    if len(numbers) <= most:
        return numbers
    first, rest = numbers[: most // 2], numbers[most // 2 :]
    spread = np.linspace(0, len(rest) - 1, most - len(first)).round().astype(int)
    return first + [rest[place] for place in dict.fromkeys(spread.tolist())]


def curves(run: RunView, number: int) -> tuple[list[Row], list[Row]]:
    """Validations with their intervals, and the training loss averaged over at most `CURVE_POINTS` stretches."""
    accuracy, names = "validation/accuracy", ("train/examples", "train/loss")
    logged = run.curve(accuracy, f"{accuracy}_low", f"{accuracy}_high", *names)
    examples, low, high = (dict(logged.get(name, [])) for name in (names[0], f"{accuracy}_low", f"{accuracy}_high"))
    validation = [
        {"run": number, "step": step, "examples": examples.get(step), "value": value,
         "low": low.get(step), "high": high.get(step)}
        for step, value in logged.get(accuracy, [])
    ]  # fmt: skip
    if len(validation) > CURVE_POINTS:
        keep = np.linspace(0, len(validation) - 1, CURVE_POINTS).round().astype(int)
        validation = [validation[place] for place in keep]
    losses = np.asarray(logged.get(names[1], []), dtype=np.float64)
    parts = np.array_split(losses, min(CURVE_POINTS, len(losses))) if len(losses) else []
    training = [
        {"run": number, "step": int(part[-1, 0]), "examples": examples.get(int(part[-1, 0])),
         "loss": round(float(part[:, 1].mean()), 5)}
        for part in parts
    ]  # fmt: skip
    return validation, training


def _edges(scores: Sequence[Floats]) -> list[float]:
    """Bin edges shared by all runs: the middle 99% of the pooled scores, symmetric about 0; outliers go to the ends."""
    pooled = np.abs(np.concatenate([s[:: max(1, len(s) // 2000)] for s in scores]))
    reach = max(0.5, float(np.quantile(pooled, 0.99)))
    digits = -math.floor(math.log10(reach)) + 1
    reach = math.ceil(reach * 10**digits) / 10**digits
    return [round(float(edge), 4) for edge in np.linspace(-reach, reach, SCORE_BINS + 1)]


def _histogram(predictions: Predictions, edges: Sequence[float]) -> dict[str, list[int]]:
    """Rows per bin of log-odds, for right and wrong answers apart."""
    clipped = np.clip(predictions.scores, edges[0], edges[-1])
    return {
        name: np.histogram(clipped[predictions.labels == label], edges)[0].tolist()
        for name, label in (("right", True), ("wrong", False))
    }


def calibration(predictions: Predictions, confidence: float = 0.95) -> list[Row]:
    """Share of right answers per bin of P(True) with Wilson's interval; bins and edges are those of the ECE.

    Rows of one question are not independent, so the interval counts questions, not rows.
    """
    probability = expit(predictions.scores)
    bins = np.minimum((probability * ECE_BINS).astype(int), ECE_BINS - 1)
    groups = np.unique(np.asarray(predictions.groups), return_inverse=True)[1]
    rows = []
    for place in np.unique(bins):
        here = bins == place
        share, questions = float(predictions.labels[here].mean()), len(np.unique(groups[here]))
        low, high = wilson(share * questions, questions, confidence)
        rows.append({"said": round(float(probability[here].mean()), 4), "right": round(share, 4),
                     "low": round(low, 4), "high": round(high, 4), "rows": int(here.sum())})  # fmt: skip
    return rows


def roc(predictions: Predictions, confidence: float = 0.95) -> list[Row]:
    """Hit rate over false alarms at fixed places, with a pointwise band (percentiles of draws of questions)."""
    labels, scores = predictions.labels, predictions.scores
    if labels.all() or not labels.any():
        return []
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    codes = np.unique(np.asarray(predictions.groups), return_inverse=True)[1]
    places = np.linspace(0, 1, ROC_POINTS) ** 2
    right = labels[order]

    def curve(weights: Floats) -> Floats:
        hits, alarms = np.cumsum(weights * right)[ends], np.cumsum(weights * ~right)[ends]
        if not hits[-1] or not alarms[-1]:
            return np.full(len(places), np.nan)
        drawn: Floats = np.interp(places, np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1]))
        return drawn

    questions = int(codes.max()) + 1
    random = np.random.default_rng(0)
    draws = [curve(random.multinomial(questions, np.full(questions, 1 / questions))[codes[order]].astype(float))
             for _ in range(ROC_RESAMPLES)]  # fmt: skip
    low, high = np.nanquantile(np.stack(draws), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    value = curve(np.ones(len(scores)))
    return [
        {"alarms": round(float(a), 4), "hits": round(float(v), 4),
         "low": round(float(min(lo, v)), 4), "high": round(float(max(hi, v)), 4)}
        for a, v, lo, hi in zip(places, value, low, high, strict=True)
    ]  # fmt: skip


def pair_of(facts: Facts, baseline: int | None) -> tuple[int, int]:
    """The two runs that are shown first: the best, and the baseline or else the best of another configuration."""
    numbers = sorted(facts.predictions)
    if not numbers:
        return (0, 0)
    best = numbers[0]
    if baseline in numbers and baseline is not None:
        return (best, baseline) if baseline != best else (numbers[min(1, len(numbers) - 1)], baseline)
    own = facts.runs[best]["configuration"]
    other = next((n for n in numbers if facts.runs[n]["configuration"] != own), numbers[min(1, len(numbers) - 1)])
    return best, other


def student(most: int, confidence: float) -> list[Row]:
    """Student's t, two-sided at `confidence`, for means of n = 2 ... most numbers."""
    from scipy.stats import t

    return [{"n": n, "t": round(float(t.isf((1 - confidence) / 2, n - 1)), 5)} for n in range(2, max(most, 2) + 1)]
