"""RunConfig and its parts: what one run is made of, checked when made. Imports no torch and knows no Hydra.

Hydra composes a DictConfig against these dataclasses (conf/ holds the choices); `RunConfig` is made from it once,
at the entry, and nothing below ever sees a DictConfig.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from mathverify.errors import UserError


class Dtype(Enum):
    """Number format of the frozen base and of the passes; `auto`: bf16 or fp16 by what the GPU has, float32 on CPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class QuantizationKind(Enum):
    """How the frozen base's linear weights are stored; fp8 also multiplies in 8 bits (Hopper or newer)."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    fp8 = "fp8"


class OptimizerKind(Enum):
    """AdamW in full precision, with 8-bit state, or with 8-bit state paged to host memory."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"


class ScheduleKind(Enum):
    """Shape of the learning rate after warm-up: down to zero linearly, down to zero as a cosine, or constant."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class LossKind(Enum):
    """label: two-way cross-entropy at the verdict position. sequence: next-token cross-entropy of every position."""

    label = "label"
    sequence = "sequence"


class DataSource(Enum):
    """Where rows come from."""

    arithmetic = "arithmetic"
    table = "table"
    hub = "hub"


class NullAnswers(Enum):
    """What to do with rows whose answer is null: drop them (counted and named) or refuse to run."""

    drop = "drop"
    refuse = "refuse"


class EvaluateMethod(Enum):
    """score: one forward pass per example, log-odds of True. generate: write text and look for True or False in it."""

    score = "score"
    generate = "generate"


class TrackingKind(Enum):
    """Where metrics go besides the run folder."""

    wandb = "wandb"
    none = "none"


class TrackingMode(Enum):
    """auto: online if a W&B key is configured, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"


class MemoryMode(Enum):
    """auto: fastest passes that fit. lean: recompute activations in the backward pass and keep passes small."""

    auto = "auto"
    lean = "lean"


@dataclass
class ModelConfig:
    """The frozen base: a transformers causal LM by hub name or local folder. `tiny` is the embedded one."""

    name: str = "tiny"
    path: str | None = None
    revision: str | None = None
    dtype: Dtype = Dtype.auto

    def __post_init__(self) -> None:
        _require(bool(self.name.strip()), "model.name", self.name, "a non-empty name")
        if self.name != "tiny":
            _require(
                bool(self.path and self.path.strip()),
                "model.path",
                self.path,
                "a hub name such as meta-llama/Llama-3.1-8B or a local folder (model=hf model.path=...)",
            )


@dataclass
class LoraConfig:
    """Low-rank adapters on the base's linears: y = W x + scale * B A dropout(x) (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = 64
    alpha: float = 64.0
    dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    rslora: bool = False

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", self.rank, "a whole number >= 1")
        _require(math.isfinite(self.alpha) and self.alpha > 0, "lora.alpha", self.alpha, "a finite number > 0")
        _require(0.0 <= self.dropout < 1.0, "lora.dropout", self.dropout, "a number in [0, 1)")
        _require(
            bool(self.target_modules) and all(m.strip() for m in self.target_modules),
            "lora.target_modules",
            self.target_modules,
            "at least one module name, e.g. [q_proj,v_proj]",
        )
        _require(
            len(set(self.target_modules)) == len(self.target_modules),
            "lora.target_modules",
            self.target_modules,
            "names that are all different",
        )

    @property
    def scale(self) -> float:
        """Factor on B A x: alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass
class QuantizationConfig:
    """Storage of the frozen base: bitsandbytes', or FP8 (engine/fp8.py). `double_quant` also quantises the scales of
    4-bit blocks."""

    kind: QuantizationKind = QuantizationKind.none
    double_quant: bool = True


