"""What the report says: its sections in order, each figure with the sentence that tells what it shows and what not.

A section with nothing to show says why, and the page lists these at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mathverify.compare.report import charts
from mathverify.compare.report.charts import Spec
from mathverify.compare.report.facts import Facts, Parameter, Row, shown, spelled
from mathverify.compare.report.rows import RowFacts
from mathverify.compare.verdict import By, Verdict

MOST_PANELS = 6
THE_THREE = ("lora.rank", "lora.alpha", "train.batch_size")


@dataclass(frozen=True)
class Figure:
    """id: in the page, and file name. table: the data set whose numbers stand behind it. wide: takes the whole row."""

    id: str
    spec: Spec
    caption: str
    table: str
    heading: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """absent: why there is nothing to show."""

    id: str
    title: str
    lead: str = ""
    figures: list[Figure] = field(default_factory=list)
    absent: str = ""


def sections(
    facts: Facts,
    importance: list[Row] | str,
    rows: RowFacts | str,
    verdicts: Sequence[Verdict],
    data: dict[str, list[Row]],
) -> list[Section]:
    """All sections in the order of the page. data: the figures' data sets by name."""
    made = [
        _verdict(verdicts, data),
        _ranking(facts),
        _settings(facts),
        _parallel(facts),
        _importance(importance),
        _learning(facts),
        _cost(facts),
        _history(facts),
        _two_runs(facts, rows),
        _rows(rows),
    ]
    return [_at_level(section, facts.level) for section in made]


def _at_level(section: Section, level: str) -> Section:
    """Texts are written for 95%; another confidence takes its place."""
    figures = [replace(f, caption=f.caption.replace("95%", level)) for f in section.figures]
    return replace(section, lead=section.lead.replace("95%", level), figures=figures)


def _verdict(verdicts: Sequence[Verdict], data: dict[str, list[Row]]) -> Section:
    title = "What may be said"
    if not verdicts or not verdicts[0].entries:
        return Section("verdict", title, absent="Nothing can be compared where no run has finished.")
    verdict, figures = verdicts[0], []
    if len(verdicts) == 1 and len(verdict.entries) == 1:
        return Section(
            "verdict", title, absent="Only one configuration has finished, so there is nothing to compare it with."
        )
    of_seeds = verdict.by is By.configuration
    if rows := data["configurations"]:
        caption = (
            "Blue: single runs. Orange: the mean over seeds of each configuration (settings but for the seed) with its "
            "95% interval, in which both the luck of the seed and that of the questions count. Without an interval: "
            "one seed."
        )
        chart = charts.configurations([row["entry"] for row in rows])
        figures.append(
            Figure("configurations", chart, caption, "configurations", "Configurations over their seeds", True)
        )
    if (rows := data["versus"]) and verdict.reference is not None:
        name = shown(verdict.name(verdict.reference))
        what = "the baseline" if verdict.is_baseline else f"the best on {verdict.chosen_on}"
        caption = (
            f"Accuracy of each minus that of {what}, {name}, on the same test rows. Bars "
            "are 95% intervals of each comparison alone; colour and shape are the verdict after the correction for "
            "their number (Holm), so a bar that just misses zero may still be a tie."
            + ("" if of_seeds else " Single runs: this says which adapter is better, not which settings.")
        )
        chart = charts.versus([row["other"] for row in rows])
        figures.append(Figure("differences", chart, caption, "versus", "Differences", True))
    more = f" Of {len(verdicts)} test sets the figures show the one with most runs." if len(verdicts) > 1 else ""
    lead = (
        "The contender is chosen on validation and judged on test, against every other, on the same rows. What the "
        "data do not tell apart is called a tie." + more
    )
    return Section("verdict", title, lead, figures)


def nothing_finished(facts: Facts) -> str:
    """Why no accuracy can be shown, in the words of the states that there are."""
    states: dict[str, int] = {}
    for row in facts.runs:
        states[row["state"]] = states.get(row["state"], 0) + 1
    said = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"No run has a finished evaluation yet ({said}), so there is no test accuracy to show."


def _ranking(facts: Facts) -> Section:
    lead = (
        "Best first by accuracy on the test set at threshold 0. The bar after each accuracy is its 95% interval: the "
        "luck of which questions are in the test set, not the luck of the seed. Neighbours whose bars overlap widely "
        "should be read as equals; what pairs of runs show on the same rows stands under Two runs."
    )
    return Section("ranking", "Ranking", lead if facts.completed else nothing_finished(facts))


