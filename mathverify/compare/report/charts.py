"""One Vega-Lite spec for each figure, used by the page and by --figures alike. Data come by name: see `datasets`.

Two signals tie a page's figures together: `hidden` (numbers of runs that a filter takes out) and `hot` (the run under
the pointer, -1: none). Colours are names such as @ink, which theme.py's `painted` replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from mathverify.compare.report.facts import Facts, Parameter, Row, spelled, student

Spec = dict[str, Any]

FEW = 8
"""Configurations that can be told apart by colour; more are coloured by accuracy."""
MOST_RANKED = 40
BREAK = "¶"
"""Where a name in a label goes on in the next line."""
SHOWN = "indexof(hidden, datum.run) < 0"
INK, FAINT, ACCENT, SECOND, GROUND = "@ink", "@faint", "@accent", "@second", "@ground"
HOVERED = "hot < 0 || hot === datum.run"


def _spec(chart: Any, title: str, height: int = 280) -> Spec:
    """The chart as a dict: as wide as its place, with a text for screen readers and the two signals."""
    spec: Spec = chart.properties(width="container", height=height, description=title).to_dict(validate=True)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["params"] = [*spec.get("params", []), {"name": "hidden", "value": []}, {"name": "hot", "value": -1}]
    spec.pop("config", None)
    return spec


def _data(name: str) -> Any:
    return alt.NamedData(name=name)


def _tips(*fields: tuple[str, str] | tuple[str, str, str]) -> list[alt.Tooltip]:
    return [alt.Tooltip(f[0], title=f[1], format=f[2] if len(f) > 2 else alt.Undefined) for f in fields]


RUN_TIPS = _tips(
    ("name:N", "run"),
    ("label:N", "settings"),
    ("accuracy:Q", "test accuracy", ".1%"),
    ("accuracy_low:Q", "from", ".1%"),
    ("accuracy_high:Q", "to", ".1%"),
)


def _accuracy(field: str = "accuracy", title: str = "test accuracy") -> alt.Y:
    return alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(format=".1~%"))


def run_colour(facts: Facts) -> Any:
    """By configuration while these are few; else by accuracy."""
    if len(facts.configurations) <= FEW:
        return alt.Color(
            "configuration:N",
            title=None,
            scale=alt.Scale(domain=facts.configurations),
            legend=alt.Legend(columns=_columns(facts.configurations), symbolType="circle", symbolOpacity=1)
            if len(facts.configurations) > 1
            else None,
        )
    return alt.Color(
        "accuracy:Q",
        title="test accuracy",
        legend=alt.Legend(format=".0%", type="gradient"),
        scale=alt.Scale(range="ramp"),
    )


def _columns(texts: Sequence[str]) -> int:
    """Of a legend, so that it fits half a page and a phone."""
    longest = max(map(len, texts))
    return 4 if longest <= 10 else 2 if longest <= 24 else 1


def _fading(strong: float = 1.0, faint: float = 0.12) -> Any:
    return alt.condition(HOVERED, alt.value(strong), alt.value(faint))


# Verdicts


def configurations(labels: Sequence[str]) -> Spec:
    """Mean over seeds of each configuration with its interval, and its single runs."""
    y, step = _named_axis("entry", labels)
    x_axis: dict[str, Any] = {
        "title": "test accuracy",
        "scale": alt.Scale(zero=False),
        "axis": alt.Axis(format=".1~%", grid=True, tickCount=6),
    }
    runs = (
        alt.Chart(_data("members"))
        .transform_filter(SHOWN)
        .mark_circle(size=46, color=ACCENT)
        .encode(x=alt.X("accuracy:Q", **x_axis), y=y, opacity=_fading(0.9), tooltip=RUN_TIPS)
    )
    means = alt.Chart(_data("configurations"))
    tips = _tips(
        ("entry:N", "configuration"),
        ("mean:Q", "mean", ".1%"),
        ("low:Q", "from", ".1%"),
        ("high:Q", "to", ".1%"),
        ("seeds:Q", "seeds"),
        ("verdict:N", "verdict"),
    )
    ends = means.mark_rule(color=SECOND, strokeWidth=3).encode(
        x=alt.X("low:Q", **x_axis), x2="high:Q", y=y, tooltip=tips
    )
    dots = means.mark_point(shape="diamond", size=120, color=SECOND, opacity=1).encode(
        x=alt.X("mean:Q", **x_axis), y=y, tooltip=tips
    )
    return _spec(
        alt.layer(ends, runs, dots), "Mean test accuracy of each configuration over its seeds", step * len(labels)
    )


def _named_axis(field: str, labels: Sequence[str]) -> tuple[alt.Y, int]:
    """An axis of long names, broken into lines at their commas, and the pixels a name needs."""
    lines = [_broken(label) for label in labels]
    axis = alt.Axis(
        grid=True, labelLimit=190, labelOverlap=False, labelExpr=f"split(datum.label, '{BREAK}')", labelLineHeight=13
    )
    y = alt.Y(f"{field}_lines:N", title=None, scale=alt.Scale(domain=lines), axis=axis)
    return y, max(30, 14 + 14 * max((line.count(BREAK) + 1 for line in lines), default=1))


def _broken(label: str, most: int = 26) -> str:
    """Parts of a name on as few lines as hold at most `most` characters."""
    lines = [""]
    for part in label.split(", "):
        if lines[-1] and len(lines[-1]) + 2 + len(part) > most:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] += f", {part}" if lines[-1] else part
    return BREAK.join(lines)


def versus(labels: Sequence[str]) -> Spec:
    """Difference of each to the reference, with its interval; its shape and colour say what was concluded."""
    base = alt.Chart(_data("versus"))
    y, step = _named_axis("other", labels)
    x_axis: dict[str, Any] = {"title": "points of accuracy", "axis": alt.Axis(format="+~f", tickCount=6)}
    outcomes = ["better", "tie", "worse"]
    tips = _tips(
        ("other:N", "other"),
        ("difference:Q", "points", "+.2f"),
        ("low:Q", "from", "+.2f"),
        ("high:Q", "to", "+.2f"),
        ("p:Q", "p corrected", ".2~g"),
        ("verdict:N", "verdict"),
    )
    colour = alt.Color("verdict:N", title=None, scale=alt.Scale(domain=outcomes, range=[ACCENT, FAINT, SECOND]))
    zero = alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(style="reference", color=FAINT).encode(x="at:Q")
    ends = base.mark_rule(strokeWidth=2.2).encode(
        x=alt.X("low:Q", **x_axis), x2="high:Q", y=y, color=colour, tooltip=tips
    )
    dots = base.mark_point(size=90, filled=True, opacity=1).encode(
        x=alt.X("difference:Q", **x_axis),
        y=y,
        color=colour,
        shape=alt.Shape(
            "verdict:N",
            title=None,
            scale=alt.Scale(domain=outcomes, range=["triangle-up", "circle", "triangle-down"]),
        ),
        tooltip=tips,
    )
    return _spec(alt.layer(zero, ends, dots), "Differences to the reference, with intervals", step * len(labels))


# Settings


def by_parameter(parameter: Parameter) -> Spec:
    """Accuracy of every run at each value of a setting, its interval, and the mean with Student's interval."""
    order = [spelled(v) for v in parameter.values]
    x = alt.X(
        f"{parameter.field}_text:N",
        title=parameter.title,
        axis=alt.Axis(labelAngle=0),
        scale=alt.Scale(domain=order, paddingInner=0.25),
    )
    spread = alt.XOffset("slot:Q", scale=alt.Scale(domain=[-0.15, 1.15]))
    base = alt.Chart(_data("runs")).transform_filter("isValid(datum.accuracy)").transform_filter(SHOWN)
    bars = base.mark_rule(strokeWidth=1.2, color=FAINT).encode(
        x=x,
        xOffset=spread,
        y=_accuracy("accuracy_low"),
        y2="accuracy_high:Q",
        opacity=alt.condition(HOVERED, alt.value(0.5), alt.value(0.08)),
    )
    dots = base.mark_circle(size=44, color=ACCENT).encode(
        x=x, xOffset=spread, y=_accuracy(), opacity=_fading(0.8), tooltip=RUN_TIPS
    )
    mean = (
        base.transform_aggregate(
            mean="mean(accuracy)", sd="stdev(accuracy)", n="count()", groupby=[f"{parameter.field}_text"]
        )
        .transform_lookup(lookup="n", from_=alt.LookupData(data=_data("student"), key="n", fields=["t"]))
        .transform_calculate(half="datum.n > 1 ? datum.t * datum.sd / sqrt(datum.n) : null")
        .transform_calculate(
            low="datum.half === null ? datum.mean : max(0, datum.mean - datum.half)",
            high="datum.half === null ? datum.mean : min(1, datum.mean + datum.half)",
        )
    )
    tips = _tips(
        (f"{parameter.field}_text:N", parameter.title),
        ("mean:Q", "mean of runs", ".1%"),
        ("low:Q", "from", ".1%"),
        ("high:Q", "to", ".1%"),
        ("n:Q", "runs"),
    )
    line = mean.mark_line(color=SECOND, strokeWidth=1.5).encode(x=x, y=_accuracy("mean"))
    ends = mean.mark_rule(color=SECOND, strokeWidth=3).encode(x=x, y=_accuracy("low"), y2="high:Q", tooltip=tips)
    middle = mean.mark_point(color=SECOND, shape="diamond", size=110, opacity=1).encode(
        x=x, y=_accuracy("mean"), tooltip=tips
    )
    return _spec(alt.layer(bars, dots, line, ends, middle), f"Test accuracy at each value of {parameter.title}")


