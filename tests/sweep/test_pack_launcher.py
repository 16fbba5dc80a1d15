"""`hydra/launcher=pack` as a user has it: the same runs as one after another, on one base."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from hydra.utils import get_object

from mathverify import entry
from mathverify.config import RunConfig
from mathverify.engine.budget import BudgetPlan
from mathverify.engine.lora import Adapter
from mathverify.engine.pack import Pack
from mathverify.errors import CannotWrite, Interrupted, RunFailed, UserError
from mathverify.records import RunRecord, Status, read_predictions, read_record
from mathverify.screen import SCREEN
from mathverify.sweep.grouping import by_base, difference
from mathverify.sweep.storage import open_storage
from mathverify.train import task, train_one
from tests.journeys.conftest import SMALL

ROOT = Path(__file__).parents[2]
PACK = ["-m", "hydra/launcher=pack", "hydra.sweep.dir=grid"]


class Cli:
    """The command line within this process, so that torch is imported once. Runs in tmp_path."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self._capsys, self._monkeypatch, self.cache = capsys, monkeypatch, cache

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run to the end; what was printed on both streams."""
        chosen = {word.partition("=")[0] for word in arguments}
        small = [word for word in SMALL if word.partition("=")[0] not in chosen]
        words = ["train", *arguments, *small, f"data.cache_dir='{self.cache}'"]
        self._monkeypatch.setattr(sys, "argv", words)
        self._capsys.readouterr()
        ended = 0
        try:
            entry.main(task)
        except SystemExit as end:
            ended = int(end.code or 0)
        out, err = self._capsys.readouterr()
        assert ended == code, out + err
        return out + err


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr("mathverify.prepare._warm", OrderedDict())
    return Cli(capsys, monkeypatch, cache)


@pytest.fixture
def alone(tmp_path: Path, cache: Path) -> Callable[..., Path]:
    """Do one of a grid's runs by itself; its folder."""

    def run(*overrides: str) -> Path:
        chosen = {word.partition("=")[0] for word in overrides}
        small = [word for word in SMALL if word.partition("=")[0] not in chosen]
        folder = tmp_path / "alone" / re.sub(r"\W+", "-", " ".join(overrides))
        train_one(entry.compose([*small, *overrides, f"data.cache_dir='{cache}'"]), folder)
        return folder

    return run


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def assert_same_run(packed: Path, single: Path) -> None:
    """All that a run leaves behind, to the tolerance that packs keep."""
    ours, theirs = read_record(packed), read_record(single)
    assert ours.status is theirs.status is Status.completed
    assert (ours.fingerprint, ours.data_fingerprint) == (theirs.fingerprint, theirs.data_fingerprint)
    assert losses(packed) == pytest.approx(losses(single), rel=1e-5)
    found, expected = (read_predictions(folder / "predictions.parquet") for folder in (packed, single))
    assert found.ids == expected.ids
    assert np.abs(found.scores - expected.scores).max() < 1e-4
    assert ours.metrics.test is not None
    assert theirs.metrics.test is not None
    assert ours.metrics.test.accuracy == theirs.metrics.test.accuracy
    assert ours.metrics.zero_shot == theirs.metrics.zero_shot
    assert ours.metrics.validation is not None
    assert theirs.metrics.validation is not None
    assert ours.metrics.validation.accuracy == theirs.metrics.validation.accuracy
    same = ("tokens", "optimizer_steps", "examples_seen", "trainable_parameters")
    assert all(getattr(ours.costs, name) == getattr(theirs.costs, name) for name in same)


def test_a_grid_in_a_pack_leaves_what_its_runs_leave_alone(
    cli: Cli, alone: Callable[..., Path], tmp_path: Path
) -> None:
    out = cli(*PACK, "lora=r4,r16", "seed=1,2", "lora.dropout=0.1")
    common = "model, quantization, prompt, data, device, train.memory, train.token_budget and train.threads"
    assert f"pack 1: runs 0, 1, 2, 3, which share {common}\n" in out
    points = [("lora=r4", "seed=1"), ("lora=r4", "seed=2"), ("lora=r16", "seed=1"), ("lora=r16", "seed=2")]
    for number, point in enumerate(points):
        folder = tmp_path / "grid" / str(number)
        assert_same_run(folder, alone(*point, "lora.dropout=0.1"))
        assert read_record(folder).notes["pack"] == {"most_runs_beside": 3}
        assert set(point) <= set(json.loads(json.dumps((folder / ".hydra/overrides.yaml").read_text().split())))
        assert (folder / "adapter/adapter_model.safetensors").is_file()