def _settings(facts: Facts) -> Section:
    title = "Accuracy by setting"
    if not facts.completed:
        return Section("settings", title, absent=nothing_finished(facts))
    done = facts.completed
    panels = [p for p in facts.parameters if p.key != "seed" and len({row[f"{p.field}_text"] for row in done}) > 1][
        :MOST_PANELS
    ]
    fixed = _fixed(facts)
    if not panels:
        absent = "No setting other than the seed differs between the finished runs. " + fixed
        return Section("settings", title, absent=absent.strip())
    lead = (
        "Blue: one finished run with its 95% interval over test questions. Orange diamonds: the mean of the runs at "
        "that value with Student's 95% interval of the mean. The mean is over whatever else differs between these "
        "runs, so it shows an association, not the effect of the setting alone. " + fixed + _examples_note(facts)
    )
    return Section("settings", title, lead.strip(), [_panel(p, facts) for p in panels])


def _panel(parameter: Parameter, facts: Facts) -> Figure:
    counts: dict[str, int] = {}
    for row in facts.completed:
        counts[row[f"{parameter.field}_text"]] = counts.get(row[f"{parameter.field}_text"], 0) + 1
    caption = f"Accuracy at each {parameter.title}; {_range_of(list(counts.values()))} at each value."
    if parameter.with_it:
        names = ", ".join([parameter.short, *parameter.with_it[:-1]]) + f" and {parameter.with_it[-1]}"
        caption += (
            f" {names[0].upper()}{names[1:]} change together in these runs: their effects cannot be told apart here."
        )
    if min(counts.values()) == 1:
        caption += " A value with a single run has no interval of its mean."
    name = "accuracy_by_" + parameter.key.replace(".", "_")
    return Figure(name, charts.by_parameter(parameter), caption, "runs", parameter.title)


def _range_of(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} run{'s' * (low != 1)}" if low == high else f"{low} to {high} runs"


def _fixed(facts: Facts) -> str:
    varying = {key for p in facts.parameters for key in (p.short, *p.with_it)}
    same = [(key.rpartition(".")[2].replace("_", " "), facts.fixed[key]) for key in THE_THREE if key in facts.fixed]
    said = [f"{name} is {spelled(value)}" for name, value in same if name not in varying]
    return f"In all of these runs {' and '.join(said)}. " if said else ""


def _examples_note(facts: Facts) -> str:
    seen = {row["examples"] for row in facts.completed if row["examples"]}
    if len(seen) < 2:
        return ""
    return (
        f"The runs saw between {min(seen):,} and {max(seen):,} training examples, so part of a difference may be more "
        "data (train.max_examples=N gives every run the same number)."
    )


def _parallel(facts: Facts) -> Section:
    title = "All settings at once"
    settings = [p for p in facts.parameters if p.key != "seed"]
    if len(facts.completed) < 2 or len(settings) < 2:
        absent = "Parallel coordinates need two finished runs and two settings that differ independently of each other."
        return Section("parallel", title, absent=absent)
    caption = (
        "One line a finished run, from its settings to its test accuracy; values stand in order, evenly spaced, and "
        "are shaken a little so that lines don't hide each other. Point at a line, or filter at the top, to follow a "
        "few. Accuracies have no intervals here: see the ranking."
    )
    figure = Figure("parallel_coordinates", charts.parallel(facts), caption, "runs", wide=True)
    return Section("parallel", title, figures=[figure])


def _importance(importance: list[Row] | str) -> Section:
    title = "Which setting matters"
    if isinstance(importance, str):
        return Section("importance", title, absent=importance[0].upper() + importance[1:] + ".")
    caption = (
        "Share of the spread in validation accuracy that each setting explains in these runs (fANOVA, Optuna's "
        "evaluator), with 95% percentiles over resampled runs. It depends on the range that was tried, says nothing of "
        "the direction, and the share of the seed, where it differs, is what luck explains."
    )
    return Section(
        "importance",
        title,
        figures=[Figure("importance", charts.importance(importance), caption, "importance", wide=True)],
    )


def _learning(facts: Facts) -> Section:
    title = "Learning curves"
    figures = []
    if facts.validation:
        band = "The band is each point's 95% interval over validation questions. " if charts.few(facts) else ""
        caption = (
            f"Accuracy on the validation set, one line a run, unfinished ones too. {band}Points on one curve share "
            "their questions, so they move together more than the intervals suggest."
        )
        figures.append(Figure("learning_curves", charts.learning(facts), caption, "validation", "Validation accuracy"))
    if facts.training:
        caption = (
            "Loss of the training batches, averaged over stretches of steps. Batches of different size have different "
            "noise, and a lower training loss is not by itself a better verifier."
        )
        figures.append(Figure("training_loss", charts.losses(facts), caption, "training", "Training loss"))
    if not figures:
        return Section("learning", title, absent="No run has logged a validation or a training step yet.")
    return Section("learning", title, _colours(facts), figures)


def _colours(facts: Facts) -> str:
    if len(facts.configurations) <= 1:
        return ""
    if len(facts.configurations) <= charts.FEW:
        return "Colours are configurations: settings without the seed."
    return "Colours are the final test accuracy; runs without one are grey."