def parallel(facts: Facts) -> Spec:
    """Every run as one line through its settings and its result."""
    axes = [p.brief for p in facts.parameters if p.key != "seed"] + ["test accuracy"]
    x = alt.X(
        "axis:N",
        title=None,
        scale=alt.Scale(domain=axes),
        axis=alt.Axis(
            domain=False,
            ticks=False,
            orient="top",
            labelAngle=0,
            labelOverlap=False,
            labelExpr="split(datum.label, ' ')",  # a line a word
            labelPadding=4 + 14 * max(axis.count(" ") for axis in axes),
        ),
    )
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[-0.04, 1.04]))
    rules = alt.Chart(_data("axes")).mark_rule(color=FAINT, opacity=0.45).encode(x=x)
    lines = (
        alt.Chart(_data("parallel"))
        .transform_filter(SHOWN)
        .mark_line(strokeWidth=1.6)
        .encode(
            x=x,
            y=y,
            detail="run:N",
            color=alt.Color(
                "accuracy:Q",
                title="test accuracy",
                legend=alt.Legend(format=".0%", type="gradient"),
                scale=alt.Scale(range="ramp"),
            ),
            opacity=alt.condition(HOVERED, alt.value(0.75), alt.value(0.05)),
            tooltip=RUN_TIPS,
        )
    )
    marks = alt.Chart(_data("axes")).encode(x=x, y=y, text="text:N")
    halo = marks.mark_text(align="left", dx=7, fontSize=11, stroke=GROUND, strokeWidth=5, strokeJoin="round")
    labels = marks.mark_text(align="left", dx=7, fontSize=11, color=INK)
    return _spec(
        alt.layer(rules, lines, halo, labels), "Parallel coordinates: settings and test accuracy of every run", 320
    )


