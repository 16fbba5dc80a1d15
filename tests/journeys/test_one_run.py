"""One run, end to end, as a user has it: what it leaves behind, and that it can be trusted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mathverify.entry import compose, config_dir
from mathverify.errors import RunFailed, UserError
from mathverify.records import RunRecord, Status, read_predictions, read_record

from .conftest import SMALL

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "real_verification"
Train = Callable[..., RunRecord]


def test_a_run_leaves_everything_behind(train: Train, tmp_path: Path) -> None:
    record = train()
    assert record.status is Status.completed
    assert record.metrics.test is not None
    assert record.metrics.zero_shot is not None
    assert record.metrics.test.rows == 64
    assert record.metrics.test.accuracy.low is not None
    assert record.costs.optimizer_steps == 4
    assert record.costs.examples_seen == 32
    assert record.provenance.packages["torch"]
    assert record.base_fingerprint
    assert record.data_fingerprint
    assert set(record.metrics.slices) == set(pq.read_table(tmp_path / "run/predictions.parquet")["slice"].to_pylist())
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"result.json", "metrics.jsonl", "predictions.parquet", "adapter", "checkpoint"}
    columns = pq.read_schema(tmp_path / "run/predictions.parquet").names
    assert {"id", "group", "slice", "is_correct", "score", "probability"} <= set(columns)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert any("validation/accuracy" in line for line in lines)


def test_the_same_seed_gives_identical_metrics_and_another_does_not(train: Train) -> None:
    first, second, other = train(folder="a"), train(folder="b"), train("seed=1", folder="c")
    assert first.metrics == second.metrics
    assert first.metrics != other.metrics


def test_the_saved_adapter_gives_the_same_scores_in_plain_transformers_and_peft(train: Train, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mathverify import tiny
    from mathverify.examples.arithmetic import generate
    from mathverify.examples.schema import iter_examples
    from mathverify.prompts import render

    train()
    predictions = read_predictions(tmp_path / "run/predictions.parquet")
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    base = AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    true_id, false_id = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("True", "False"))
    for example, score in zip(iter_examples(generate(96, 48, 64, 0).test), predictions.scores, strict=True):
        ids = torch.tensor([tokenizer.encode(render(example, False).text)])
        with torch.no_grad():
            logits = plain(ids).logits[0, -1]
        assert float(logits[true_id] - logits[false_id]) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("preset", [p.stem for p in sorted((Path(config_dir()) / "experiment").glob("*.yaml"))])
def test_every_preset_runs_on_the_tiny_model(preset: str, train: Train) -> None:
    record = train(f"experiment={preset}", "train.max_steps=2")
    assert record.status is Status.completed
    assert record.config["quantization"]["kind"] == "nf4"
    assert record.config["optimizer"]["kind"] == "adamw_8bit"


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_other_quantizations_run_too(kind: str, train: Train) -> None:
    assert train(f"quantization={kind}", "train.max_steps=2").status is Status.completed


def test_the_sequence_loss_and_the_solution_in_the_prompt(train: Train) -> None:
    record = train("train.loss=sequence", "prompt=with_solution", "train.max_steps=2")
    assert record.status is Status.completed
    assert record.costs.tokens > train("train.max_steps=2", folder="short").costs.tokens


def test_max_examples_decides_the_length(train: Train) -> None:
    record = train("train.max_examples=20")
    assert record.costs.optimizer_steps == 3
    assert record.costs.examples_seen == 24


def test_generation_is_reported_beside_the_scores(train: Train) -> None:
    record = train("evaluate=generate", "evaluate.max_new_tokens=4", "data.test_rows=16", "train.max_steps=2")
    generated = record.notes["generated"]
    assert generated["metrics"]["rows"] == 16
    assert 0 <= generated["unparsed"] <= 16
    assert record.metrics.test is not None


def test_a_diverging_run_fails_with_step_and_cause(train: Train, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="at step"):
        train("optimizer.learning_rate=1e30", "optimizer.max_grad_norm=null")
    record = read_record(tmp_path / "run")
    assert record.status is Status.failed
    assert record.reason is not None
    assert "at step" in record.reason


def test_a_finished_run_is_not_done_again_and_another_is_refused(train: Train, tmp_path: Path) -> None:
    train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UserError, match=r"already holds another run .*lora\.rank"):
        train("lora.rank=2")


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mathverify.train", *arguments],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL])
def test_a_run_that_was_killed_continues_to_the_same_end(number: signal.Signals, train: Train, tmp_path: Path) -> None:
    length = ["train.max_steps=40", "train.checkpoint_every=5"]
    whole = train(*length, "train.threads=1", folder="whole")
    arguments = [*SMALL, *length, "train.threads=1", "hydra.run.dir=killed", f"data.cache_dir='{tmp_path}/cache'"]
    process = command(*arguments, cwd=tmp_path)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("train/loss") > 12):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "Continue with: python -m mathverify.train" in out
    assert read_record(tmp_path / "killed").status is not Status.completed
    process = command(*arguments, cwd=tmp_path)
    assert process.wait(timeout=120) == 0
    record = read_record(tmp_path / "killed")
    assert record.metrics == whole.metrics
    assert record.costs.optimizer_steps == 40
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "train/loss" in line]
    assert steps == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not beside this checkout")
def test_real_rows_run_the_whole_job(tmp_path: Path) -> None:
    from mathverify.train import train_one

    files = [f"data.{split}='{REAL / split}.parquet'" for split in ("train", "validation", "test")]
    limits = ["data.train_rows=200", "data.validation_rows=60", "data.test_rows=60", "data.slice_column=generator"]
    config = compose(
        [
            "data=table",
            *files,
            *limits,
            f"data.cache_dir='{tmp_path}'",
            "tracking=none",
            "train.max_steps=2",
            "optimizer.warmup_steps=1",
            "prompt=with_solution",
            "prompt.max_length=700",
        ]
    )
    train_one(config, tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record.status is Status.completed
    assert len(record.metrics.slices) > 1
    dropped = record.notes["data"]["prepared"]["dropped"]
    assert sum(entry["count"] for entry in dropped) > 0


def test_offline_tracking_leaves_a_wandb_run(train: Train, tmp_path: Path) -> None:
    train("tracking=wandb", "tracking.mode=offline", "train.max_steps=2")
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb"))


def test_probabilities_are_the_logistic_of_the_scores(train: Train, tmp_path: Path) -> None:
    train()
    table = pq.read_table(tmp_path / "run/predictions.parquet")
    scores = table["score"].to_numpy()
    assert np.allclose(table["probability"].to_numpy(), 1 / (1 + np.exp(-scores)))


@pytest.mark.slow
def test_a_grid_goes_on_after_a_run_that_fails(tmp_path: Path) -> None:
    grid = ["optimizer.max_grad_norm=null", "optimizer.learning_rate=1e30,1e-4", "hydra.sweep.dir=grid"]
    process = command("-m", *SMALL, *grid, f"data.cache_dir='{tmp_path}/cache'", cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "at step" in errors
    assert [read_record(tmp_path / "grid" / n).status for n in "01"] == [Status.failed, Status.completed]


@pytest.mark.slow
def test_what_is_wrong_with_a_grid_is_told_before_its_first_job(tmp_path: Path) -> None:
    process = command("-m", *SMALL, "seed=1,-1,-2", "hydra.sweep.dir=grid", cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len(errors.strip().splitlines()) == 2
    assert "seed = -1" in errors
    assert "seed = -2" in errors
    assert not (tmp_path / "grid" / "0").exists()


@pytest.mark.slow
def test_two_processes_never_share_a_run_folder(tmp_path: Path) -> None:
    arguments = [*SMALL, "train.max_steps=60", "hydra.run.dir=one", f"data.cache_dir='{tmp_path}/cache'"]
    first = command(*arguments, cwd=tmp_path)
    while not (tmp_path / "one" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = command(*arguments, cwd=tmp_path)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2
    assert "another process" in errors
    assert first.wait(timeout=120) == 0
