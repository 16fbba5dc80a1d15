"""Places -> runs: whatever lies in a folder is shown as what it is, and nothing of it stops the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mathverify.compare.reading import State, read_runs
from mathverify.errors import UserError
from mathverify.records import Status, lock_run_folder

from .conftest import Make, TestRows, config_of


def test_runs_are_found_at_any_depth_in_natural_order_and_once(make: Make, tmp_path: Path) -> None:
    for number in (2, 10, 1):
        make(f"sweep/deep/{number}", config_of(seed=number))
    make("other/run", config_of(rank=64))
    (tmp_path / "sweep/deep/2/adapter").mkdir()
    (tmp_path / "sweep/deep/2/adapter/result.json").write_text("{}")  # not a run: a run's own folder is not searched
    found = read_runs([tmp_path / "sweep", tmp_path / "sweep/deep/2", tmp_path])
    assert [run.label for run in found.runs] == ["1", "2", "10", "run"]
    assert found.problems == []
    assert read_runs([tmp_path / "other/run/result.json"]).runs[0].folder == tmp_path / "other/run"


def test_only_settings_that_differ_and_matter_are_parameters(make: Make, tmp_path: Path) -> None:
    from dataclasses import replace

    from mathverify.config import TrainConfig

    make("a", config_of(rank=16, seed=1))
    make("b", replace(config_of(rank=64, seed=2), device="cpu", train=TrainConfig(max_steps=100, threads=3)))
    found = read_runs([tmp_path])
    assert found.varying == ["lora.rank", "lora.alpha", "seed"]
    assert [run.params["lora.rank"] for run in found.runs] == [16, 64]
    assert "device" not in found.runs[0].settings and "train.threads" not in found.runs[0].settings


def test_every_state_is_told(make: Make, tmp_path: Path) -> None:
    for status in Status:
        make(status.value, config_of(seed=1), status=status, reason=f"because\n{status.value}")
    make("held", status=Status.running)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/result.json").write_text('{"name": "r16')
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused/error.txt").write_text("Traceback:\n  ...\nUserError: no such model\n")
    lock = lock_run_folder(tmp_path / "held")
    try:
        states = {run.label: run for run in read_runs([tmp_path]).runs}
    finally:
        lock.release()
    assert {label: run.state.value for label, run in states.items()} == {
        "completed": "completed", "failed": "failed", "held": "running", "interrupted": "interrupted",
        "pruned": "pruned", "refused": "failed", "running": "killed", "torn": "unreadable",
    }  # fmt: skip
    assert states["failed"].error == "because failed"
    assert states["refused"].error == "UserError: no such model"
    assert "torn" in str(states["torn"].error)
    assert [label for label, run in states.items() if run.counts] == ["completed"]
    assert states["pruned"].validation_accuracy is not None and states["pruned"].accuracy is None


def test_asking_for_a_lock_takes_it_from_nobody(make: Make, tmp_path: Path) -> None:
    make("run", status=Status.running)
    lock_run_folder(tmp_path / "run").release()
    assert read_runs([tmp_path]).runs[0].state is State.killed
    lock_run_folder(tmp_path / "run").release()  # raises if the reader still held it


def test_repetitions_are_told_and_count_once(make: Make, tmp_path: Path) -> None:
    make("cut", config_of(seed=3), status=Status.interrupted, started=0)
    make("first", config_of(seed=3), started=1)
    make("again", config_of(seed=3), started=2)
    make("other", config_of(seed=4), started=3)
    runs = {run.label: run for run in read_runs([tmp_path]).runs}
    assert runs["again"].repeats is runs["first"]
    assert [run.label for run in runs.values() if run.counts] == ["first", "other"]


def test_test_sets_are_kept_apart(make: Make, tmp_path: Path) -> None:
    make("a", config_of(seed=1), TestRows(seed=1))
    make("b", config_of(seed=2), TestRows(seed=2))
    make("c", config_of(seed=3), TestRows(seed=2))
    sets = read_runs([tmp_path]).test_sets
    assert [[run.label for run in runs] for runs in sets.values()] == [["b", "c"], ["a"]]


def test_records_from_before_test_fingerprints_are_told_apart_by_what_they_show(make: Make, tmp_path: Path) -> None:
    for name, rows in (
        ("a", TestRows(seed=1)),
        ("b", TestRows(seed=1)),
        ("c", TestRows(rows=210, questions=210, seed=1)),
    ):
        path = make(name, config_of(seed=ord(name)), rows) / "result.json"
        plain = json.loads(path.read_text())
        del plain["test_fingerprint"]
        path.write_text(json.dumps(plain))
    assert [len(runs) for runs in read_runs([tmp_path]).test_sets.values()] == [2, 1]


def test_curves_skip_what_is_torn_or_not_a_number(make: Make, tmp_path: Path) -> None:
    folder = make("run", curve_points=4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "train/loss": null}\n[1]\n{"step": 102, "train/loss": NaN}\n{"step": 103, "train/lo')
    (run,) = read_runs([tmp_path]).runs
    curves = run.curve("train/loss")
    assert list(curves) == ["train/loss"]
    assert [step for step, _ in curves["train/loss"]] == [1, 34, 67, 100]
    assert set(run.curve()) == {"train/loss", "train/learning_rate", "validation/accuracy"}


@pytest.mark.parametrize(
    ("place", "says"),
    [("nothing", "no such folder"), ("empty", "holds no run"), ("foreign", "holds no run"),
     ("journal:///tmp/no-such-study.journal", "no such file"), ("sqlite:////tmp/no-such.db", "no such file")],
)  # fmt: skip
def test_places_without_runs_are_one_line_and_do_not_hide_the_others(
    make: Make, tmp_path: Path, place: str, says: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign/.hydra").mkdir(parents=True)
    where = place if "://" in place else str(tmp_path / place)
    with pytest.raises(UserError) as caught:
        read_runs([where])
    assert says in str(caught.value) and "\n" not in str(caught.value)
    found = read_runs([where, make("good")])
    assert len(found.runs) == 1 and len(found.problems) == 1 and says in found.problems[0]


def test_a_run_is_found_by_path_label_or_name(make: Make, tmp_path: Path) -> None:
    make("a", config_of(rank=16))
    make("b", config_of(rank=64))
    found = read_runs([tmp_path])
    assert found.find(str(tmp_path / "a")) is found.find("a") is found.find("r16-a16-b4") is found.runs[0]
    assert found.find(f"{tmp_path.name}/a") is found.runs[0]
    with pytest.raises(UserError, match=r"c: is none of the runs.*\(a, b\)"):
        found.find("c")


def test_reading_imports_nothing_heavy(make: Make, tmp_path: Path) -> None:
    make("a")
    code = (
        f"import sys; from mathverify.compare.reading import read_runs; assert read_runs([{str(tmp_path)!r}]).runs;"
        "print(sorted({'torch', 'transformers', 'optuna', 'pyarrow', 'scipy', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