def importance(rows: Sequence[Row]) -> Spec:
    """Share of the spread that each setting explains."""
    base = alt.Chart(_data("importance"))
    names = [row["parameter"] for row in rows]
    y = alt.Y("parameter:N", scale=alt.Scale(domain=names), title=None, axis=alt.Axis(labelLimit=200))
    tips = _tips(
        ("parameter:N", "setting"),
        ("importance:Q", "share", ".0%"),
        ("low:Q", "from", ".0%"),
        ("high:Q", "to", ".0%"),
    )
    bars = base.mark_bar(height={"band": 0.55}, opacity=0.85, cornerRadiusEnd=2).encode(
        x=alt.X(
            "importance:Q",
            title="share of the spread",
            axis=alt.Axis(format=".1~%", tickCount=5),
            scale=alt.Scale(domain=[0, 1]),
        ),
        y=y,
        tooltip=tips,
    )
    ends = base.mark_rule(color=INK, strokeWidth=1.6).encode(x="low:Q", x2="high:Q", y=y, tooltip=tips)
    return _spec(alt.layer(bars, ends), "Importance of each setting, with intervals", height=36 * len(rows))


# Training


def learning(facts: Facts, x: str = "step") -> Spec:
    """Validation accuracy along training, with its interval where runs are few."""
    colour = run_colour(facts)
    base = _with_run(alt.Chart(_data("validation")), facts)
    place = alt.X(
        f"{x}:Q", title="optimizer step" if x == "step" else "training examples seen", axis=alt.Axis(tickCount=7)
    )
    y = alt.Y("value:Q", title="validation accuracy", scale=alt.Scale(zero=False), axis=alt.Axis(format=".1~%"))
    tips = _tips(
        ("label:N", "settings"),
        ("name:N", "run"),
        ("step:Q", "step"),
        ("value:Q", "validation accuracy", ".1%"),
        ("low:Q", "from", ".1%"),
        ("high:Q", "to", ".1%"),
    )
    line = base.mark_line(strokeWidth=1.6).encode(
        x=place, y=y, detail="run:N", color=colour, opacity=_fading(0.9, 0.08), tooltip=tips
    )
    dots = base.mark_point(filled=False, size=12, strokeWidth=2.5).encode(
        x=place, y=y, color=colour, opacity=_fading(0.9, 0.05), detail="run:N", tooltip=tips
    )
    # A gradient is drawn only for one channel, so all of it goes to strokes; the band's fill stays out of it.
    band = base.mark_area().encode(
        x=place,
        y=alt.Y("low:Q", title="validation accuracy"),
        y2="high:Q",
        detail="run:N",
        color=colour if len(facts.configurations) <= FEW else alt.value(FAINT),
        opacity=alt.condition("hot === datum.run", alt.value(0.3), alt.value(0.07 if few(facts) else 0)),
        tooltip=alt.value(None),
    )
    return _spec(alt.layer(band, line, dots), "Validation accuracy along training, one line a run", 300)


