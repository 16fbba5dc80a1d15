"""What is shown is complete, survives a pipe, and obeys no control character from data."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mathverify import screen
from mathverify.config import RunConfig, TrackingConfig
from mathverify.records import Costs, RunMetrics, RunRecord, Status
from mathverify.scoring import measure
from mathverify.screen import TrainingProgress, printable, show_result


def console(terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, _environ={})


def shown(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in printable(text))


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\r", "a\\nb\\r"),
        ("\u202egnp", "\\u202egnp"),
        ("né 数学 $x^2$", "né 数学 $x^2$"),
    ],
)
def test_control_characters_are_written_out(text: str, safe: str) -> None:
    assert printable(text) == safe


def test_without_a_terminal_lines_are_sparse_and_the_last_step_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(screen.time, "monotonic", lambda: float(next(clock)))  # a second per step
    out = console(terminal=False)
    with TrainingProgress(35, out) as progress:
        for step in range(1, 36):
            progress.update(step, loss=1 / step, tokens_per_second=12345.6)
    lines = shown(out).splitlines()
    assert len(lines) == 4 and lines[0].startswith("training 10/35") and "12,346 tokens/s" in lines[0]
    assert "loss 0.1000" in lines[0] and "0:25 left" in lines[0]
    assert lines[-1].startswith("training 35/35") and "0:00 left" in lines[-1]


def test_on_a_terminal_the_bar_shows_step_loss_and_rate() -> None:
    out = console(terminal=True)
    with TrainingProgress(10, out, description="r64 \x1b[31m[bold]") as progress:
        progress.update(10, loss=0.25, tokens_per_second=2000)
    text = shown(out)
    assert "10/10" in text and "loss 0.2500" in text and "2,000 tokens/s" in text
    assert "\\x1b[31m[bold]" in text and "\x1b[31m" not in text


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [40, 120])
def test_the_closing_table_names_everything_promised(terminal: bool, width: int) -> None:
    metrics = measure([1.0, -1.0, 2.0, -0.5], [True, False, True, True], ["a", "b", "c", "d"], resamples=100)
    record = RunRecord.begin(RunConfig(tracking=TrackingConfig(name="evil \x1b]0;x\x07 [red]name")))
    record.status = Status.completed
    record.metrics = RunMetrics(test=metrics, zero_shot=measure([1.0], [True], ["a"], resamples=100))
    record.costs = Costs(seconds={"load": 1.0, "train": 2.5}, tokens_per_second=1234.4)
    out = console(terminal, width)
    show_result(
        record, "/tmp/runs/[x]/a folder that is rather long, so that a narrow terminal has to wrap it", out
    )
    text = shown(out)
    for word in (
        "accuracy",
        "0.750",
        "AUROC",
        "Brier",
        "base rate",
        "zero-shot",
        "3.5",
        "1,234",
        "[red]name",
    ):
        assert word in text, word
    assert text.rstrip().splitlines()[-1].startswith("run folder: /tmp/runs/[x]/a folder that is rather long")
    assert "\x1b]0" not in text and "\x07" not in text


def test_a_failed_run_says_why_and_an_undefined_metric_says_so() -> None:
    record = RunRecord.begin(RunConfig())
    record.status, record.reason = Status.failed, "loss is not finite at step 7"
    record.metrics.test = measure([1.0, 2.0], [True, True], ["a", "b"], resamples=100)
    out = console(terminal=False)
    show_result(record, "/tmp/x", out)
    assert "failed" in shown(out) and "step 7" in shown(out)
    assert "undefined: only one class" in shown(out) and "nan" not in shown(out)
