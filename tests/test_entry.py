"""The config tree: every choice composes, every mistake is one line that names key, value and what is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mathverify.config import Dtype, LossKind, OptimizerKind, QuantizationKind, ScheduleKind
from mathverify.entry import compose, config_dir
from mathverify.errors import UserError

CONF = Path(config_dir())
GROUPS = ["model", "lora", "quantization", "optimizer", "data", "prompt", "train", "evaluate", "tracking"]
GROUPS += ["experiment", "sweep"]
NEEDED = {"hf": ["model.path=some/model"], "table": ["data.train=rows.parquet"]}
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_file_of_every_group_composes(group: str, choice: str) -> None:
    compose([f"{group}={choice}", *NEEDED.get(choice, [])])


def test_every_group_has_a_folder_and_every_folder_is_a_group() -> None:
    assert {p.name for p in CONF.iterdir() if p.is_dir()} - {"hydra", "__pycache__"} == set(GROUPS)


@pytest.mark.parametrize(
    ("preset", "rank", "batch"), [("baseline_r16", 16, 2), ("higher_rank_r64", 64, 2), ("higher_batch_r64_b4", 64, 4)]
)
def test_the_presets_are_the_missions_rows(preset: str, rank: int, batch: int) -> None:
    config = compose([f"experiment={preset}"])
    assert (config.lora.rank, config.train.batch_size, config.train.grad_accumulation) == (rank, batch, 4)
    assert config.model.path == "meta-llama/Llama-3.1-8B"
    assert config.model.dtype is Dtype.auto
    assert (config.quantization.kind, config.quantization.double_quant) == (QuantizationKind.nf4, True)
    assert (config.optimizer.kind, config.optimizer.learning_rate) == (OptimizerKind.adamw_8bit, 2e-4)
    assert (config.optimizer.schedule, config.optimizer.warmup_steps) == (ScheduleKind.linear, 100)
    assert (config.train.max_steps, config.prompt.max_length) == (1500, 2048)
    assert config.data.path == "ad6398/nyu-dl-teach-maths-comp"
    assert config.train.loss is LossKind.label


def test_a_preset_gives_way_to_the_command_line() -> None:
    assert compose(["experiment=higher_rank_r64", "lora.rank=8", "model=tiny"]).lora.rank == 8


BAD = [
    (["lora.rnk=3"], ["lora.rnk", "rank, alpha"]),
    (["nosuch=3"], ["nosuch", "model, lora"]),
    (["+nosuch=3"], ["nosuch", "model, lora"]),
    (["lora=r99"], ["lora/r99", "r16"]),
    (["lora.rank=abc"], ["lora.rank", "abc", "Integer"]),
    (["lora.rank=0"], ["lora.rank = 0", ">= 1"]),
    (["lora.rank=-4"], ["lora.rank = -4", ">= 1"]),
    (["lora.alpha=nan"], ["lora.alpha = nan", "finite"]),
    (["lora.alpha=0"], ["lora.alpha = 0", "> 0"]),
    (["lora.dropout=1"], ["lora.dropout = 1", "[0, 1)"]),
    (["lora.target_modules=[]"], ["lora.target_modules", "at least one"]),
    (["lora.target_modules=[q_proj,q_proj]"], ["lora.target_modules", "different"]),
    (["quantization.kind=int3"], ["int3", "none, nf4, fp4, int8"]),
    (["optimizer.learning_rate=inf"], ["optimizer.learning_rate = inf", "finite"]),
    (["optimizer.learning_rate=-1"], ["optimizer.learning_rate = -1", "> 0"]),
    (["optimizer.schedule=step"], ["step", "linear, cosine, constant"]),
    (["optimizer.betas=[0.9]"], ["optimizer.betas", "two numbers"]),
    (["optimizer.warmup_steps=5000"], ["warmup_steps = 5000", "max_steps"]),
    (["train.batch_size=-1"], ["train.batch_size = -1", ">= 1"]),
    (["train.max_steps=0"], ["train.max_steps = 0", ">= 1"]),
    (["train.loss=mse"], ["mse", "label, sequence"]),
    (["prompt.max_length=2"], ["prompt.max_length = 2", ">= 8"]),
    (["data.validation_fraction=0.7"], ["data.validation_fraction = 0.7", "below 0.5"]),
    (["evaluate.confidence=1.5"], ["evaluate.confidence = 1.5", "[0.5, 1)"]),
    (["seed=-1"], ["seed = -1", "[0, 2147483648)"]),
    (["device=tpu"], ["device = 'tpu'", "cpu, cuda"]),
    (["model=hf"], ["model.path", "model=hf model.path="]),
    (["data=table"], ["data.train"]),
    (["lora.rank=[1"], ["[1"]),
]


@pytest.mark.parametrize(("overrides", "named"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_config_is_one_line_that_names_what_and_what_is_allowed(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    line = str(caught.value)
    assert "\n" not in line
    for part in named:
        assert part in line


def command(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root} | env
    return subprocess.run(
        [sys.executable, "-m", "mathverify.train", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.rank=0"],
        ["lora.rnk=3"],
        ["lora=r99"],
        ["train.max_steps=3", "train.max_examples=9"],
        ["+extra=1"],
        ["data=table", "data.train=nowhere.parquet"],
        ["model=hf", "model.path=./nowhere"],
        ["lora.target_modules=[nosuch]"],
        ["device=cuda:7"],
    ],
)
def test_bad_input_exits_2_without_traceback_or_folder(overrides: list[str], tmp_path: Path) -> None:
    done = command(*overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_is_shown_when_asked_for(tmp_path: Path) -> None:
    done = command("lora.rnk=3", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("flag", ["--help", "--cfg=job"])
def test_help_and_config_need_no_torch(flag: str, tmp_path: Path) -> None:
    """An import hook that refuses the heavy packages, so that a hidden import is seen."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'wandb', 'pyarrow', 'bitsandbytes', 'datasets'):\n"
        "            raise RuntimeError('imported ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    root = str(Path(__file__).parents[1])
    done = command(*flag.split("="), cwd=work, PYTHONPATH=f"{tmp_path}{os.pathsep}{root}")
    assert done.returncode == 0, done.stderr
    assert "rank: 64" in done.stdout
    assert list(work.iterdir()) == []


