"""Bad input as a table: a name, how to make it, the command's arguments, and what its one line must name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mathverify import tiny
from tests.examples.files import make_rows, write
from tests.examples.test_table import BAD as BAD_FILES


@dataclass(frozen=True)
class Case:
    """says: parts of the one line: what is wrong, where, and the remedy; "re:" before a part makes it an expression.
    make: fills the folder of the command.

    earlier: arguments of a command that is run before, and ends well, in the same folder.
    """

    name: str
    arguments: Sequence[str]
    says: Sequence[str]
    make: Callable[[Path], object] = lambda place: None
    earlier: Sequence[str] | None = None


# Config

CONFIG = [
    Case("unknown key", ["lora.rnk=3"], ["lora.rnk is not a setting", "rank, alpha"]),
    Case("unknown part", ["lorra.rank=3"], ["lorra", "model, lora"]),
    Case("added key", ["+lora.rnk=3"], ["rnk", "rank, alpha"]),
    Case("unknown choice", ["lora=r99"], ["lora/r99", "r16"]),
    Case("unknown preset", ["experiment=nosuch"], ["experiment/nosuch", "baseline_r16"]),
    Case("unknown study", ["-m", "sweep=nosuch"], ["sweep/nosuch", "rank_grid"]),
    Case("a word for a number", ["lora.rank=many"], ["lora.rank", "many", "Integer"]),
    Case("a fraction for a count", ["train.max_steps=1.5"], ["train.max_steps", "1.5", "Integer"]),
    Case("a list for a number", ["lora.rank=[1,2]"], ["lora.rank", "[1, 2]"]),
    Case("a number for a list", ["lora.target_modules=3"], ["lora.target_modules", "3"]),
    Case("a value for a part", ["lora.rank=4", "optimizer=3"], ["Config group override must be a string", "--help"]),
    Case("null where there must be a value", ["lora.rank=null"], ["lora.rank", "not Optional"]),
    Case("unknown word of a choice", ["optimizer.schedule=step"], ["step", "linear, cosine, constant"]),
    Case("rank below 1", ["lora.rank=0"], ["lora.rank = 0", ">= 1"]),
    Case("rank beyond the base", ["lora.rank=100000"], ["lora.rank = 100000", "at most"]),
    Case("alpha not a number", ["lora.alpha=nan"], ["lora.alpha = nan", "finite"]),
    Case("dropout of all", ["lora.dropout=1"], ["lora.dropout = 1", "[0, 1)"]),
    Case("module that is not there", ["lora.target_modules=[nosuch]"], ["'nosuch'", "q_proj"]),
    Case("learning rate infinite", ["optimizer.learning_rate=inf"], ["optimizer.learning_rate = inf", "finite"]),
    Case("learning rate negative", ["optimizer.learning_rate=-1"], ["optimizer.learning_rate = -1", "> 0"]),
    Case("warm-up longer than the run", ["optimizer.warmup_steps=9"], ["optimizer.warmup_steps = 9", "train.max_steps"]),
    Case("batch of none", ["train.batch_size=0"], ["train.batch_size = 0", ">= 1"]),
    Case("batch beyond all memory", ["train.batch_size=99999999999999999999"], ["train.batch_size", "at most"]),
    Case("threads of none", ["train.threads=0"], ["train.threads = 0", ">= 1"]),
    Case("threads beyond the machine", ["train.threads=1000000"], ["train.threads = 1000000", "at most"]),
    Case("confidence of all", ["evaluate.confidence=1"], ["evaluate.confidence = 1", "[0.5, 1)"]),
    Case("seed too large", ["seed=99999999999"], ["seed = 99999999999", "[0, 2147483648)"]),
    Case("device that is none", ["device=tpu"], ["device = 'tpu'", "cpu, cuda"]),
    Case("device that is not here", ["device=cuda:97"], ["device = 'cuda:97'", "device=auto"]),
    Case("prompt too short for the rows", ["prompt.max_length=8"], ["prompt.max_length = 8", "use at least"]),
    Case("two lengths", ["train.max_steps=3", "train.max_examples=9"], ["train.max_steps and train.max_examples", "drop one"]),
    Case("override without a value", ["lora.rank"], ["lora.rank"]),
    Case("open bracket", ["lora.rank=[1"], ["[1"]),
    Case("interpolation to nothing", ["lora.rank=${nosuch}"], ["nosuch"]),
    Case("resolver that is none", ["lora.rank=${eval:1+1}"], ["eval"]),
    Case("online tracking without a key", ["tracking=wandb", "tracking.mode=online"], ["tracking.mode = 'online'", "wandb login"]),
    Case("run folder is a file", ["hydra.run.dir=taken"], ["taken", "is a file", "hydra.run.dir"], lambda p: _put(p / "taken")),
    Case("run folder below a file", ["hydra.run.dir=taken/run"], ["taken", "is a file", "hydra.run.dir"], lambda p: _put(p / "taken")),
    Case("run folder that cannot be made", ["hydra.run.dir=/proc/nosuch/run"], ["/proc/nosuch/run", "hydra.run.dir"]),
    Case("cache folder is a file", ["data.cache_dir=taken"], ["taken", "data.cache_dir"], lambda p: _put(p / "taken")),
    Case("hydra's own typo", ["hydra.run.dirr=x"], ["hydra.run.dirr"]),
    Case("hydra's own choice", ["hydra/launcher=nosuch"], ["hydra/launcher"]),
    Case("a flag that is none", ["--nosuch"], ["--nosuch"]),
    Case("a grid without end", ["-m", "seed=range(0,1000000000)"], ["seed=range", "more than 10,000 jobs", "hydra/sweeper=optuna"]),
    Case("a grid with a bad job", ["-m", "lora.rank=2,0"], ["job 1", "lora.rank = 0", ">= 1"]),
]  # fmt: skip


def _put(path: Path, text: str = "someone's\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# Data


def _table(*more: str, train: str = "rows.csv") -> list[str]:
    fractions = ["data.validation_fraction=0.2", "data.test_fraction=0.2"]
    limits = ["data.train_rows=null", "data.validation_rows=null", "data.test_rows=null"]
    return ["data=table", f"data.train={train}", *fractions, *limits, *more]


def _rows(place: Path, name: str = "rows.csv", **change: Any) -> None:
    write(place / name, [row | change for row in make_rows()])


def _file(name: str, content: Any) -> Callable[[Path], None]:
    """A maker of one entry of the reader's own table: bytes, rows, or a function that writes the file."""

    def make(place: Path) -> None:
        path = place / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif callable(content):
            content(path)
        else:
            write(path, content)

    return make


