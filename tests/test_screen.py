"""What is shown is complete, survives a pipe, and obeys no control character from data."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mathverify.config import RunConfig, TrainConfig
from mathverify.engine.trial import StepReport
from mathverify.printable import printable
from mathverify.records import Costs, RunMetrics, RunRecord, Status
from mathverify.scoring import measure
from mathverify.screen import SCREEN, RunScreen, TrialScreen, final_table

CONFIG = RunConfig(train=TrainConfig(max_steps=35))


def console(terminal: bool, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, _environ={})


def shown(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


def running(step: int) -> Any:
    return SimpleNamespace(seconds={"train": float(step)}, trial=SimpleNamespace(step=step, steps=35))


def report(step: int) -> StepReport:
    return StepReport(step, 1 / step, 1e-3, 1.0, 16, 800)


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in printable(text))


@pytest.mark.parametrize(
    ("text", "safe"),
    [("\x1b[2J", "\\x1b[2J"), ("a\nb\r", "a\\nb\\r"), ("\u202egnp", "\\u202egnp"), ("né 数学 $x^2$", "né 数学 $x^2$")],
)
def test_control_characters_are_written_out(text: str, safe: str) -> None:
    assert printable(text) == safe


def test_without_a_terminal_lines_are_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("mathverify.screen.time.monotonic", lambda: float(next(clock)))
    out = console(terminal=False)
    with RunScreen(CONFIG, Path("folder"), out) as own:
        for step in range(1, 36):
            own.stepped(running(step), report(step), 12345.6)
    lines = shown(out).splitlines()
    assert 1 < len(lines) < 10
    assert "loss 0." in lines[0]
    assert "12,346 tokens/s" in lines[0]
    assert "s left" in lines[0]


def test_on_a_terminal_the_bar_shows_step_loss_speed_and_time_left() -> None:
    out = console(terminal=True)
    with RunScreen(CONFIG, Path("folder"), out) as own:
        own.phase("training")
        own.stepped(running(20), report(20), 2000)
        own._bar.refresh()  # type: ignore[union-attr]
    text = shown(out)
    for part in ("step 20/35", "loss 0.050", "2,000 tokens/s", "left"):
        assert part in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_trials_lines_go_to_its_folder_and_a_terminal_gets_a_bar_only(terminal: bool, tmp_path: Path) -> None:
    out = console(terminal)
    with TrialScreen(CONFIG, tmp_path, 3, out) as own:
        assert not (tmp_path / SCREEN).exists()  # a refused run leaves no file
        own.phase("training")
        own.stepped(running(20), report(20), 2000)
        if terminal:
            own._live._bar.refresh()  # type: ignore[union-attr]
        own.interrupted()
    written = (tmp_path / SCREEN).read_text()
    assert "training ..." in written
    assert "continue" in written
    assert "training" not in shown(out)
    assert ("#3  r64-a64-b4  step 20/35" in shown(out)) is terminal


def test_a_trial_whose_folder_cannot_be_written_is_not_disturbed(tmp_path: Path) -> None:
    with TrialScreen(CONFIG, tmp_path / "not there", 3, console(terminal=False)) as own:
        own.phase("training")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_final_table_names_everything_promised(terminal: bool) -> None:
    metrics = measure([1.0, -1.0, 2.0, -0.5], [True, False, True, True], ["a", "b", "c", "d"], resamples=100)
    record = RunRecord.begin(CONFIG)
    record.status = Status.completed
    record.metrics = RunMetrics(test=metrics, zero_shot=measure([1.0], [True], ["a"], resamples=100))
    record.costs = Costs(seconds={"load": 1.0, "train": 2.5}, tokens_per_second=1234.4)
    out = console(terminal)
    out.print(final_table(record, Path("/tmp/runs/[x]/evil\x1b]0;x\x07")))
    text = shown(out)
    for word in ("accuracy", "75.0%", "AUROC", "Brier", "base rate", "zero-shot", "3.5", "1,234", "/tmp/runs/[x]/evil"):
        assert word in text, word
    assert "\x1b]0" not in text
    assert "run folder" in text.rstrip().splitlines()[-1]


def test_an_undefined_metric_says_so() -> None:
    record = RunRecord.begin(CONFIG)
    record.metrics.test = measure([1.0, 2.0], [True, True], ["a", "b"], resamples=100)
    out = console(terminal=False)
    out.print(final_table(record, Path("folder")))
    assert "undefined: only one class" in shown(out)
    assert "nan" not in shown(out)