def test_runs_are_called_by_their_numbers_wherever_their_folders_are(cli: Cli, tmp_path: Path) -> None:
    out = cli(
        *PACK, "hydra.sweep.subdir='at most ${prompt.max_length}'", "prompt.max_length=400,500", "train.eval_every=null"
    )
    assert "pack 1: run 0\npack 2: run 1, prompt.max_length is 500, not 400\n" in out
    for number, length in enumerate((400, 500)):
        said = [line for line in out.splitlines() if line.startswith(f"run {number} (r64-a64-b4)")]
        assert len(said) == 2  # it joins and ends
        assert said[0].endswith(f"grid/at most {length}")


def test_the_sum_of_the_runs_seconds_is_the_time_that_passed(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mathverify.sweep.packs import Packs

    real = Packs.run
    passed = 0.0

    def timed(packs: Packs) -> None:
        nonlocal passed
        start = time.perf_counter()
        real(packs)
        passed = time.perf_counter() - start

    monkeypatch.setattr(Packs, "run", timed)
    cli(*PACK, "seed=1,2,3")
    costs = [read_record(tmp_path / "grid" / number).costs for number in "012"]
    assert 0.8 * passed < sum(sum(cost.seconds.values()) for cost in costs) < passed
    speeds = [cost.tokens_per_second for cost in costs]
    assert speeds == pytest.approx([speeds[0]] * 3, rel=1e-2)  # a round's time goes by tokens


class Counted:
    """Calls of a function that still does its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
        self.calls: list[Any] = []
        real = get_object(target)

        def counting(*arguments: Any, **options: Any) -> Any:
            self.calls.append(arguments)
            return real(*arguments, **options)

        monkeypatch.setattr(target, counting)


def test_the_next_pack_loads_reads_and_tokenises_nothing_and_the_base_is_scored_once(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mathverify.base._warm", {})
    loaded = Counted(monkeypatch, "mathverify.base._load_model")
    read = Counted(monkeypatch, "mathverify.prepare.load")
    tokenised = Counted(monkeypatch, "mathverify.prepare.tokenize")
    scored = Counted(monkeypatch, "mathverify.run.score")
    out = cli(*PACK, "train.token_budget=1000,2000", "seed=1,2")
    assert "pack 2: runs 2, 3, train.token_budget is 2000, not 1000" in out
    assert (len(loaded.calls), len(read.calls), len(tokenised.calls)) == (1, 1, 3)
    assert [adapters for _, adapters, *_ in scored.calls].count([None]) == 1
    zero = [read_record(tmp_path / "grid" / number).metrics.zero_shot for number in "0123"]
    assert zero[0] is not None
    assert zero == [zero[0]] * 4


def test_a_quantised_base_is_made_once_for_all_packs(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mathverify.base._warm", {})
    loaded = Counted(monkeypatch, "mathverify.base._load_model")
    out = cli(*PACK, "quantization=nf4,none", "prompt=answer_only,with_solution", "train.max_steps=2")
    assert "pack 2: run 1, prompt.with_solution is True, not False" in out
    assert "pack 3: run 2, quantization.kind is none, not nf4" in out
    assert len(loaded.calls) == 2
    assert all(read_record(tmp_path / "grid" / number).status is Status.completed for number in "0123")


def test_runs_on_a_quantised_base_train_beside_each_other(cli: Cli, alone: Callable[..., Path], tmp_path: Path) -> None:
    cli(*PACK, "quantization=nf4", "train.max_steps=2", "seed=1,2")
    for number, seed in (("0", 1), ("1", 2)):
        assert_same_run(tmp_path / "grid" / number, alone("quantization=nf4", "train.max_steps=2", f"seed={seed}"))
        assert read_record(tmp_path / "grid" / number).notes["pack"] == {"most_runs_beside": 1}


def test_the_next_base_is_loaded_when_nothing_holds_the_last_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where one base is warm at a time."""
    from mathverify import base

    models: list[weakref.ref[Any]] = []
    load = base._load_model

    def loading(*arguments: Any) -> Any:
        assert [ref() for ref in models] == [None] * len(models)
        model = load(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(base, "_warm", {})
    monkeypatch.setattr(base, "_has_room_for_two", lambda device: False)
    monkeypatch.setattr(base, "_load_model", loading)
    cli(*PACK, "quantization=none,int8", "seed=1,2", "train.max_steps=2")
    assert len(models) == 2


def test_a_freed_place_takes_the_next_run_while_the_others_go_on(
    cli: Cli, alone: Callable[..., Path], tmp_path: Path
) -> None:
    out = cli(*PACK, "hydra.launcher.max_trials=2", "train.max_steps=2,8", "lora=r4,r16", "train.loss=label")
    begins, long_ends = out.index("run 3 (r16-a16-b4): 8 steps"), out.index("run 2 (r4-a4-b4) completed")
    assert begins < long_ends
    for number, point in enumerate([(2, "r4"), (2, "r16"), (8, "r4"), (8, "r16")]):
        assert_same_run(tmp_path / "grid" / str(number), alone(f"train.max_steps={point[0]}", f"lora={point[1]}"))
        assert read_record(tmp_path / "grid" / str(number)).notes["pack"] == {"most_runs_beside": 1}


def test_runs_one_at_a_time_are_each_planned_for(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory for a run of batch 2 says nothing of the run of batch 4 behind it, nor passes that are large enough."""
    planned: list[tuple[int, ...]] = []
    budgets: list[int] = []
    real = Pack.step

    def plan(model: Any, configs: list[RunConfig], *rest: Any) -> BudgetPlan:
        planned.append(tuple(config.train.batch_size for config in configs))
        most = max(planned[-1])
        return BudgetPlan(1000 * most, f"needs room for {most}")

    def step(pack: Pack) -> Any:
        budgets.append(pack.budget.tokens)
        return real(pack)

    monkeypatch.setattr("mathverify.prepare.plan_budget", plan)
    monkeypatch.setattr(Pack, "step", step)
    batches = "train.batch_size=2,4,4,2"
    out = cli(*PACK, "hydra.launcher.max_trials=1", "train.max_steps=2", batches)
    assert planned == [(2,), (4,), (2,)]
    assert budgets == [2000] * 2 + [4000] * 4 + [2000] * 2
    assert re.findall(r"run \d needs room for \d", out) == ["run 1 needs room for 4", "run 3 needs room for 2"]
    notes = [read_record(tmp_path / "grid" / str(number)).notes["memory"] for number in range(4)]
    assert notes == [f"needs room for {batch}" for batch in (2, 4, 4, 2)]
    # Several at once share passes: the plan is that of the first ones.
    planned.clear()
    cli(*PACK, "hydra.sweep.dir=several", "hydra.launcher.max_trials=2", "train.max_steps=2", "train.batch_size=2,4,3")
    assert planned == [(2, 4)]


def test_a_run_that_has_ended_leaves_memory_while_others_take_its_place(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: weakref.WeakSet[Any] = weakref.WeakSet()
    real = Pack.step

    def step(pack: Pack) -> Any:
        trials.update(pack.running)
        gc.collect()
        assert {trial.config.seed for trial in trials} == {trial.config.seed for trial in pack.running}
        return real(pack)

    monkeypatch.setattr(Pack, "step", step)
    cli(*PACK, "hydra.launcher.max_trials=2", "train.max_steps=2", "seed=1,2,3,4,5")
    gc.collect()
    assert not trials


def test_nothing_of_a_run_is_held_when_others_take_its_place(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who come next need the room of its adapter, gradient and optimizer."""
    from mathverify import run as runs

    left: list[weakref.ref[Any]] = []
    held: list[int] = []
    leave, open_run = runs.PackRunner._leave, runs.open_run

    def leaving(runner: runs.PackRunner, run: runs.Run, status: Status) -> None:
        left.extend(weakref.ref(part) for part in (run.trial, run.trial.adapter, run.trial.optimizer))
        leave(runner, run, status)

    def opening(*arguments: Any) -> runs.Run | None:
        gc.collect()
        held.append(sum(ref() is not None for ref in left))
        return open_run(*arguments)

    monkeypatch.setattr(runs.PackRunner, "_leave", leaving)
    monkeypatch.setattr("mathverify.sweep.packs.open_run", opening)
    cli(*PACK, "hydra.launcher.max_trials=2", "train.max_steps=2", "seed=range(6)")
    assert len(left) == 6 * 3
    assert held == [0] * 6


def test_runs_of_a_pack_may_differ_in_all_but_the_base(cli: Cli, alone: Callable[..., Path], tmp_path: Path) -> None:
    axes = ["train.loss=label,sequence", "optimizer=adamw,adamw_8bit"]
    cli(*PACK, *axes, "optimizer.schedule=cosine", "lora.target_modules=[q_proj,down_proj]", "train.batch_size=3")
    number = 0
    for loss in ("label", "sequence"):
        for optimizer in ("adamw", "adamw_8bit"):
            single = alone(
                f"train.loss={loss}", f"optimizer={optimizer}", "optimizer.schedule=cosine",
                "lora.target_modules=[q_proj,down_proj]", "train.batch_size=3",
            )  # fmt: skip
            assert_same_run(tmp_path / "grid" / str(number), single)
            assert read_record(tmp_path / "grid" / str(number)).notes["pack"] == {"most_runs_beside": 3}
            number += 1


def test_a_run_that_diverges_fails_with_its_reason_and_the_others_do_not_notice(
    cli: Cli, alone: Callable[..., Path], tmp_path: Path
) -> None:
    rates = "optimizer.learning_rate=1e-4,1e30,2e-4"
    out = cli(*PACK, rates, "optimizer.max_grad_norm=null", code=1)
    failed = read_record(tmp_path / "grid/1")
    assert failed.status is Status.failed
    assert failed.reason is not None
    assert "at step" in failed.reason
    assert f"failed: {failed.reason}" in out
    assert out.count(failed.reason) == 1
    assert "Error executing job" not in out
    assert failed.metrics.test is None
    for number, rate in ((0, "1e-4"), (2, "2e-4")):
        single = alone(f"optimizer.learning_rate={rate}", "optimizer.max_grad_norm=null")
        assert_same_run(tmp_path / "grid" / str(number), single)
        assert read_record(tmp_path / "grid" / str(number)).notes["pack"] == {"most_runs_beside": 2}


def test_a_run_whose_disk_is_full_ends_alone_and_can_be_continued(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mathverify.engine.checkpoint import save_checkpoint as real

    def full(trial: Any, folder: Path, *rest: Any) -> Path:
        if folder.parent.name == "1":
            raise CannotWrite(f"{folder}: cannot write (no space): free space")
        return real(trial, folder, *rest)

    monkeypatch.setattr("mathverify.run.save_checkpoint", full)
    out = cli(*PACK, "seed=1,2,3", code=2)
    assert "no space" in out
    assert [read_record(tmp_path / "grid" / n).status.value for n in "012"] == ["completed", "running", "completed"]
    monkeypatch.setattr("mathverify.run.save_checkpoint", real)
    out = cli(*PACK, "seed=1,2,3")
    assert "run 0 (r64-a64-b4) is already completed" in out
    assert read_record(tmp_path / "grid/1").status is Status.completed


def test_a_pack_that_breaks_up_goes_on_in_smaller_ones(
    cli: Cli, alone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = Pack.step
    steps = 0

    def narrow(pack: Pack) -> Any:
        nonlocal steps
        steps += 1
        if steps > 2 and len(pack.running) > 1:
            raise UserError("out of memory with 64 tokens a pass: use fewer trials at once")
        return real(pack)

    monkeypatch.setattr(Pack, "step", narrow)
    out = cli(*PACK, "seed=1,2,3")
    assert "the pack broke up (out of memory" in out
    monkeypatch.setattr(Pack, "step", real)
    for number, seed in enumerate((1, 2, 3)):
        assert_same_run(tmp_path / "grid" / str(number), alone(f"seed={seed}"))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let adapters of rank 16 run out of memory where there are more than so many others."""

    def set_room(most: int) -> None:
        alive: weakref.WeakSet[Adapter] = weakref.WeakSet()
        make = Adapter.__init__

        def making(adapter: Adapter, shapes: Any, lora: Any, *rest: Any) -> None:
            gc.collect()
            if lora.rank == 16 and len(alive) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore words")
            make(adapter, shapes, lora, *rest)
            alive.add(adapter)

        monkeypatch.setattr(Adapter, "__init__", making)

    return set_room


@pytest.mark.parametrize("most", ["null", "2"])
def test_a_run_that_finds_no_memory_beside_the_others_waits_until_they_have_ended(
    most: str, cli: Cli, room: Callable[[int], None], tmp_path: Path
) -> None:
    room(0)
    out = cli(*PACK, f"hydra.launcher.max_trials={most}", "lora.rank=8,16,4", "train.max_steps=2")
    assert "run 1 waits until there is room in memory" in out
    records = [read_record(tmp_path / "grid" / number) for number in "012"]
    assert [record.status for record in records] == [Status.completed] * 3
    assert "pack" not in records[1].notes


def test_a_run_that_finds_no_memory_alone_is_told_what_to_do_in_one_line(
    cli: Cli, room: Callable[[int], None], tmp_path: Path
) -> None:
    room(-1)
    out = cli(*PACK, "lora.rank=8,16,4", "train.max_steps=2", code=2)
    (line,) = [line for line in out.splitlines() if "out of memory" in line]
    assert line.startswith("error: ")
    assert "grid/1: out of memory for the run's adapter and optimizer: use a lower lora.rank" in line
    assert [read_record(tmp_path / "grid" / number).status for number in "02"] == [Status.completed] * 2
    assert not (tmp_path / "grid/1").exists()


@pytest.mark.parametrize("how", ["a signal", "a break-up"])
def test_a_validation_that_was_cut_short_is_done_first_when_the_runs_go_on(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    from mathverify.engine.evaluate import score as real
    from mathverify.prepare import prepare
    from mathverify.run import PackRunner, Screen, open_run

    configs = [entry.compose([*SMALL, f"seed={seed}", f"data.cache_dir='{cache}'"]) for seed in (1, 2)]
    bench = prepare(configs[0], beside=configs[1:])
    asked: list[tuple[int, int]] = []

    def judge(seed: int) -> Callable[..., None]:
        return lambda step, metrics: asked.append((seed, step))

    def train(stop: Callable[[], bool] = lambda: False) -> None:
        runs = [open_run(config, tmp_path / str(config.seed), bench, judge(config.seed)) for config in configs]
        PackRunner(bench, Screen(), stop).run([run for run in runs if run is not None])

    came: list[bool] = []

    def cut_short(model: Any, adapters: Any, store: Any, verdicts: Any, budget: Any, progress: Any, *rest: Any) -> Any:
        if how == "a break-up":
            raise UserError("out of memory with 64 tokens a pass")
        came.append(True)
        return real(model, adapters, store, verdicts, budget, progress, *rest)

    monkeypatch.setattr("mathverify.run.score", cut_short)
    with pytest.raises((Interrupted, UserError)):
        train(lambda: bool(came))
    assert [read_record(tmp_path / n).status for n in "12"] == [Status.interrupted] * 2
    assert asked == []
    monkeypatch.setattr("mathverify.run.score", real)
    train()
    assert asked == [(1, 2), (2, 2)]
    for n in "12":
        lines = [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "validation/accuracy" in line] == [2]
        assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]


def test_packs_are_as_large_as_before_once_the_run_to_blame_has_failed_alone(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pack.step
    sizes: list[int] = []

    def step(pack: Pack) -> Any:
        sizes.append(len(pack.running))
        if any(trial.config.seed == 1 for trial in pack.running):
            raise UserError("seed 1 is cursed")
        return real(pack)

    monkeypatch.setattr(Pack, "step", step)
    out = cli(*PACK, "hydra.launcher.max_trials=4", "train.max_steps=2", "seed=1,2,3,4,5", code=2)
    assert sizes == [4, 2, 1, 4, 4]
    assert "the run that broke failed alone: the others go on, up to 4 at once" in out


def test_packs_that_are_too_large_for_one_base_are_made_smaller_on_that_base_only(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pack.step
    sizes: dict[bool, list[int]] = {False: [], True: []}

    def step(pack: Pack) -> Any:
        with_solution = pack.running[0].config.prompt.with_solution
        sizes[with_solution].append(len(pack.running))
        if len(pack.running) > 2 and not with_solution:
            raise UserError("out of memory with 64 tokens a pass")
        return real(pack)

    monkeypatch.setattr(Pack, "step", step)
    cli(
        *PACK, "hydra.launcher.max_trials=4", "train.max_steps=2", "prompt=answer_only,with_solution", "seed=1,2,3,4"
    )  # fmt: skip
    assert sizes == {False: [4, 2, 2, 2, 2], True: [4, 4]}


@pytest.mark.parametrize("target", ["mathverify.engine.pack.Pack.step", "mathverify.run.save_checkpoint"])
def test_the_error_of_a_run_that_failed_holds_no_frames_while_others_train(
    target: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mathverify.sweep.ticket import Ticket

    errors: list[Exception] = []
    end = Ticket.end

    def noting(ticket: Ticket, value: float | None, error: Exception | None, is_told: bool) -> None:
        if error is not None:
            errors.append(error)
        end(ticket, value, error, is_told)

    def cursed(whose: Any, *arguments: Any) -> Any:
        for error in errors:
            assert error.__traceback__ is None
            assert error.__cause__ is not None
            assert error.__cause__.__traceback__ is None
        trials = whose.running if isinstance(whose, Pack) else [whose]
        if trials[0].config.seed == 1:
            try:
                _ = 1 / 0
            except ZeroDivisionError as cause:
                raise UserError("seed 1 is cursed") from cause
        return real(whose, *arguments)

    monkeypatch.setattr(Ticket, "end", noting)
    real = get_object(target)
    monkeypatch.setattr(target, cursed)
    cli(*PACK, "hydra.launcher.max_trials=1", "train.max_steps=2", "seed=1,2", code=2)
    assert [read_record(tmp_path / "grid" / n).status.value for n in "01"] == ["failed", "completed"]


def test_the_traceback_of_a_run_that_failed_is_shown_if_asked_for(
    cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pack: Pack) -> Any:
        raise UserError("this base is cursed")

    monkeypatch.setattr(Pack, "step", broken)
    monkeypatch.setattr(entry, "_wants_traceback", True)
    with pytest.raises(UserError, match="this base is cursed"):
        cli(*PACK, "seed=1")
    assert ", in broken\n" in capsys.readouterr().err


def test_an_error_that_nobody_meant_fails_its_run_and_is_shown_with_its_traceback_once(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pack: Pack) -> Any:
        raise ValueError("no " + "luck")

    monkeypatch.setattr(Pack, "step", broken)
    out = cli(*PACK, "seed=1", code=1)
    assert out.count(", in broken\n") == out.count("Traceback") == out.count("ValueError: no luck\n") == 1
    assert out.count("no luck") == 2
    assert "failed: no luck; " in out


def test_what_breaks_every_pack_fails_each_run_with_its_reason(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(pack: Pack) -> Any:
        raise UserError("out of memory with 64 tokens a pass")

    monkeypatch.setattr(Pack, "step", broken)
    cli(*PACK, "seed=1,2,3", code=2)
    for number in "012":
        record = read_record(tmp_path / "grid" / number)
        assert (record.status, record.reason) == (Status.failed, "out of memory with 64 tokens a pass")


def test_one_after_another_a_failed_run_leaves_the_memory_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's basic launcher keeps the error of a failed job until the last one has ended."""
    held: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def failing(config: RunConfig, folder: Path, **rest: Any) -> float:
        gc.collect()
        alive.append(sum(one() is not None for one in held))
        model = np.zeros(1)
        held.append(weakref.ref(model))
        try:
            raise ValueError("inside")
        except ValueError as error:
            raise RunFailed("loss is nan at step 3") from error

    monkeypatch.setattr("mathverify.train.train_one", failing)
    out = cli("-m", "hydra/launcher=basic", "hydra.sweep.dir=grid", "seed=1,2,3", code=1)
    assert alive == [0, 0, 0]
    assert out.count("loss is nan at step 3") == 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hydra.launcher.max_trials=0"], "hydra.launcher.max_trials = 0 is not possible"),
        (["hydra.job.chdir=true"], "hydra.job.chdir=true: runs of a pack share one process"),
        (["+hydra.job.env_set.TOKENS=3"], "hydra.job.env_set sets TOKENS: runs of a pack share one process"),
        (["hydra.launcher.max_trails=2"], "'max_trails' not in 'PackLauncherConf'"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(
    cli: Cli, overrides: list[str], said: str, tmp_path: Path
) -> None:
    for study in ([], ["sweep=rank_grid"]):
        out = cli(*PACK, *study, *overrides, code=2)
        (line,) = out.splitlines()
        assert said in line
        assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("job", ["chdir: true", "env_set: {TOKENS: '3'}"])
def test_a_swept_preset_cannot_change_the_process_of_the_others_either(cli: Cli, job: str, tmp_path: Path) -> None:
    presets = tmp_path / "own" / "experiment"
    presets.mkdir(parents=True)
    (presets / "plain.yaml").write_text("# @package _global_\nseed: 1\n")
    (presets / "special.yaml").write_text(f"# @package _global_\nhydra: {{job: {{{job}}}}}\n")
    out = cli("--config-dir", str(tmp_path / "own"), *PACK, "experiment=plain,special", code=2)
    assert "runs of a pack share one process" in out
    assert not (tmp_path / "grid" / "0").exists()


def test_a_run_that_cannot_be_is_refused_by_itself_and_its_folder_taken_back(cli: Cli, tmp_path: Path) -> None:
    out = cli(*PACK, "lora.target_modules=[q_proj],[nothing]", code=2)
    assert "the base has no linear 'nothing'" in out
    assert read_record(tmp_path / "grid/0").status is Status.completed
    assert not (tmp_path / "grid/1").exists()


def test_grouping_names_what_differs() -> None:
    configs = [RunConfig(), RunConfig(seed=3), RunConfig(), RunConfig()]
    configs[2].prompt.max_length = 100
    configs[3].lora.rank, configs[3].train.batch_size, configs[3].evaluate.zero_shot = 2, 1, False
    assert by_base(configs) == [[0, 1, 3], [2]]
    assert difference(configs[2], configs[0]) == "prompt.max_length is 100, not 2048"


# Studies

STUDY = [
    "-m", "hydra/sweeper=optuna", "hydra.sweeper.study_name=s", "hydra.sweeper.sampler.seed=3",
    "hydra.sweeper.sampler.n_startup_trials=3", "hydra.sweeper.direction=maximize",
    "lora.rank=choice(2,4,8)", "lora.alpha=choice(4,16)", "train.batch_size=choice(2,4)",
    "optimizer.learning_rate=3e-3", "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=2",
]  # fmt: skip
Row = tuple[int, str, dict[str, Any], Any, dict[int, float]]


def rows(folder: Path) -> list[Row]:
    study = optuna.load_study(study_name="s", storage=open_storage(None, folder))
    return [(t.number, t.state.name, t.params, t.values, t.intermediate_values) for t in study.trials]


def test_one_at_a_time_a_study_decides_as_with_the_basic_launcher(cli: Cli, tmp_path: Path) -> None:
    cli(*STUDY, "hydra/launcher=basic", "hydra.sweeper.n_trials=4", "hydra.sweep.dir=basic")
    cli(*STUDY, "hydra/launcher=pack", "hydra.sweeper.n_trials=4", "hydra.sweep.dir=pack")
    assert rows(tmp_path / "pack") == rows(tmp_path / "basic")
    assert {state for _, state, *_ in rows(tmp_path / "pack")} >= {"COMPLETE"}


def test_several_at_once_a_study_with_a_seed_comes_out_the_same_again(cli: Cli, tmp_path: Path) -> None:
    cli(*STUDY, "hydra/launcher=pack", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=3", "hydra.sweep.dir=a")
    assert re.search(r"together on it: runs \d+, \d+, \d+\n", (tmp_path / "a" / SCREEN).read_text())
    cli(*STUDY, "hydra/launcher=pack", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=3", "hydra.sweep.dir=b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert sum(state in ("COMPLETE", "PRUNED") for _, state, *_ in rows(tmp_path / "a")) == 4


def test_a_study_over_several_bases_keeps_its_places_full(cli: Cli, tmp_path: Path) -> None:
    cli(
        "-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.study_name=s",
        "hydra.sweeper.sampler.seed=1", "hydra/launcher=pack", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=6",
        "hydra.sweeper.direction=maximize", "prompt=choice(answer_only,with_solution)", "seed=choice(1,2,3)",
        "hydra.sweep.dir=study", "train.max_steps=2",
    )  # fmt: skip
    assert "waits for the next pack: prompt.with_solution is" in (tmp_path / "study" / SCREEN).read_text()
    assert [state for _, state, *_ in rows(tmp_path / "study")] == ["COMPLETE"] * 6


def test_a_failed_trial_is_told_with_its_reason_and_its_place_is_taken(cli: Cli, tmp_path: Path) -> None:
    out = cli(
        "-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.study_name=s",
        "hydra.sweeper.sampler.seed=1", "hydra/launcher=pack", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=4",
        "hydra.sweeper.direction=maximize", "optimizer.learning_rate=choice(1e-4,2e-4,1e30,3e-4)",
        "optimizer.max_grad_norm=null", "hydra.sweep.dir=study", code=3,
    )  # fmt: skip
    states = {params["optimizer.learning_rate"]: state for _, state, params, *_ in rows(tmp_path / "study")}
    assert states == {1e-4: "COMPLETE", 2e-4: "COMPLETE", 1e30: "FAIL", 3e-4: "COMPLETE"}
    assert re.search(r"failed .*\((loss|gradient norm) is \w+ at step \d+\)", out)
    (number,) = [n for n, state, *_ in rows(tmp_path / "study") if state == "FAIL"]
    assert "RunFailed" in (tmp_path / "study" / str(number) / "error.txt").read_text()


def test_a_judge_speaks_to_its_own_run_only(tmp_path: Path, cache: Path) -> None:
    from mathverify.prepare import prepare
    from mathverify.run import PackRunner, Screen, open_run

    configs = [entry.compose([*SMALL, f"seed={seed}", f"data.cache_dir='{cache}'"]) for seed in (1, 2)]
    bench = prepare(configs[0], beside=configs[1:])
    judges = (lambda step, metrics: f"enough at {step}"), (lambda step, metrics: None)
    runs = [open_run(c, tmp_path / str(n), bench, judges[n]) for n, c in enumerate(configs)]
    PackRunner(bench, Screen(), lambda: False).run([run for run in runs if run is not None])
    pruned, completed = (read_record(tmp_path / n) for n in "01")
    assert (pruned.status, pruned.reason, pruned.costs.optimizer_steps) == (Status.pruned, "enough at 2", 2)
    assert completed.status is Status.completed


def test_each_run_has_a_tracker_of_its_own_in_one_process(cli: Cli, tmp_path: Path) -> None:
    cli(*PACK, "seed=1,2,3", "tracking=wandb", "tracking.mode=offline", "train.max_steps=2")
    names = {file.name for n in "012" for file in (tmp_path / "grid" / n).rglob("run-*.wandb")}
    assert len(names) == 3


def test_a_pack_leases_one_device_for_all_its_runs(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mathverify.sweep import lease

    monkeypatch.setenv(lease.DEVICES_VARIABLE, "fake-0,fake-1")
    monkeypatch.setenv(lease.VISIBLE, "")
    monkeypatch.setenv("MATHVERIFY_LEASES", str(tmp_path / "leases"))
    monkeypatch.setattr(lease, "_held", None)
    cli(
        "-m", "sweep=rank_grid", "hydra.sweeper.study_name=s", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=study",
        "train.max_steps=2",
    )  # fmt: skip
    assert os.environ[lease.VISIBLE] == "fake-0"
    assert [file.name for file in (tmp_path / "leases").iterdir()] == ["fake-0.lease"]
    lease.give_device_back()
    assert [state for _, state, *_ in rows(tmp_path / "study")] == ["COMPLETE"] * 2


# Ends that nobody planned


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mathverify.train", *arguments],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("train/loss") > count):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def test_a_grid_that_is_stopped_before_it_trains_says_how_to_go_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mathverify.sweep.pack_launcher.setup_globals", stopped)  # the first that is done for a batch
        out = cli("-m", "hydra/launcher=pack", "hydra.sweep.dir=my grid", "seed=1,2", "train.max_steps=2", code=130)
    said, _, command = out.partition("Continue with: python -m mathverify.train ")
    assert said == "stopped. "
    cli(*(word for word in shlex.split(command) if word.partition("=")[0] != "data.cache_dir"))
    assert [read_record(tmp_path / "my grid" / n).status for n in "01"] == [Status.completed] * 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL])
def test_a_grid_that_was_cut_off_continues_to_the_same_ends(
    number: signal.Signals, alone: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    length = ["train.max_steps=40", "train.checkpoint_every=5"]
    arguments = [*PACK, *SMALL, *length, "seed=1,2", f"data.cache_dir='{cache}'"]
    process = command(*arguments, cwd=tmp_path)
    wait_for_steps(tmp_path / "grid/1", 12, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    records: list[RunRecord] = [read_record(tmp_path / "grid" / n) for n in "01"]
    assert all(any((tmp_path / "grid" / n / "checkpoint").iterdir()) for n in "01")
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert [record.status for record in records] == [Status.interrupted] * 2
        assert "Continue with: python -m mathverify.train -m hydra/launcher=pack" in out
        assert "hydra.sweep.dir=grid" in out
    process = command(*arguments, cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    for n, seed in (("0", 1), ("1", 2)):
        assert re.search(rf"run {n} \(r64-a64-b4\): step \d+/40", out)
        assert_same_run(tmp_path / "grid" / n, alone(f"seed={seed}", *length))


@pytest.mark.slow
def test_a_study_that_was_stopped_gives_all_its_trials_back(tmp_path: Path, cache: Path) -> None:
    arguments = [
        "-m", "sweep=rank_grid", *SMALL, "train.max_steps=30", "train.checkpoint_every=5", "hydra.sweeper.n_jobs=3",
        "hydra.sweeper.n_trials=4", f"data.cache_dir='{cache}'", "hydra.sweep.dir=study",
        "hydra.sweeper.study_name=s",
    ]  # fmt: skip
    process = command(*arguments, cwd=tmp_path)
    wait_for_steps(tmp_path / "study/2", 8, process)
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted: trial 0, 1, 2 is saved" in out
    assert "continue with: python -m mathverify.train -m sweep=rank_grid" in out
    process = command(*arguments, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [state for _, state, *_ in rows(tmp_path / "study")] == ["COMPLETE"] * 4
    words = (tmp_path / "study" / SCREEN).read_text()
    assert len(re.findall(r"run [012] \(.*\): step \d+/30", words)) == 3