def _unlabelled_test(place: Path) -> None:
    _rows(place)
    _put(place / "test.csv", "question,answer\nq,1\n")


SEMICOLONS = "question;answer;is_correct\n" + "".join(f"what is {i}?;{i};{i % 2 == 0}\n" for i in range(60))
TABS = SEMICOLONS.replace(";", "\t")

DATA = [
    *(
        Case(f"file: {name}", _table(train=file), [f"re:{says}", file, "data.train"], _file(file, content))
        for name, (file, content, says) in BAD_FILES.items()
    ),
    Case("no such file", _table(), ["'rows.csv'", "no such file", ".parquet"]),
    Case("a folder for a file", _table(), ["rows.csv", "is not a file"], lambda p: (p / "rows.csv").mkdir()),
    Case("csv with semicolons", _table(), ["rows.csv", "semicolons", "commas"], lambda p: _put(p / "rows.csv", SEMICOLONS)),
    Case("csv with tabs", _table(), ["rows.csv", "tabs", "commas"], lambda p: _put(p / "rows.csv", TABS)),
    Case("csv that begins with a quote left open", _table(), ["rows.csv", "quotes"], lambda p: _put(p / "rows.csv", '"question,answer\n')),
    Case("labels in words", _table(), ["is_correct", "'yes'", "data.map_labels=true"], lambda p: _rows(p, is_correct="yes")),
    Case("labels that no mapping knows", _table("data.map_labels=true"), ["is_correct", "'right'", "yes/no"], lambda p: _rows(p, is_correct="right")),
    Case("a group column that is not there", _table("data.group_column=topic"), ["'topic'", "data.group_column", "'question'"], _rows),
    Case("a slice column that is not there", _table("data.slice_column=kind"), ["'kind'", "data.slice_column", "'question'"], _rows),
    Case("a rename to nothing", _table("data.columns.answer=reply"), ["'reply'", "data.columns.answer"], _rows),
    Case("one question only", _table(), ["1 question(s)", "data.test="], lambda p: _rows(p, question="what is 1 + 1?")),
    Case("two rows", _table(), ["1 question(s)", "data.test="], lambda p: write(p / "rows.csv", make_rows(1, 2))),
    Case("test rows without labels", _table("data.test=test.csv"), ["data.test", "test.csv", "is_correct"], _unlabelled_test),
    Case("more validation than half", ["data.validation_fraction=0.7"], ["data.validation_fraction = 0.7", "below 0.5"]),
    Case("no train file", ["data=table"], ["data.train"]),
    Case("too few generated rows", ["data.train_rows=1"], ["data.train", "data.train_rows"]),
    Case("too many generated rows", ["data.train_rows=2000000"], ["data.train_rows", "1,000,000"]),
    Case("a hub folder that is not there", ["data=nyu_maths", "data.path=./nowhere"], ["./nowhere", "no such folder"]),
    Case("a hub folder without rows", ["data=nyu_maths", "data.path=./empty"], ["./empty", "cannot be read"], lambda p: (p / "empty").mkdir()),
    Case("control characters in a name", _table(train="'rows\x1b[31m.csv'"), ["\\x1b", "no such file"]),
]  # fmt: skip