def losses(facts: Facts, x: str = "step") -> Spec:
    """Training loss, averaged over stretches of steps."""
    chart = (
        _with_run(alt.Chart(_data("training")), facts)
        .mark_line(strokeWidth=1.3)
        .encode(
            x=alt.X(
                f"{x}:Q",
                title="optimizer step" if x == "step" else "training examples seen",
                axis=alt.Axis(tickCount=7),
            ),
            y=alt.Y("loss:Q", title="training loss (averaged)", scale=alt.Scale(zero=False)),
            detail="run:N",
            color=run_colour(facts),
            opacity=_fading(0.85, 0.08),
            tooltip=_tips(
                ("label:N", "settings"), ("name:N", "run"), ("step:Q", "step"), ("loss:Q", "mean loss", ".3f")
            ),
        )
    )
    return _spec(chart, "Training loss along training, one line a run", 300)


def _with_run(chart: Any, facts: Facts) -> Any:
    """Rows of curves with what the figure needs of their run."""
    fields = ["name", "label", "configuration", "accuracy"]
    return chart.transform_filter(SHOWN).transform_lookup(
        lookup="run", from_=alt.LookupData(data=_data("runs"), key="run", fields=fields)
    )


def few(facts: Facts) -> bool:
    """Whether bands of all curves can be told apart."""
    return len(facts.validation) > 0 and len({row["run"] for row in facts.validation}) <= 12