@dataclass
class OptimizerConfig:
    """AdamW and the learning-rate schedule. Units: learning_rate per step, warmup_steps in optimizer steps."""

    kind: OptimizerKind = OptimizerKind.adamw
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    schedule: ScheduleKind = ScheduleKind.linear
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        lr, decay = self.learning_rate, self.weight_decay
        _require(math.isfinite(lr) and lr > 0, "optimizer.learning_rate", lr, "a finite number > 0")
        _require(math.isfinite(decay) and decay >= 0, "optimizer.weight_decay", decay, "a finite number >= 0")
        _require(
            len(self.betas) == 2 and all(0.0 <= b < 1.0 for b in self.betas),
            "optimizer.betas",
            self.betas,
            "two numbers in [0, 1), e.g. [0.9,0.999]",
        )
        _require(math.isfinite(self.eps) and self.eps > 0, "optimizer.eps", self.eps, "a finite number > 0")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "a whole number >= 0")
        norm = self.max_grad_norm
        _require(
            norm is None or (math.isfinite(norm) and norm > 0),
            "optimizer.max_grad_norm",
            norm,
            "a finite number > 0, or null for no clipping",
        )


@dataclass
class ColumnsConfig:
    """What a file calls our columns, where it is not our name; an empty name says that it has no such column."""

    question: str | None = None
    answer: str | None = None
    solution: str | None = None
    is_correct: str | None = None
    id: str | None = None


@dataclass
class DataConfig:
    """Which rows, and how they are split. Fractions and row limits apply to whole questions, never to part of one.

    train, validation, test: paths (table) or split names (hub, where train is "train" unless given). A split that is
    null is taken from train by question, *_fraction of train's rows, or *_rows of them if given; so test=null is how
    to get a labelled test set where the hub's own has placeholder labels. *_rows also limit splits that are given
    (arithmetic: how many to generate). Rows of train whose question is in a given validation or test are dropped and
    counted.
    """

    source: DataSource = DataSource.arithmetic
    path: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    revision: str | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    validation_fraction: float = 0.02
    test_fraction: float = 0.02
    seed: int = 0
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    group_column: str | None = None
    slice_column: str | None = None
    map_labels: bool = False
    null_answers: NullAnswers = NullAnswers.drop
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("train_rows", "validation_rows", "test_rows"):
            rows = getattr(self, name)
            _require(rows is None or rows >= 1, f"data.{name}", rows, "a whole number >= 1, or null for all")
        for name in ("validation_fraction", "test_fraction"):
            part = getattr(self, name)
            _require(0.0 < part < 0.5, f"data.{name}", part, "a number above 0 and below 0.5")
        if self.source is DataSource.table:
            _require(bool(self.train), "data.train", self.train, "a path to a parquet, jsonl or csv file")
        if self.source is DataSource.hub:
            _require(bool(self.path), "data.path", self.path, "a data set name on the hub, or a local folder of one")
        if self.source is DataSource.arithmetic:
            for name in ("train_rows", "validation_rows", "test_rows"):
                rows = getattr(self, name)
                _require(rows is None or rows <= 10**6, f"data.{name}", rows, "at most 1,000,000 generated rows")

    @property
    def renamed(self) -> dict[str, str]:
        """{our column: the file's} for those that are renamed."""
        return {f.name: name for f in fields(self.columns) if (name := getattr(self.columns, f.name)) is not None}


@dataclass
class PromptConfig:
    """How an example becomes text, and how long it may be. `max_length` counts tokens, verdict included."""

    with_solution: bool = False
    max_length: int = 2048

    def __post_init__(self) -> None:
        _require(self.max_length >= 8, "prompt.max_length", self.max_length, "a whole number >= 8")


MOST = 10**9
"""Largest count of anything: what is larger is a slip of the finger, and would overflow somewhere below."""

MOST_THREADS = 1024