def test_a_folder_that_holds_another_run_keeps_its_hydra_files(tmp_path: Path) -> None:
    from mathverify.records import RunRecord, write_record

    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("theirs")
    write_record(folder, RunRecord.begin(compose(["lora=r4"])))
    done = command("lora=r64", f"hydra.run.dir={folder}", cwd=tmp_path)
    assert done.returncode == 2
    assert "already holds another run" in done.stderr
    assert (folder / ".hydra" / "config.yaml").read_text() == "theirs"


def test_an_interpolation_that_leads_nowhere_is_one_line_for_a_grid_too(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "mathverify.train", "-m", "model.name=${nosuch}"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr == "error: job 0 (model.name=${nosuch}): Interpolation key 'nosuch' not found\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", ["basic", "pack"])
@pytest.mark.parametrize(
    ("subdir", "said"), [("same", "jobs 0 and 1 would share the folder grid/same"), ("${seed}", "jobs 0 and 2")]
)
def test_jobs_of_a_grid_that_would_share_a_folder_are_refused_before_they_start(
    launcher: str, subdir: str, said: str, tmp_path: Path
) -> None:
    grid = ["-m", f"hydra/launcher={launcher}", "lora=r4,r16", "seed=1,2", "hydra.sweep.dir=grid"]
    done = command(*grid, f"hydra.sweep.subdir={subdir}", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: hydra.sweep.subdir: ")
    assert said in line
    assert not list(tmp_path.iterdir())