# Scores of two chosen runs, A and B

PAIR = alt.Color("side:N", title=None, scale=alt.Scale(domain=["A", "B"]), legend=None)
DASH = alt.StrokeDash("side:N", scale=alt.Scale(domain=["A", "B"], range=[[1, 0], [5, 3]]), legend=None)


def scores(side: str) -> Spec:
    """Histogram of one run's log-odds, for right and wrong answers apart."""
    chart = (
        alt.Chart(_data("pair_scores"))
        .transform_filter(f"datum.side === '{side}'")
        .mark_bar(opacity=0.6, binSpacing=0)
        .encode(
            x=alt.X("from:Q", title="score: log-odds of True", bin="binned", scale=alt.Scale(nice=False)),
            x2="to:Q",
            y=alt.Y(
                "rows:Q", title="test rows", stack=None, scale=alt.Scale(domainMin=0, domainMax=alt.ExprRef("most"))
            ),
            color=alt.Color(
                "answer:N",
                title=None,
                scale=alt.Scale(domain=["right answers", "wrong answers"]),
                legend=alt.Legend(symbolType="square"),
            ),
            tooltip=_tips(("answer:N", "rows with"), ("from:Q", "from"), ("to:Q", "to"), ("rows:Q", "rows")),
        )
    )
    zero = alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(style="reference", color=FAINT).encode(x="at:Q")
    spec = _spec(alt.layer(chart, zero), f"Histogram of the scores of run {side}, right and wrong answers apart", 240)
    spec["params"].append({"name": "most", "value": 1})  # so that A and B have one scale
    return spec


def calibration() -> Spec:
    """How often answers are right, against how sure the run was."""
    base = alt.Chart(_data("pair_calibration"))
    x = alt.X(
        "said:Q",
        title="P(True) that the run gave",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format=".1~%", tickCount=5),
    )
    y = alt.Y(
        "right:Q",
        title="share that is right",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format=".1~%", tickCount=5),
    )
    tips = _tips(
        ("side:N", "run"),
        ("said:Q", "said", ".0%"),
        ("right:Q", "was right", ".0%"),
        ("low:Q", "from", ".0%"),
        ("high:Q", "to", ".0%"),
        ("rows:Q", "rows"),
    )
    diagonal = _diagonal("said", "right", x, y)
    ends = base.mark_rule(strokeWidth=1.4, opacity=0.7).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=PAIR)
    line = base.mark_line(strokeWidth=1.5).encode(x=x, y=y, color=PAIR, strokeDash=DASH)
    dots = base.mark_point(filled=True, opacity=1).encode(
        x=x,
        y=y,
        color=PAIR,
        size=alt.Size("rows:Q", legend=None, scale=alt.Scale(range=[25, 260])),
        shape=alt.Shape("side:N", scale=alt.Scale(domain=["A", "B"], range=["circle", "square"]), legend=None),
        tooltip=tips,
    )
    return _spec(alt.layer(diagonal, ends, line, dots), "Calibration of runs A and B", 300)


def roc() -> Spec:
    """Hits against false alarms of A and B over those of all others."""
    x = alt.X(
        "alarms:Q",
        title="wrong answers taken for right",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format=".1~%", tickCount=5),
    )
    y = alt.Y(
        "hits:Q",
        title="right answers taken for right",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format=".1~%", tickCount=5),
    )
    others = (
        alt.Chart(_data("roc"))
        .transform_filter(SHOWN)
        .mark_line(color=FAINT, strokeWidth=1)
        .encode(x=x, y=y, detail="run:N", opacity=alt.condition("hot === datum.run", alt.value(1), alt.value(0.22)))
    )
    pair = alt.Chart(_data("pair_roc"))
    band = pair.mark_area(opacity=0.18).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=PAIR)
    line = pair.mark_line(strokeWidth=2.2).encode(
        x=x,
        y=y,
        color=PAIR,
        strokeDash=DASH,
        tooltip=_tips(
            ("side:N", "run"),
            ("alarms:Q", "false alarms", ".1%"),
            ("hits:Q", "hits", ".1%"),
            ("low:Q", "from", ".1%"),
            ("high:Q", "to", ".1%"),
        ),
    )
    return _spec(
        alt.layer(_diagonal("alarms", "hits", x, y), others, band, line),
        "ROC curves of runs A and B over all others",
        300,
    )