@dataclass
class TrainConfig:
    """How much and in what pieces. batch_size x grad_accumulation = examples of one optimizer step.

    max_examples, when given, decides the length instead of max_steps (rounded up to whole steps), so that runs with
    different batch sizes can see the same number of examples. eval_every and checkpoint_every count steps (null:
    only at the end). token_budget: most tokens of one pass (null: planned from free memory).
    """

    batch_size: int = 4
    grad_accumulation: int = 4
    max_steps: int = 1500
    max_examples: int | None = None
    loss: LossKind = LossKind.label
    eval_every: int | None = None
    checkpoint_every: int | None = None
    token_budget: int | None = None
    memory: MemoryMode = MemoryMode.auto
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accumulation", "max_steps"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}", value, "a whole number >= 1")
            _require(value <= MOST, f"train.{name}", value, f"at most {MOST:,}")
        for name in ("max_examples", "eval_every", "checkpoint_every", "token_budget", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name}", value, "a whole number >= 1, or null")
            _require(value is None or value <= MOST, f"train.{name}", value, f"at most {MOST:,}")
        # torch dies without a word when it is given more threads than the system has for it.
        _require(self.threads is None or self.threads <= MOST_THREADS, "train.threads", self.threads, "at most 1,024")

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.grad_accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: max_steps, or as many as max_examples needs."""
        if self.max_examples is None:
            return self.max_steps
        return math.ceil(self.max_examples / self.examples_per_step)


@dataclass
class EvaluateConfig:
    """How adapters are judged. Intervals are at `confidence`; the bootstrap draws `resamples` times over questions."""

    method: EvaluateMethod = EvaluateMethod.score
    zero_shot: bool = True
    confidence: float = 0.95
    resamples: int = 2000
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        _require(0.5 <= self.confidence < 1.0, "evaluate.confidence", self.confidence, "a number in [0.5, 1)")
        _require(self.resamples >= 100, "evaluate.resamples", self.resamples, "a whole number >= 100")
        _require(self.max_new_tokens >= 1, "evaluate.max_new_tokens", self.max_new_tokens, "a whole number >= 1")


@dataclass
class TrackingConfig:
    """Weights & Biases. `name` defaults to what distinguishes the run, such as r64-a64-b4.

    A sweep sets group (the study's name), trial (its number there) and sampler itself.
    """

    kind: TrackingKind = TrackingKind.wandb
    mode: TrackingMode = TrackingMode.auto
    project: str = "mathverify"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    log_adapter: bool = False
    table_rows: int = 1000
    trial: int | None = None
    sampler: str | None = None

    def __post_init__(self) -> None:
        _require(bool(self.project.strip()), "tracking.project", self.project, "a non-empty name")
        _require(self.table_rows >= 0, "tracking.table_rows", self.table_rows, "a whole number >= 0")


@dataclass
class RunConfig:
    """Everything one run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**31, "seed", self.seed, "a whole number in [0, 2147483648)")
        _require(
            self.device in ("auto", "cpu", "cuda") or re.fullmatch(r"cuda:\d+", self.device) is not None,
            "device",
            self.device,
            "auto, cpu, cuda or cuda:N",
        )
        if self.optimizer.schedule is not ScheduleKind.constant and self.optimizer.warmup_steps >= self.train.steps:
            raise UserError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves nothing of the run's "
                f"{self.train.steps} steps: use fewer warm-up steps or more train.max_steps"
            )

    @property
    def name(self) -> str:
        """What distinguishes the run at a glance: rank, alpha and micro-batch, e.g. 'r64-a64-b4'."""
        return self.tracking.name or f"r{self.lora.rank}-a{self.lora.alpha:g}-b{self.train.batch_size}"


def to_plain(config: Any) -> Any:
    """A config (or any part of one) as JSON-ready dicts, lists and scalars; enums by their value."""
    return _plain(asdict(config)) if is_dataclass(config) and not isinstance(config, type) else _plain(config)


def _plain(value: Any) -> Any:
    match value:
        case Enum():
            return value.value
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def from_plain(plain: dict[str, Any]) -> RunConfig:
    """The inverse of `to_plain` for a whole RunConfig; raises UserError on unknown keys."""
    config: RunConfig = _build(RunConfig, plain, "")
    return config


def _build(cls: type, plain: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(cls)}
    for key in plain:
        _require(key in known, f"{where}{key}", plain[key], f"a key among {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, value in plain.items():
        factory = known[name].default_factory
        default = factory() if callable(factory) else known[name].default
        if is_dataclass(default):
            values[name] = _build(type(default), value, f"{where}{name}.")
        elif isinstance(default, Enum):
            values[name] = type(default)(value)
        else:
            values[name] = value
    return cls(**values)


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise the one-line error of a bad setting: which key, what it was, what it may be."""
    if not ok:
        raise UserError(f"{key} = {value!r} is not possible: use {allowed}")