# Models


def make_base(place: Path, leave_out: Sequence[str] = (), **config: Any) -> Path:
    """A copy of the embedded base in `my-model`, with changes to its config.json."""
    folder = place / "my-model"
    shutil.copytree(tiny.path(), folder, ignore=shutil.ignore_patterns(*leave_out, "__pycache__"))
    file = folder / "config.json"
    if file.exists():
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def _pickled(place: Path) -> None:
    import torch

    folder = make_base(place, ["*.safetensors"])
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


def _torn(place: Path) -> None:
    weights = make_base(place) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])


def _foreign_weights(place: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"something.else": zeros(2)}, make_base(place) / "model.safetensors", {"format": "pt"})


def _not_finite(place: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = make_base(place) / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "q_proj" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})


def _gpt2(place: Path) -> None:
    """Built of Conv1D instead of nn.Linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = make_base(place, ["*.safetensors", "config.json", "generation_config.json"])
    vocabulary = json.loads((Path(tiny.path()) / "config.json").read_text())["vocab_size"]
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)


def _small_vocabulary(place: Path) -> None:
    """The weights know fewer tokens than the tokenizer writes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = make_base(place, ["*.safetensors"])
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = 40
    LlamaForCausalLM(config).save_pretrained(folder)


def _adapter_only(place: Path) -> None:
    folder = place / "my-model"
    folder.mkdir()
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | {"base_model_name_or_path": str(tiny.path())}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny.path()) / name, folder / name)