def _diagonal(a: str, b: str, x: alt.X, y: alt.Y) -> alt.Chart:
    ends = [{a: 0, b: 0}, {a: 1, b: 1}]
    made: alt.Chart = alt.Chart(alt.InlineData(values=ends)).mark_line(style="reference", color=FAINT).encode(x=x, y=y)
    return made


def slice_accuracy(slices: Sequence[str]) -> Spec:
    """Accuracy of A and B in each slice."""
    base = alt.Chart(_data("pair_slices"))
    y = _slice_axis(slices)
    offset = alt.YOffset("side:N", scale=alt.Scale(domain=["A", "B"], paddingOuter=0.9))
    x_axis: dict[str, Any] = {
        "title": "test accuracy",
        "scale": alt.Scale(zero=False),
        "axis": alt.Axis(format=".1~%", tickCount=5),
    }
    tips = _tips(
        ("slice:N", "slice"),
        ("side:N", "run"),
        ("accuracy:Q", "accuracy", ".1%"),
        ("low:Q", "from", ".1%"),
        ("high:Q", "to", ".1%"),
        ("rows:Q", "rows"),
    )
    ends = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", **x_axis), x2="high:Q", y=y, yOffset=offset, color=PAIR, tooltip=tips
    )
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("accuracy:Q", **x_axis),
        y=y,
        yOffset=offset,
        color=PAIR,
        shape=alt.Shape("side:N", scale=alt.Scale(domain=["A", "B"], range=["circle", "square"]), legend=None),
        tooltip=tips,
    )
    return _spec(alt.layer(ends, dots), "Accuracy of runs A and B in each slice", 36 * len(slices) + 20)


def _slice_axis(slices: Sequence[str]) -> alt.Y:
    scale = alt.Scale(domain=list(slices))
    return alt.Y("slice:N", title=None, axis=alt.Axis(labelLimit=150, grid=True), scale=scale)


def slice_difference(slices: Sequence[str]) -> Spec:
    """A minus B in each slice on the same rows."""
    base = alt.Chart(_data("pair_difference"))
    y = _slice_axis(["all rows", *slices])
    x_axis: dict[str, Any] = {"title": "A minus B, points of accuracy", "axis": alt.Axis(format="+.1f", tickCount=5)}
    tips = _tips(
        ("slice:N", "slice"),
        ("difference:Q", "A minus B", "+.1f"),
        ("low:Q", "from", "+.1f"),
        ("high:Q", "to", "+.1f"),
        ("only_a:Q", "only A right"),
        ("only_b:Q", "only B right"),
        ("rows:Q", "rows"),
    )
    zero = alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(style="reference", color=FAINT).encode(x="at:Q")
    ends = base.mark_rule(color=INK, strokeWidth=2).encode(x=alt.X("low:Q", **x_axis), x2="high:Q", y=y, tooltip=tips)
    dots = base.mark_point(color=INK, size=75, shape="diamond", opacity=1).encode(
        x=alt.X("difference:Q", **x_axis), y=y, tooltip=tips
    )
    return _spec(
        alt.layer(zero, ends, dots), "Difference of accuracy between A and B in each slice", 36 * len(slices) + 56
    )


# Cost and history


