"""Every command of the README is run: as written, with overrides that make it small added where the command is a run."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.csv import write_csv

from mathverify.records import Status, read_record
from tests.compare.conftest import config_of, make_run

from .conftest import SMALL

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
RUNS = [c for c in COMMANDS if c.startswith("python -m mathverify.train")]
MAKE = [c for c in COMMANDS if c.startswith("make ")]
MODULES = [c for c in COMMANDS if c.startswith("python -m mathverify.") and c not in RUNS]
ELSEWHERE = [c for c in COMMANDS if c not in RUNS + MAKE + MODULES]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what the README's commands refer to: my-model, train.parquet and replies.csv."""
    from mathverify import tiny
    from mathverify.examples.arithmetic import generate

    shutil.copytree(tiny.path(), tmp_path / "my-model")
    rows: pa.Table = generate(900, 32, 32, 0).train.select(["question", "answer", "solution", "is_correct"])
    pq.write_table(rows, tmp_path / "train.parquet")
    write_csv(rows.rename_columns(["question", "reply", "solution", "is_correct"]), tmp_path / "replies.csv")
    return tmp_path


@pytest.fixture
def place_with_runs(place: Path) -> Path:
    """The same with finished runs and a sweep, which commands that look at runs refer to."""
    for number in range(4):
        config = config_of(rank=(16, 64)[number // 2], seed=number % 2)
        make_run(place / "multirun" / "rank_grid" / str(number), config)
        make_run(place / "outputs" / "2026-11-23" / f"1{number}-00-00", config)
    return place


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    subprocess.run(["bash", "-n", "-c", command], check=True)  # it can be pasted as it is
    words = [sys.executable, *shlex.split(command)[1:]]
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=400)


def made_small(command: str, place: Path) -> str:
    """The command with small sizes for every setting that it does not choose itself."""
    chosen = {word.partition("=")[0] for word in shlex.split(command)}
    extra = [
        s for s in SMALL if s.partition("=")[0] not in chosen and not (s == "model=tiny" and "model.path" in chosen)
    ]
    if "train.max_examples" in chosen:
        extra = [s for s in extra if not s.startswith("train.max_")] + ["train.max_examples=64"]
    if "data" in chosen:
        extra = [s for s in extra if s != "data=arithmetic"]
    if "sweep" in command:
        extra.append("hydra.sweeper.n_trials=2")
    return " ".join([command, *extra, f"data.cache_dir='{place}/cache'"])


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_every_run_of_the_readme_runs(command: str, place: Path) -> None:
    as_is = any(flag in command for flag in ("--help", "--cfg", "dry_run"))
    done = run(command if as_is else made_small(command, place), place)
    assert done.returncode == 0, done.stderr[-3000:]
    if not as_is:
        statuses = [read_record(path.parent).status for path in place.rglob("result.json")]
        grid = [word.count(",") + 1 for word in shlex.split(command) if " -m " in command and "," in word]
        runs = 2 if "sweep" in command else math.prod(grid)
        assert statuses == [Status.completed] * runs


@pytest.mark.slow
@pytest.mark.parametrize("command", MODULES)
def test_every_other_command_of_the_package_runs(command: str, place_with_runs: Path) -> None:
    done = run(command, place_with_runs)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("command", MAKE)
def test_every_make_target_of_the_readme_exists(command: str) -> None:
    """`make run` and `make test` themselves are what continuous integration does; here only their names are checked."""
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_is_nothing_else() -> None:
    """Commands of other programs are few and named here, so that an untested one cannot slip in."""
    allowed = ("hf auth login", "wandb sync", "wandb leet", "pip install", "wandb login", "git clone", "cd ")
    assert RUNS
    assert MAKE
    assert [c for c in ELSEWHERE if not c.startswith(allowed)] == []