def _remote_code(place: Path) -> None:
    """A config that asks for Python code of its own."""
    folder = make_base(
        place, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="evil"
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")


MY_MODEL = ["model=hf", "model.path=./my-model"]
MODELS = [
    Case("no path", ["model=hf"], ["model.path", "model=hf model.path="]),
    Case("no such folder", MY_MODEL, ["model.path = ./my-model", "no such folder", "config.json"]),
    Case("an empty folder", MY_MODEL, ["./my-model", "config.json"], lambda p: (p / "my-model").mkdir()),
    Case("no weights", MY_MODEL, ["./my-model", "no *.safetensors"], lambda p: make_base(p, ["*.safetensors"])),
    Case("weights in pickle form only", MY_MODEL, ["./my-model", "pickle", "save_pretrained"], _pickled),
    Case("no tokenizer", MY_MODEL, ["./my-model", "tokenizer.json"], lambda p: make_base(p, ["tokenizer*"])),
    Case("half a weights file", MY_MODEL, ["./my-model", "cannot be read", "*.safetensors again"], _torn),
    Case("weights of something else", MY_MODEL, ["./my-model", "weights"], _foreign_weights),
    Case("weights with NaN", MY_MODEL, ["./my-model", "finite", "q_proj"], _not_finite),
    Case("config that is not JSON", MY_MODEL, ["./my-model", "config.json"], lambda p: _put(make_base(p) / "config.json", "{")),
    Case("a kind nobody knows", MY_MODEL, ["./my-model", "nosuch"], lambda p: make_base(p, model_type="nosuch", architectures=["NoSuch"])),
    Case("no nn.Linear in it", MY_MODEL, ["nn.Linear", "Llama"], _gpt2),
    Case("a tokenizer with more tokens than the model", MY_MODEL, ["./my-model", "vocabulary", "tokenizer"], _small_vocabulary),
    Case("an adapter for a base", MY_MODEL, ["./my-model", "adapter", "base"], _adapter_only),
    Case("code of its own", MY_MODEL, ["./my-model"], _remote_code),
    Case("sizes that contradict the weights", MY_MODEL, ["./my-model", "size"], lambda p: make_base(p, intermediate_size=128)),
    Case("a file for a folder", MY_MODEL, ["./my-model"], lambda p: _put(p / "my-model")),
]  # fmt: skip


# Studies

STUDY = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.study_name=s", "hydra.sweeper.sampler.seed=1"]
STUDY += ["hydra.sweeper.n_trials=1", "hydra.sweeper.stop_after_same_failures=1"]
RANK = "lora.rank=choice(2,4)"
OF_BEFORE = [*STUDY, RANK, "train.max_steps=2"]
STUDIES = [
    Case("another space", [*STUDY, "lora.rank=choice(2,8)", "train.max_steps=2"], ["study s", "lora.rank", "{2, 4}", "{2, 8}", "study_name"], earlier=OF_BEFORE),
    Case("another direction", [*OF_BEFORE, "hydra.sweeper.direction=minimize"], ["study s", "maximize", "minimize", "study_name"], earlier=OF_BEFORE),
    Case("another objective", [*OF_BEFORE, "hydra.sweeper.direction=maximize", "hydra.sweeper.objective=metrics.test.auroc"], ["study s", "objective", "metrics.test.auroc"], earlier=OF_BEFORE),
    Case("another base config", [*OF_BEFORE, "seed=7"], ["study s", "seed", "7", "study_name"], earlier=OF_BEFORE),
    Case("no trials", [*STUDY, RANK, "hydra.sweeper.n_trials=0"], ["hydra.sweeper.n_trials = 0", ">= 1"]),
    Case("a direction that is none", [*STUDY, RANK, "hydra.sweeper.direction=up"], ["hydra.sweeper.direction", "'up'", "minimize, maximize"]),
    Case("a sampler that is none", [*STUDY, RANK, "hydra/sweeper/sampler=nosuch"], ["sampler/nosuch", "tpe"]),
    Case("a sampler by a wrong target", [*STUDY, RANK, "hydra.sweeper.sampler._target_=optuna.samplers.NoSuch"], ["hydra.sweeper.sampler._target_", "NoSuch"]),
    Case("a grid without values", [*STUDY, "lora.alpha=interval(1,2)", "hydra/sweeper/sampler=grid"], ["lora.alpha is continuous", "choice"]),
    Case("a point that cannot run", [*STUDY, "lora.rank=choice(2,0)"], ["lora.rank=0", ">= 1"]),
    Case("an interval upside down", [*STUDY, "lora.alpha=interval(2,1)"], ["lora.alpha", "interval"]),
    Case("a range in logarithms through zero", [*STUDY, "lora.alpha=tag(log,interval(0,1))"], ["lora.alpha", "log"]),
    Case("a database that is not there", [*STUDY, RANK, "hydra.sweeper.storage=sqlite:////proc/nosuch/s.db"], ["hydra.sweeper.storage", "/proc/nosuch/s.db"]),
    Case("a storage of no known kind", [*STUDY, RANK, "hydra.sweeper.storage=nosuch://x"], ["hydra.sweeper.storage", "nosuch://x"]),
    Case("a password in a storage that is not there", [*STUDY, RANK, "hydra.sweeper.storage='postgresql://ann:open-sesame@127.0.0.1:1/s'"], ["hydra.sweeper.storage", "postgresql://ann:[redacted]@"]),
    Case("a journal that is a folder", [*STUDY, RANK], ["study.journal", "folder"], lambda p: (p / "multirun/s/study.journal").mkdir(parents=True)),
    Case("a journal that is none", [*STUDY, RANK], ["study.journal"], lambda p: _put(p / "multirun/s/study.journal")),
    Case("a study folder that is a file", [*STUDY, RANK], ["multirun/s"], lambda p: _put(p / "multirun/s")),
    Case("a pruner for several objectives", [*STUDY, RANK, "hydra.sweeper.direction=[maximize,minimize]", "hydra/sweeper/pruner=median"], ["hydra/sweeper/pruner", "pruner=none"]),
    Case("a failure rate beyond one", [*STUDY, RANK, "hydra.sweeper.max_failure_rate=2"], ["hydra.sweeper.max_failure_rate = 2", "[0, 1]"]),
    Case("two ways to write a space", [*STUDY, "+hydra.sweeper.params.seed='choice(1,2)'", "hydra.sweeper.search_space={x:{type:int,low:1,high:2}}"], ["params and hydra.sweeper.search_space", "keep params"]),
]  # fmt: skip

# A run folder that is not this run's
FOLDERS = [
    Case("another run's folder", ["hydra.run.dir=run", "lora.rank=4"], ["run", "lora.rank is 2 there, 4 here", "hydra.run.dir"], earlier=["hydra.run.dir=run", "lora.rank=2", "train.max_steps=2"]),
    Case("files of someone else", ["hydra.run.dir=run"], ["predictions.parquet", "not known whose"], lambda p: _put(p / "run/predictions.parquet")),
    Case("a torn result", ["hydra.run.dir=run"], ["result.json", "torn"], lambda p: _put(p / "run/result.json", "{")),
    Case("another program's result", ["hydra.run.dir=run"], ["result.json", "not a run record"], lambda p: _put(p / "run/result.json", "{}")),
    Case("a newer version's result", ["hydra.run.dir=run"], ["result.json", "schema 99", "update"], lambda p: _put(p / "run/result.json", '{"schema_version": 99}')),
]  # fmt: skip

TABLE = {"config": CONFIG, "data": DATA, "models": MODELS, "studies": STUDIES, "folders": FOLDERS}
CASES = [replace(case, name=f"{kind}: {case.name}") for kind, cases in TABLE.items() for case in cases]
