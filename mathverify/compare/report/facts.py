"""Runs -> the numbers that figures show: plain rows, small enough to travel in one page. Draws nothing.

What is too much for a page is sampled here, and `Facts.sampled` says in words what was left out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from mathverify import records
from mathverify.compare.report.entries import Entry
from mathverify.records import Predictions, Status
from mathverify.scoring import ECE_BINS, Interval, Metrics, wilson

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
        return " = ".join([self.short, *self.with_it])


@dataclass
class Facts:
    """Everything the page and the figures show, as rows. Runs are numbered by rank, the best first (0)."""

    runs: list[Row]
    parameters: list[Parameter]
    configurations: list[str]
    validation: list[Row] = field(default_factory=list)
    training: list[Row] = field(default_factory=list)
    scores: dict[int, Any] = field(default_factory=dict)
    score_edges: list[float] = field(default_factory=list)
    calibration: dict[int, list[Row]] = field(default_factory=dict)
    roc: dict[int, list[Row]] = field(default_factory=dict)
    slices: list[str] = field(default_factory=list)
    predictions: dict[int, Predictions] = field(default_factory=dict)
    zero_shot: Interval | None = None
    sampled: list[str] = field(default_factory=list)
    total_runs: int = 0

    @property
    def completed(self) -> list[Row]:
        return [row for row in self.runs if row["accuracy"] is not None]


def gather(entries: Sequence[Entry]) -> Facts:
    """Rank the runs and make every figure's numbers. Reads metrics.jsonl and predictions.parquet of `MOST_DETAILED`."""
    ranked = sorted(entries, key=_rank)
    kept = ranked[:MOST_RUNS]
    parameters = find_parameters([entry.record.config for entry in kept])
    facts = Facts([], parameters, [], total_runs=len(entries))
    if len(ranked) > len(kept):
        facts.sampled.append(f"the table and the figures hold the best {len(kept)} of {len(ranked):,} runs")
    seeds = parameters_of_seed(parameters)
    order = {id(entry): place for place, entry in enumerate(sorted(kept, key=lambda e: e.record.started))}
    for number, entry in enumerate(kept):
        facts.runs.append(_run_row(number, entry, parameters, seeds, order[id(entry)]))
    facts.configurations = list(dict.fromkeys(row["configuration"] for row in facts.runs))
    zero = [e.record.metrics.zero_shot.accuracy for e in kept if e.record.metrics.zero_shot is not None]
    facts.zero_shot = zero[0] if zero and len({z.value for z in zero}) == 1 else None
    _add_details(facts, kept)
    return facts


def _rank(entry: Entry) -> tuple[int, float, str]:
    test = entry.record.metrics.test
    if test is None or test.accuracy.value is None:
        return (1 + (entry.record.status is Status.failed), 0.0, entry.name)
    return (0, -test.accuracy.value, entry.name)


# Settings that differ


def find_parameters(configs: Sequence[dict[str, Any]]) -> list[Parameter]:
    """Settings with more than one value among the runs, the mission's three first; those that only move together as one.

    Settings that decide where a run goes rather than what comes out (tracking, device, threads, ...) don't count.
    """
    ignored = tuple(f"{part}.{name}" if part else name for part, names in records.NOT_OF_THE_RESULT.items() for name in names)
    flat = [_flat(config) for config in configs]
    keys = sorted({key for one in flat for key in one}, key=lambda key: (_importance(key), key))
    keys = [key for key in keys if not any(key == i or key.startswith(f"{i}.") for i in ignored)]
    columns = {key: [one.get(key) for one in flat] for key in keys}
    varying = {key: column for key, column in columns.items() if len({_hashable(v) for v in column}) > 1}
    short = _short_names(list(varying))
    groups: list[list[str]] = []
    for key, column in varying.items():
        group = next((g for g in groups if key != "seed" and g[0] != "seed" and _together(varying[g[0]], column)), None)
        group.append(key) if group else groups.append([key])
    return [
        Parameter(g[0], short[g[0]], f"p{place}", _in_order(varying[g[0]]), tuple(short[k] for k in g[1:]))
        for place, g in enumerate(groups)
    ]


_FIRST = ("lora.rank", "lora.alpha", "train.batch_size", "optimizer.learning_rate")


def _importance(key: str) -> int:
    return _FIRST.index(key) if key in _FIRST else len(_FIRST) + (key == "seed")


def parameters_of_seed(parameters: Sequence[Parameter]) -> str | None:
    """The column of the seed, if seeds differ."""
    return next((p.field for p in parameters if p.key == "seed"), None)


def _flat(tree: dict[str, Any], prefix: str = "") -> Row:
    flat: Row = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | None) else json.dumps(value)
    return flat


def _hashable(value: Any) -> Any:
    return (type(value).__name__ if isinstance(value, bool) else "", value)