def cost(facts: Facts, field: str, title: str) -> Spec:
    """Accuracy over a cost, with the runs that no other beats in both."""
    base = (
        alt.Chart(_data("runs"))
        .transform_filter(f"isValid(datum.accuracy) && isValid(datum.{field})")
        .transform_filter(SHOWN)
    )
    x = alt.X(
        f"{field}:Q", title=title, scale=alt.Scale(zero=False, nice=False, padding=12), axis=alt.Axis(tickCount=6)
    )
    ends = base.mark_rule(strokeWidth=1.1, color=FAINT).encode(
        x=x,
        y=_accuracy("accuracy_low"),
        y2="accuracy_high:Q",
        opacity=alt.condition(HOVERED, alt.value(0.4), alt.value(0.06)),
    )
    front = base.transform_window(
        best="max(accuracy)",
        frame=[None, 0],
        sort=[{"field": field}, {"field": "accuracy", "order": "descending"}],
    ).transform_window(before="lag(best)", sort=[{"field": field}, {"field": "accuracy", "order": "descending"}])
    front = front.transform_filter("datum.before === null || datum.accuracy > datum.before")
    steps = front.mark_line(color=SECOND, interpolate="step-after", strokeWidth=1.8).encode(x=x, y=_accuracy())
    rings = front.mark_point(filled=False, size=150, color=SECOND, strokeWidth=1.8).encode(x=x, y=_accuracy())
    dots = base.mark_circle(size=60).encode(
        x=x,
        y=_accuracy(),
        color=run_colour(facts),
        opacity=_fading(0.9),
        tooltip=[*RUN_TIPS, alt.Tooltip(f"{field}:Q", title=title, format=",.3~g")],
    )
    return _spec(alt.layer(ends, steps, rings, dots), f"Test accuracy against {title}, with the Pareto front", 300)


def history(facts: Facts) -> Spec:
    """Validation accuracy of the runs in the order in which they began, and the best so far."""
    base = alt.Chart(_data("runs")).transform_filter("isValid(datum.validation)").transform_filter(SHOWN)
    x = alt.X(
        "order:Q",
        title="runs in the order they began",
        axis=alt.Axis(tickMinStep=1, format="d"),
        scale=alt.Scale(zero=False, nice=False, padding=12),
    )
    ends = base.mark_rule(strokeWidth=1.1, color=FAINT).encode(
        x=x,
        y=_accuracy("validation_low", "validation accuracy"),
        y2="validation_high:Q",
        opacity=alt.condition(HOVERED, alt.value(0.45), alt.value(0.08)),
    )
    best = base.transform_filter("datum.state === 'completed'").transform_window(
        best="max(validation)",
        frame=[None, 0],
        sort=[{"field": "order"}],
    )
    line = best.mark_line(color=SECOND, interpolate="step-after", strokeWidth=2).encode(
        x=x, y=_accuracy("best", "validation accuracy")
    )
    states = list(dict.fromkeys(row["state"] for row in facts.runs if row["validation"] is not None))
    shapes = {"completed": "circle", "pruned": "triangle-down", "running": "diamond", "failed": "cross"}
    dots = base.mark_point(filled=True, size=60, color=ACCENT).encode(
        x=x,
        y=_accuracy("validation", "validation accuracy"),
        shape=alt.Shape(
            "state:N",
            title=None,
            scale=alt.Scale(domain=states, range=[shapes.get(s, "square") for s in states]),
            legend=alt.Legend() if len(states) > 1 else None,
        ),
        opacity=_fading(0.9),
        tooltip=[
            alt.Tooltip("order:Q", title="number"),
            *RUN_TIPS[:2],
            *_tips(("validation:Q", "validation accuracy", ".1%"), ("state:N", "state")),
        ],
    )
    return _spec(alt.layer(ends, line, dots), "Validation accuracy of the runs in order, with the best so far", 280)


