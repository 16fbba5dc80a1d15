"""The saved workspace view and the report of a W&B project, so that nobody has to click them together.

Made with wandb-workspaces (the extra `dashboards`). Shows what runs were told to W&B (tracking/vocabulary.py); reads no
run folders and judges nothing. Saving needs an account, or a server of one's own; a second call renews what the first
one made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mathverify.errors import UserError
from mathverify.records import redact
from mathverify.tracking import service
from mathverify.tracking.account import has_key
from mathverify.tracking.vocabulary import REPORTED, RUN_JOB, SELECTED_BY, STEP, SWEEP_JOB, flat_name

TITLE = "Which settings verify best"  # no mark in it: the library puts it into an address as it is
SEARCHED = ("rank", "alpha", "batch_size", "learning_rate")
"""Settings that are shown unless others are named."""
MEASURED = (
    SELECTED_BY, REPORTED, f"{REPORTED}_low", f"{REPORTED}_high", "test/auroc", "test/brier",
    "examples_seen", "seconds/all", "tokens_per_second", "peak_memory_bytes",
)  # fmt: skip
SAVE_SECONDS = 60.0  # for all of it; the client's own retries would go on for hours


@dataclass(frozen=True)
class Views:
    """What is made. Both objects are wandb-workspaces' own and are sent by `save_views`."""

    workspace: Any
    report: Any


def save_views(target: str, searched: Sequence[str] = SEARCHED) -> list[str]:
    """Make or renew the view and the report of ENTITY/PROJECT; returns their addresses.

    Raises:
        UserError: no such target, extra not installed, no account, or the server refused; one line with the remedy.
    """
    entity, project = parse_target(target)
    _require_extra()
    if not has_key():
        raise UserError(
            f"--wandb {target}: saved views live on a W&B server, so this needs an online account: `wandb login` "
            "(offline runs first go there with `wandb sync`); --report makes a page that needs none"
        )
    return _bounded(target, lambda: _save(build_views(entity, project, searched)))


def parse_target(target: str) -> tuple[str, str]:
    """'ENTITY/PROJECT' -> both."""
    if re.fullmatch(r"[^/\s]+/[^/\s]+", target) is None:
        raise UserError(f"--wandb {target!r}: use ENTITY/PROJECT, as in the address of the project's page")
    entity, _, project = target.partition("/")
    return entity, project


def build_views(entity: str, project: str, searched: Sequence[str] = SEARCHED) -> Views:
    """The view and the report as they would be sent; talks to nobody.

    Args:
        searched: the settings to show, best first, by flat name (rank) or as on a command line (lora.rank).
    """
    names = list(dict.fromkeys(flat_name(key) for key in searched))
    return Views(_workspace(entity, project, names), _report(entity, project, names))


# The view


def _workspace(entity: str, project: str, searched: list[str]) -> Any:
    import wandb_workspaces.workspaces as ws

    made = ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        auto_generate_panels=False,
        sections=[
            ws.Section(name="Settings", panels=_settings_panels(searched), is_open=True),
            ws.Section(name="Learning curves", panels=_curves(searched), is_open=True),
            ws.Section(name="Costs", panels=_costs(), is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_job(RUN_JOB),
            order=_best_first(),
            pinned_columns=columns(searched),
        ),
    )
    made._internal_name = _view_name(entity, project)
    return made


def columns(searched: Sequence[str]) -> list[str]:
    """The runs table, from left to right: which run, how it ended, its settings, what was measured and what it cost."""
    return [
        "run:displayName", "run:state", "run:group", "tags:__ALL__",
        *(f"config:{name}.value" for name in (*searched, "seed")),
        *(f"summary:{name}" for name in MEASURED),
    ]  # fmt: skip


def _job(job_type: str) -> str:
    """A filter, in the library's words."""
    return f"Metric('JobType') = '{job_type}'"


def _best_first() -> list[Any]:
    from wandb_workspaces import expr

    return [expr.Ordering(expr.Summary(SELECTED_BY), ascending=False)]


# Panels, the same in both


def _settings_panels(searched: list[str]) -> list[Any]:
    """What selects is on the right of the parallel coordinates; test accuracy is beside it, not on the way to it."""
    import wandb_workspaces.reports.v2 as wr

    column = wr.ParallelCoordinatesPlotColumn
    settings = [column(wr.Config(name), display_name=name, log=name == "learning_rate") for name in searched]
    chosen = column(wr.SummaryMetric(SELECTED_BY), display_name="validation accuracy")
    return [
        wr.ParallelCoordinatesPlot(columns=[*settings, chosen], title="Settings and validation accuracy"),
        wr.ParameterImportancePlot(with_respect_to=SELECTED_BY),
        *(
            wr.ScatterPlot(
                x=wr.Config(name),
                y=wr.SummaryMetric(REPORTED),
                log_x=name == "learning_rate",
                title=f"Test accuracy by {name}",
            )
            for name in searched
        ),
    ]