def _together(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether each value of one goes with exactly one value of the other, and the reverse."""
    pairs = {(_hashable(a), _hashable(b)) for a, b in zip(one, other, strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _in_order(column: Sequence[Any]) -> list[Any]:
    values = list({_hashable(v): v for v in column}.values())
    return sorted(values, key=lambda v: (v is None, isinstance(v, str), v if isinstance(v, int | float) else 0, str(v)))


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: (end if last[end := key.rpartition(".")[2]] == 1 else key) for key in keys}


def spelled(value: Any) -> str:
    """A setting's value as a person writes it."""
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


# One row a run


def _run_row(number: int, entry: Entry, parameters: Sequence[Parameter], seed: str | None, order: int) -> Row:
    record, metrics, costs = entry.record, entry.record.metrics, entry.record.costs
    flat = _flat(record.config)
    values = {p.field: flat.get(p.key) for p in parameters}
    said = [(p, f"{p.short} {spelled(values[p.field])}") for p in parameters]
    configuration = ", ".join(text for p, text in said if p.field != seed) or record.name
    label = ", ".join(text for _, text in said) or record.name
    seconds = costs.seconds.get("train")
    return {
        "run": number,
        "name": entry.name,
        "label": label,
        "configuration": configuration,
        "state": record.status.value,
        "reason": record.reason,
        "order": order + 1,
        "seed": record.seed,
        **values,
        **_numbers("accuracy", metrics.test),
        **_numbers("auroc", metrics.test),
        **_numbers("brier", metrics.test),
        **_numbers("accuracy", metrics.validation, "validation"),
        "rows": metrics.test.rows if metrics.test else None,
        "questions": metrics.test.questions if metrics.test else None,
        "seconds": seconds,
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


def _add_details(facts: Facts, entries: Sequence[Entry]) -> None:
    chosen = _sample(list(range(len(entries))), MOST_DETAILED)
    if len(chosen) < len(entries):
        facts.sampled.append(
            f"learning curves, distributions, ROC and rows are of {len(chosen)} runs: the best {MOST_DETAILED // 2} and "
            f"others spread evenly over the ranking"
        )
    scores: dict[int, Predictions] = {}
    for number in chosen:
        entry = entries[number]
        validation, training = read_curves(entry.folder / "metrics.jsonl", number)
        facts.validation += validation
        facts.training += training
        if entry.record.status is Status.completed and (entry.folder / records.PREDICTIONS).exists():
            scores[number] = records.read_predictions(entry.folder / records.PREDICTIONS)
    if not scores:
        return
    facts.predictions = scores
    facts.slices = sorted({name for p in scores.values() for name in p.slices if name is not None})
    facts.score_edges = _edges([p.scores for p in scores.values()])
    for number, predictions in scores.items():
        facts.scores[number] = _histogram(predictions, facts.score_edges)
        facts.calibration[number] = calibration(predictions)
        facts.roc[number] = roc(predictions)


def _sample(numbers: list[int], most: int) -> list[int]:
    """The first half of `most`, and as many more spread evenly over the rest."""
    if len(numbers) <= most:
        return numbers
    first, rest = numbers[: most // 2], numbers[most // 2 :]
    spread = np.linspace(0, len(rest) - 1, most - len(first)).round().astype(int)
    return first + [rest[place] for place in dict.fromkeys(spread.tolist())]


def read_curves(path: Path, run: int) -> tuple[list[Row], list[Row]]:
    """Validations with their intervals, and the training loss averaged over at most `CURVE_POINTS` stretches of steps."""
    validation: list[Row] = []
    losses: list[tuple[int, float]] = []
    examples: dict[int, int] = {}
    for line in _lines(path):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if isinstance(seen := line.get("train/examples"), int):
            examples[step] = seen
        if isinstance(loss := line.get("train/loss"), int | float):
            losses.append((step, float(loss)))
        if isinstance(accuracy := line.get("validation/accuracy"), int | float):
            bounds = (line.get("validation/accuracy_low"), line.get("validation/accuracy_high"))
            validation.append({"run": run, "step": step, "accuracy": accuracy, "low": bounds[0], "high": bounds[1]})
    for row in validation:
        row["examples"] = examples.get(row["step"])
    if len(validation) > CURVE_POINTS:
        keep = np.linspace(0, len(validation) - 1, CURVE_POINTS).round().astype(int)
        validation = [validation[place] for place in keep]
    parts = np.array_split(np.asarray(losses), min(CURVE_POINTS, len(losses))) if losses else []
    training = [
        {"run": run, "step": int(part[-1, 0]), "loss": round(float(part[:, 1].mean()), 5),
         "examples": examples.get(int(part[-1, 0]))}
        for part in parts
    ]  # fmt: skip
    return validation, training


def _lines(path: Path) -> list[Row]:
    """The whole lines of metrics.jsonl; a run that is writing, or was killed, may have left half a line."""
    if not path.exists():
        return []
    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines


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


def calibration(predictions: Predictions) -> list[Row]:
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
        low, high = wilson(share * questions, questions)
        rows.append({"said": round(float(probability[here].mean()), 4), "right": round(share, 4),
                     "low": round(low, 4), "high": round(high, 4), "rows": int(here.sum())})  # fmt: skip
    return rows


def roc(predictions: Predictions) -> list[Row]:
    """Hit rate over false alarms at fixed places, with a pointwise 95% band: percentiles of draws of whole questions."""
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
        return np.interp(places, np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1]))

    questions = int(codes.max()) + 1
    random = np.random.default_rng(0)
    draws = [curve(random.multinomial(questions, np.full(questions, 1 / questions))[codes[order]].astype(float))
             for _ in range(ROC_RESAMPLES)]  # fmt: skip
    low, high = np.nanquantile(np.stack(draws), [0.025, 0.975], axis=0)
    value = curve(np.ones(len(scores)))
    return [
        {"alarms": round(float(a), 4), "hits": round(float(v), 4),
         "low": round(float(min(lo, v)), 4), "high": round(float(max(hi, v)), 4)}
        for a, v, lo, hi in zip(places, value, low, high, strict=True)
    ]  # fmt: skip