def _cost(facts: Facts) -> Section:
    title = "Cost and quality"
    done = [row for row in facts.completed if row["seconds"] is not None]
    if len(done) < 2:
        return Section("cost", title, absent="Cost is set against quality where at least two runs are finished.")
    figures = [
        Figure(
            "cost_quality",
            charts.cost(facts, "seconds", "seconds of training"),
            "Orange rings, joined by steps: the Pareto front, runs that no other beats in both accuracy and time. "
            "Seconds are of the machine that ran it and were not measured under controlled load; differences within "
            "the grey intervals do not make a front.",
            "runs",
            "Training time",
        )
    ]
    if len({row["memory"] for row in done}) > 1 and all(row["memory"] for row in done):
        caption = "The same against the most memory that the process held (GPU, or resident on a CPU)."
        figures.append(
            Figure("memory_quality", charts.cost(facts, "memory", "peak memory, GiB"), caption, "runs", "Memory")
        )
    return Section("cost", title, _colours(facts).replace("; runs without one are grey", ""), figures)


def _history(facts: Facts) -> Section:
    title = "History of the search"
    if len([row for row in facts.runs if row["validation"] is not None]) < 2:
        return Section("history", title, absent="A history needs at least two runs with a validation.")
    caption = (
        "Validation accuracy of the runs in the order they began, with 95% intervals; the line is the best finished "
        "run so far. The best of many is flattered by luck: it was chosen for being high on these very questions, so "
        "expect its test accuracy to be lower."
    )
    return Section(
        "history", title, figures=[Figure("optimisation_history", charts.history(facts), caption, "runs", wide=True)]
    )


def _two_runs(facts: Facts, rows: RowFacts | str) -> Section:
    if not facts.scores:
        absent = _no_predictions() if facts.completed else nothing_finished(facts)
        return Section("two-runs", "Two runs", absent=absent)
    figures = [_scores("A"), _calibration(), _roc()]
    if len(facts.scores) == 1:
        return Section("two-runs", "Scores", "Of the one finished run, called A here.", figures)
    figures.insert(1, _scores("B"))
    if len(facts.slices) > 1:
        caption = (
            "Accuracy in each named part of the test set with its 95% interval (A circles, B squares). Overlapping "
            "intervals do not mean equality: the differences are made on the same rows."
        )
        chart = charts.slice_accuracy(facts.slices)
        figures.append(Figure("slice_accuracy", chart, caption, "pair_slices", "Accuracy by slice"))
    if isinstance(rows, RowFacts):
        caption = (
            "A minus B on the same rows with a 95% interval that counts questions, not rows (normal; where no row "
            "differs Wilson's for none). Not corrected for the number of slices: one in twenty is off zero by chance."
        )
        chart = charts.slice_difference(rows.slices)
        figures.append(Figure("slice_difference", chart, caption, "pair_difference", "A minus B"))
    lead = "Choose any two. What follows is about these two trained adapters, not about their settings in general."
    return Section("two-runs", "Two runs", lead, figures)


def _scores(side: str) -> Figure:
    caption = (
        f"Log-odds of True that run {side} gave to right and to wrong answers; right of the dashed line it said True. "
        "Rows beyond the ends are counted in the last bars. Counts of this test set, without intervals."
    )
    return Figure(f"scores_{side.lower()}", charts.scores(side), caption, "pair_scores", f"Scores of {side}")


def _calibration() -> Figure:
    caption = (
        "On the dashed line P(True) is the share that is right. A circles, B squares dashed; larger marks hold more "
        "rows; Wilson's 95% interval, counting questions. Bins are those of the ECE; empty ones are left out."
    )
    return Figure("calibration", charts.calibration(), caption, "pair_calibration", "Calibration")


def _roc() -> Figure:
    caption = (
        "A solid, B dashed, each with a pointwise 95% band from resampled questions; thin lines are the other runs. It "
        "shows how scores rank, whatever the threshold, and says nothing of calibration."
    )
    return Figure("roc", charts.roc(), caption, "pair_roc", "ROC")


def _no_predictions() -> str:
    return "None of the finished runs has its predictions.parquet any more, so single rows cannot be looked at."


def _rows(rows: RowFacts | str) -> Section:
    title = "Where the two disagree"
    if isinstance(rows, str):
        return Section("rows", title, absent=rows[0].upper() + rows[1:] + ".")
    if not rows.listed:
        return Section("rows", title, absent="No two of these runs disagree on any test row.")
    lead = "Test rows that only one of the two chosen above judged rightly; in brackets its P(True), rounded."
    if rows.without_text:
        lead += f" Their text cannot be shown: {rows.without_text}."
    return Section("rows", title, lead)