def _curves(searched: list[str]) -> list[Any]:
    """Every run's loss, and validation by setting: the mean of the runs that share a value, with its standard error."""
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(x=STEP, y=["validation/accuracy"], title="Validation accuracy"),
        wr.LinePlot(
            x=STEP, y=["train/loss"], title="Training loss", smoothing_type="exponential", smoothing_factor=0.6
        ),
        *(
            wr.LinePlot(
                x=STEP,
                y=["validation/accuracy"],
                title=f"Validation accuracy by {name}",
                groupby=wr.Config(name),
                groupby_aggfunc="mean",
                groupby_rangefunc="stderr",
                aggregate=True,
            )
            for name in searched
        ),
    ]


def _costs() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    quality = wr.SummaryMetric(REPORTED)
    return [
        wr.ScatterPlot(x=wr.SummaryMetric("seconds/all"), y=quality, title="Test accuracy and seconds"),
        wr.ScatterPlot(x=wr.SummaryMetric("examples_seen"), y=quality, title="Test accuracy and examples seen"),
        wr.ScatterPlot(x=wr.SummaryMetric("trainable_parameters"), y=quality, title="Test accuracy and parameters"),
    ]


# The report

_OPENING = (
    "Every run is one LoRA fine-tune. What selects is the accuracy on validation at the end of training "
    f"({SELECTED_BY}); test accuracy ({REPORTED}) is only reported, with the ends of its 95% interval beside it "
    "(_low, _high). A pruned run has neither. Differences within the intervals are ties: "
    "`python -m mathverify.compare` tests them in pairs."
)
_STUDIES = (
    "One line a study: its table of trials, the best configuration (best/*) and the command that runs it again "
    "(best/command). A study goes on in the same line when it is continued."
)


def _report(entity: str, project: str, searched: list[str]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    runs = wr.Runset(
        entity=entity,
        project=project,
        name="Runs",
        filters=_job(RUN_JOB),
        order=[wr.OrderBy(wr.SummaryMetric(SELECTED_BY), ascending=False)],
        pinned_columns=columns(searched),
    )
    studies = wr.Runset(
        entity=entity,
        project=project,
        name="Studies",
        filters=_job(SWEEP_JOB),
        pinned_columns=["run:displayName", "summary:trials", f"summary:best/{SELECTED_BY}", "summary:best/command"],
    )
    tables = [wr.WeavePanelSummaryTable(table_name="study/trials", layout=wr.Layout(w=24, h=10))]
    blocks: list[Any] = [
        wr.P(_OPENING),
        wr.H2("Settings"),
        wr.PanelGrid(runsets=[runs], panels=_placed(_settings_panels(searched))),
        wr.H2("Learning curves"),
        wr.PanelGrid(runsets=[runs], panels=_placed(_curves(searched))),
        wr.H2("Costs"),
        wr.PanelGrid(runsets=[runs], panels=_placed(_costs())),
        wr.H2("Studies"),
        wr.P(_STUDIES),
        wr.PanelGrid(runsets=[studies], panels=tables),
    ]
    return wr.Report(entity=entity, project=project, title=TITLE, blocks=blocks, width="fluid")


def _placed(panels: list[Any]) -> list[Any]:
    """Panels of a report lie on a grid 24 wide: two in a row."""
    import wandb_workspaces.reports.v2 as wr

    for place, panel in enumerate(panels):
        panel.layout = wr.Layout(x=12 * (place % 2), y=8 * (place // 2), w=12, h=8)
    return panels


# Saving


def _save(views: Views) -> list[str]:
    _renew(views)
    return [views.workspace.save().url, views.report.save().url]


def _renew(views: Views) -> None:
    """Give both the identity of what an earlier call made, so that they are replaced and addresses stay good."""
    import wandb
    from wandb_workspaces.workspaces import internal

    workspace, report = views.workspace, views.report
    try:
        workspace._internal_id = internal.get_view_dict(
            workspace.entity, workspace.project, workspace._internal_name.removeprefix("nw-").removesuffix("-v")
        )["id"]
    except ValueError as error:
        if "Workspace" not in str(error):  # the project itself is not there
            raise
    for earlier in wandb.Api().reports(f"{report.entity}/{report.project}"):
        if earlier.display_name == TITLE:
            report.id = earlier.id


def _view_name(entity: str, project: str) -> str:
    """A view's own name, in W&B's form; the same for the same project."""
    return f"nw-{hashlib.sha256(f'{entity}/{project}'.encode()).hexdigest()[:11]}-v"


def _require_extra() -> None:
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("--wandb needs wandb-workspaces: pip install 'mathverify[dashboards]'")


def _bounded(target: str, save: Callable[[], list[str]]) -> list[str]:
    """What `save` returns, or one line: its errors are of many kinds, and it may retry for hours."""
    done: list[list[str]] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            done.append(save())
        except BaseException as error:  # also SystemExit: it is told below
            failed.append(error)

    service.set_up(None)  # the library prints addresses and retries as it goes
    thread = threading.Thread(target=work, name="wandb-views", daemon=True)
    thread.start()
    thread.join(SAVE_SECONDS)
    if done:
        return done[0]
    if failed:
        said = " ".join(str(redact(str(failed[0]))).split())[:200] or type(failed[0]).__name__
    else:
        said = f"no answer within {SAVE_SECONDS:.0f} s"
    service.end()  # it would go on trying, also when this process wants to end
    raise UserError(
        f"--wandb {target}: the W&B server did not take it ({said}): check the names and `wandb login`, and try again"
    )
