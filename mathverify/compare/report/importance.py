"""Which setting matters: Optuna's fANOVA over the finished runs, with an interval from resampling runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from mathverify.compare.report.facts import Facts, Parameter, Row, spelled

FEWEST_RUNS = 8
RESAMPLES = 30
TREES = 16


def importance(facts: Facts) -> list[Row] | str:
    """A row a setting (importance in [0, 1], summing to 1; low, high: percentiles), or why there is none.

    Evaluator: fANOVA (Hutter et al. 2014, ICML) as Optuna has it, of validation accuracy, since test is for the end.
    The seed counts as a setting where it differs: its share is what luck explains.
    """
    runs = [row for row in facts.runs if row["validation"] is not None and row["state"] == "completed"]
    parameters = [p for p in facts.parameters if len({row[f"{p.field}_text"] for row in runs}) > 1]
    if len(parameters) < 2:
        return "importance compares settings, and fewer than two differ between the finished runs"
    if len(runs) < FEWEST_RUNS:
        return f"importance needs at least {FEWEST_RUNS} finished runs, here are {len(runs)}"
    values = np.array([row["validation"] for row in runs])
    if np.ptp(values) == 0:
        return "all finished runs have the same validation accuracy: there is no spread to explain"
    whole = _shares(runs, parameters)
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        picks = random.integers(0, len(runs), len(runs))
        if np.ptp(values[picks]) > 0:
            drawn.append(_shares([runs[k] for k in picks], parameters))
    low, high = np.quantile(np.array(drawn), [(1 - facts.confidence) / 2, (1 + facts.confidence) / 2], axis=0)
    order = np.argsort(-whole, kind="stable")
    return [
        {
            "parameter": parameters[k].title,
            "place": place,
            "importance": round(float(whole[k]), 4),
            "low": round(float(min(low[k], whole[k])), 4),
            "high": round(float(max(high[k], whole[k])), 4),
        }
        for place, k in enumerate(order.tolist())
    ]


def _shares(runs: Sequence[Row], parameters: Sequence[Parameter]) -> Any:
    """float64 [parameters]; 0 for a setting that does not differ in these runs."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction="maximize")
        spaces = {p.field: _space(p) for p in parameters}
        for row in runs:
            values = {p.field: row[p.field] if _is_scale(p) else row[f"{p.field}_text"] for p in parameters}
            study.add_trial(
                optuna.trial.create_trial(params=values, distributions=spaces, value=float(row["validation"]))
            )
        evaluator = FanovaImportanceEvaluator(n_trees=TREES, seed=0)
        found = get_param_importances(study, evaluator=evaluator, params=[p.field for p in parameters])
    return np.array([float(found.get(p.field, 0.0)) for p in parameters])


def _space(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not _is_scale(parameter):
        return CategoricalDistribution([spelled(v) for v in parameter.values])
    low, high = min(parameter.values), max(parameter.values)
    return FloatDistribution(low, high, log=low > 0 and high / low >= 8)


def _is_scale(parameter: Parameter) -> bool:
    """Whether the values have an order that a tree may cut; a seed is a name."""
    return parameter.is_number and parameter.key != "seed"