def ranking(facts: Facts, most: int = MOST_RANKED) -> Spec:
    """The best runs with their intervals, for a paper."""
    base = (
        alt.Chart(_data("runs"))
        .transform_filter("isValid(datum.accuracy)")
        .transform_filter(f"datum.run < {most}")
        .transform_filter(SHOWN)
    )
    labels = [row["label"] for row in facts.completed[:most]]
    scale = alt.Scale(domain=labels)
    y = alt.Y("label:N", scale=scale, title=None, axis=alt.Axis(labelLimit=260, grid=False))
    x_axis: dict[str, Any] = {
        "title": "test accuracy",
        "scale": alt.Scale(zero=False),
        "axis": alt.Axis(format=".1~%", grid=True, tickCount=8),
    }
    ends = base.mark_rule(strokeWidth=1.6, color=ACCENT).encode(
        x=alt.X("accuracy_low:Q", **x_axis), x2="accuracy_high:Q", y=y
    )
    dots = base.mark_circle(size=60, color=ACCENT, opacity=1).encode(x=alt.X("accuracy:Q", **x_axis), y=y)
    return _spec(alt.layer(ends, dots), "Runs by test accuracy, with intervals", 18 * len(labels))


# Data that the specs name


def with_lines(rows: Sequence[Row], field: str) -> list[Row]:
    """Rows with their long name as the axis of names has it."""
    return [row | {f"{field}_lines": _broken(row[field])} for row in rows]


def data_names(spec: Any) -> set[str]:
    """Names of the data sets that a spec wants from outside."""
    if isinstance(spec, list):
        return {name for part in spec for name in data_names(part)}
    if not isinstance(spec, dict):
        return set()
    own = spec.get("data")
    here = {own["name"]} if isinstance(own, dict) and isinstance(own.get("name"), str) else set()
    return here | {name for part in spec.values() for name in data_names(part)}


def tables(facts: Facts, importance: list[Row] | str) -> dict[str, list[Row]]:
    """The data sets by name, but for those of two chosen runs (pair_*)."""
    lines, axes = parallel_rows(facts) if facts.completed else ([], [])
    return {
        "runs": facts.runs,
        "student": student(len(facts.runs), facts.confidence),
        "parallel": lines,
        "axes": axes,
        "importance": [] if isinstance(importance, str) else importance,
        "validation": facts.validation,
        "training": facts.training,
        "roc": [{"run": run, **row} for run, curve in facts.roc.items() for row in curve],
    }


def parallel_rows(facts: Facts) -> tuple[list[Row], list[Row]]:
    """(lines, axes): places of every completed run on each axis in [0, 1], and the marks written along the axes.

    Numbers stand by order, not by size: settings are usually tried in powers. The seed has no axis.
    """
    shown = [p for p in facts.parameters if p.key != "seed"]
    done = facts.completed
    lines: list[Row] = []
    axes: list[Row] = []
    for parameter in shown:
        places = dict(zip(map(spelled, parameter.values), _spread(len(parameter.values)), strict=True))
        ticks = _thinned(list(places.items()))
        axes += [{"axis": parameter.brief, "place": place, "text": text} for text, place in ticks]
        for row in done:
            shake = (row["slot"] - 0.5) * 0.05
            lines.append(_parallel_row(row, parameter.brief, places[row[f"{parameter.field}_text"]] + shake))
    low, high = _range([row["accuracy"] for row in done])
    for row in done:
        lines.append(_parallel_row(row, "test accuracy", (row["accuracy"] - low) / (high - low)))
    axes += [
        {"axis": "test accuracy", "place": p, "text": f"{low + p * (high - low):.1%}"} for p in (0, 0.25, 0.5, 0.75, 1)
    ]
    return lines, axes


def _parallel_row(row: Row, axis: str, place: float) -> Row:
    kept = {k: row[k] for k in ("run", "name", "label", "accuracy", "accuracy_low", "accuracy_high")}
    return kept | {"axis": axis, "place": round(place, 4)}


def _spread(count: int) -> list[float]:
    return [0.5] if count == 1 else [k / (count - 1) for k in range(count)]


def _thinned(ticks: Sequence[tuple[str, float]], most: int = 9) -> list[tuple[str, float]]:
    step = -(-len(ticks) // most)
    return list(ticks[::step])


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.01, high + 0.01)
