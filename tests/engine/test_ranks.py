"""Two processes that share a run end where one ends alone, and neither waits for the other in vain.

Tolerances, float32 on a CPU: losses 1e-5 relative, adapters 1e-4 relative (norm of the difference), scores 1e-5. What
differs is the order of additions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathverify.engine.ranks import Place, Ranks, leading, place, share_out
from mathverify.errors import RunFailed, UserError

from .ranks_worker import all_of_it

ROOT = Path(__file__).parents[2]
Found = dict[str, Any]


@given(st.lists(st.integers(1, 2000), max_size=60), st.integers(1, 5))
def test_each_segment_goes_to_one_process_and_none_has_a_segment_more_than_the_others(
    lengths: list[int], size: int
) -> None:
    shares = share_out(lengths, size)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_process_knows_its_place_from_torchrun_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert place() == Place(0, 1, 0, 1)
    monkeypatch.setenv("RANK", "1")
    assert place() == Place(0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert place() == Place(1, 4, 1, 2)


def test_without_torchrun_torch_distributed_is_not_imported() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from mathverify.train import main; main()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two processes make of it."""
    file = tmp_path_factory.mktemp("ranks") / "found.json"
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.engine.ranks_worker"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command, str(file)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: Found = json.loads(file.read_text())
    return found


@pytest.fixture(scope="module")
def one() -> Found:
    """What one process makes of the same."""
    return all_of_it(Ranks(), lambda: None)


def same_training(a: Found, b: Found) -> None:
    assert np.array(a["losses"]) == pytest.approx(np.array(b["losses"]), rel=1e-5)
    for x, y in zip(map(np.array, a["adapters"]), map(np.array, b["adapters"]), strict=True):
        assert np.linalg.norm(x - y) / np.linalg.norm(y) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("what", ["several trials", "one example", "out of memory", "resumed"])
def test_two_processes_train_to_where_one_does(one: Found, two: Found, what: str) -> None:
    same_training(two[what], one[what])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["several trials", "resumed"])
def test_their_adapters_are_bitwise_the_same(two: Found, what: str) -> None:
    assert two[what]["alike"]


@pytest.mark.slow
def test_only_the_process_that_ran_out_of_memory_makes_its_passes_smaller(two: Found) -> None:
    assert two["out of memory"]["halved"] == 1


@pytest.mark.slow
def test_scores_are_those_of_one_process(one: Found, two: Found) -> None:
    assert np.abs(np.array(two["scores"]["scores"]) - np.array(one["scores"]["scores"])).max() < 1e-5


@pytest.mark.slow
def test_an_error_elsewhere_is_told_where_the_run_is_led(two: Found) -> None:
    assert two["failing"]["told"] == "UserError: process 1 of 0 to 1: no luck here"
    assert two["failing"]["after"] == [2.0]


@pytest.mark.slow
def test_a_signal_to_one_process_is_known_to_the_leader_after_the_next_sum(two: Found) -> None:
    assert two["stop"] == [False, True]


@pytest.mark.slow
def test_who_has_left_leaves_no_threads(two: Found) -> None:
    """One that is there when the interpreter ends can end the process with SIGABRT."""
    assert two["threads left"] == []


def test_what_ends_the_leader_is_told_even_if_another_process_is_gone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(Ranks):
        def __init__(self, here: Place) -> None:
            super().__init__()

        def use(self, device: str) -> None: ...

        def leave(self) -> None:
            raise RunFailed("another process of this run is gone")

    monkeypatch.setattr("mathverify.engine.ranks.Joined", Left)
    monkeypatch.setattr("mathverify.engine.ranks.place", lambda: Place(0, 2, 0, 2))
    with pytest.raises(UserError, match="the disk is full"), leading(None, "cpu", lambda: False):
        raise UserError("the disk is full")
    with pytest.raises(RunFailed, match="is gone"), leading(None, "cpu", lambda: False):
        pass
