"""Out-of-memory injected into every kind of pass of a real run: it comes out the same, or one line says what to do.

And a million rows under a cap on the host's memory. That it does not grow with the file is in tests/examples/test_table.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mathverify.engine.model import PackedModel
from mathverify.records import Status, read_predictions, read_record
from mathverify.run import PackRunner

from .conftest import TINY, Command

RUN = ["lora=r4", "lora.dropout=0.1", "train.token_budget=300", "evaluate.max_new_tokens=3", "data.test_rows=32"]
KINDS: dict[str, list[str]] = {
    # what the run must be like to have such passes
    "training": [],
    "training, sequence loss": ["train.loss=sequence"],
    "validation": [],
    "test": [],
    "zero-shot": [],
    "generation": ["evaluate=generate"],
}
Crowd = Callable[[str, bool], list[int]]


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Crowd:
    """Let passes of one kind run out of memory: the first two of more than one segment, or every one."""

    def crowded(kind: str, always: bool) -> list[int]:
        split = ""
        hits: list[int] = []
        real_scores, real_hidden = PackRunner._scores, PackedModel.hidden
        monkeypatch.setattr("mathverify.prepare._warm", OrderedDict())  # which knows the base's scores already

        def scores(self: PackRunner, name: str, *rest: Any) -> Any:
            nonlocal split
            split = name
            return real_scores(self, name, *rest)

        def is_kind(layout: Any, training: bool) -> bool:
            match kind:
                case "training" | "training, sequence loss":
                    return training
                case "zero-shot":
                    return not training and any(segment.slot is None for segment in layout.segments)
            return not training and split == kind

        def short(size: int) -> None:
            if always or (len(hits) < 2 and size > 1):
                hits.append(size)
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        def hidden(self: PackedModel, layout: Any, last_only: bool = False) -> Any:
            found = real_hidden(self, layout, last_only)  # first, so that what it allocated is thrown away
            if is_kind(layout, bool(self._now and self._now[1])):
                short(len(layout.segments))
            return found

        monkeypatch.setattr(PackRunner, "_scores", scores)
        monkeypatch.setattr(PackedModel, "hidden", hidden)
        if kind == "generation":
            from mathverify.engine import generate

            real_write = generate._write

            def write(model: Any, store: Any, rows: list[int], *rest: Any) -> Any:
                short(len(rows))
                return real_write(model, store, rows, *rest)

            monkeypatch.setattr(generate, "_write", write)
        return hits

    return crowded


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_does_not_fit_is_repeated_smaller_with_the_same_result(
    kind: str, command: Command, crowd: Crowd, tmp_path: Path
) -> None:
    run = [*TINY, *RUN, *KINDS[kind]]
    assert command(*run, "hydra.run.dir=calm").code == 0
    hits = crowd(kind, False)
    ended = command(*run, "hydra.run.dir=crowded")
    assert ended.code == 0, ended
    assert len(hits) == 2
    calm, crowded = (read_record(tmp_path / name) for name in ("calm", "crowded"))
    assert crowded.status is Status.completed
    assert crowded.costs.tokens == calm.costs.tokens
    ours, theirs = (read_predictions(tmp_path / name / "predictions.parquet") for name in ("crowded", "calm"))
    assert np.abs(ours.scores - theirs.scores).max() < 1e-5
    assert ours.ids == theirs.ids
    if kind == "generation":
        assert crowded.notes["generated"]["metrics"] == calm.notes["generated"]["metrics"]


@pytest.mark.parametrize("kind", KINDS)
def test_when_not_even_one_segment_fits_a_line_says_what_to_do(
    kind: str, command: Command, crowd: Crowd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = [*TINY, *RUN, *KINDS[kind], "hydra.run.dir=run"]
    crowd(kind, True)
    ended = command(*run)
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    for part in ("out of memory", "train.memory=lean", "prompt.max_length"):
        assert part in ended.err
    failed = read_record(tmp_path / "run")
    assert failed.status is Status.failed
    assert failed.finished is not None
    assert ended.err.strip() == f"error: {failed.reason}"
    monkeypatch.undo()  # there is memory again
    assert command(*run).code == 0
    assert read_record(tmp_path / "run").status is Status.completed


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "at_once"), [("basic", 1), ("pack", 3)])
@pytest.mark.parametrize("kind", ["training", "validation", "generation"])
def test_a_trial_that_fits_no_pass_is_told_so_and_the_others_go_on(
    kind: str, launcher: str, at_once: int, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever has to do with rank 8 is too large."""
    from mathverify.engine import generate

    real_hidden, real_write = PackedModel.hidden, generate._write

    def require_room(model: PackedModel, slots: set[int | None]) -> None:
        assert model.host.active is not None
        adapters = [model.host.active.adapters[slot] for slot in slots if slot is not None]
        if any(adapter is not None and adapter.lora.rank == 8 for adapter in adapters):
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    def hidden(self: PackedModel, layout: Any, last_only: bool = False) -> Any:
        if kind == ("training" if self._now and self._now[1] else "validation"):
            require_room(self, {segment.slot for segment in layout.segments})
        return real_hidden(self, layout, last_only)

    def write(model: Any, *rest: Any) -> Any:
        if kind == "generation":
            require_room(model, {0})
        return real_write(model, *rest)

    monkeypatch.setattr(PackedModel, "hidden", hidden)
    monkeypatch.setattr(generate, "_write", write)
    study = ["-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.study_name=s"]
    study += ["hydra.sweeper.sampler.seed=1", f"hydra/launcher={launcher}", f"hydra.sweeper.n_jobs={at_once}"]
    ended = command(*study, *TINY, *RUN[1:], *KINDS[kind], "lora=r4", "lora.rank=choice(2,4,8)")
    assert ended.code == 3, ended
    assert "3 trials: 2 completed, 0 pruned, 0 failed, 1 out of memory" in ended.out
    found = {r.config["lora"]["rank"]: r for r in map(read_record, (tmp_path / "multirun/s").glob("[0-9]"))}
    assert {rank: r.status.value for rank, r in found.items()} == {2: "completed", 4: "completed", 8: "failed"}
    assert "nothing is left to split" in str(found[8].reason)


def test_no_memory_for_the_optimizer_fails_the_run_with_step_and_cause(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    ended = command(*TINY, *RUN, "hydra.run.dir=run")
    assert ended.code == 1, ended
    assert ended.err.strip() == "error: out of memory for the optimizer's state at step 1: use optimizer=adamw_8bit"
    assert read_record(tmp_path / "run").status is Status.failed


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED when",
    ],
)
def test_other_ways_to_say_out_of_memory_count_too(text: str) -> None:
    from mathverify.engine.passes import TokenBudget

    budget = TokenBudget(100)

    def work() -> int:
        if budget.tokens > 30:
            raise RuntimeError(text)
        return budget.tokens

    assert budget.until_it_fits([10] * 10, work) == 25
    with pytest.raises(RuntimeError, match="shape"):
        budget.until_it_fits([10], lambda: (_ for _ in ()).throw(RuntimeError("shape mismatch")))


@pytest.mark.long
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_million_rows_are_read_checked_and_split_under_a_cap_below_their_text(ending: str) -> None:
    """A million rows of 740 bytes are 706 MiB of text, and 852 MiB as jsonl."""
    from .million_rows import measure

    found = measure(1_000_000, cap_mib=512, ending=ending)
    assert found["rows"] == 1_000_000
    assert 0 < found["mib_above_start"] < 512


def test_the_cap_is_one() -> None:
    from .million_rows import measure

    with pytest.raises(AssertionError, match="emory"):
        measure(20_000, cap_mib=1)
