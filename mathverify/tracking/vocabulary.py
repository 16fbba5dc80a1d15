"""What W&B is told things are called, so that its tables and panels work without clicks. Plain data; imports no wandb.

Config keys are flat and numbers stay numbers, for parallel coordinates and importance; each setting is there once: a
copy would share its importance. Validation is what selects: `final_validation/accuracy` is what a study compares, and
`test/*` is only reported.
"""

from __future__ import annotations

from typing import Any

from mathverify.config import RunConfig, to_plain
from mathverify.records import RunRecord, Status, redact

STEP = "train/step"
SELECTED_BY = "final_validation/accuracy"
REPORTED = "test/accuracy"
RUN_JOB, SWEEP_JOB = "train", "sweep"

# (name or pattern, summary): what W&B keeps of a metric's history as one number. `last` keeps the plain one beside.
DEFINITIONS = (
    ("train/*", None),
    ("validation/*", None),
    ("train/loss", "min,last"),
    ("train/tokens_per_second", "mean,last"),
    ("validation/accuracy", "max,last"),
    ("validation/balanced_accuracy", "max,last"),
    ("validation/auroc", "max,last"),
    ("validation/f1", "max,last"),
    ("validation/brier", "min,last"),
    ("validation/ece", "min,last"),
)

_OWN_NAME = ("lora", "optimizer", "prompt", "train")
"""Parts whose settings go by their own name: rank, learning_rate, batch_size; of others data_source, model_path, ..."""
_LEFT_OUT = {"tracking", "device", "data_cache_dir", "max_steps"}


def flat_name(key: str) -> str:
    """The flat name of a setting or part as a command line spells it: lora.rank -> rank, data.seed -> data_seed."""
    part, _, rest = key.lstrip("+~").partition("@")[0].replace("/", ".").partition(".")
    if rest in ("", "kind"):
        return part
    return rest.replace(".", "_") if part in _OWN_NAME else f"{part}_{rest.replace('.', '_')}"


def flat_config(config: RunConfig) -> dict[str, Any]:
    """The settings by flat names without dots: numbers, flags and text; lists as text, what is null left out.

    Beside the settings: `scale` (of B A x), `examples_per_step`, `steps` (planned, instead of max_steps, which
    max_examples may overrule), and of a study's run `study`, `trial` (its number) and `sampler`.
    """
    leaves = _leaves({part: settings for part, settings in to_plain(config).items() if part not in _LEFT_OUT})
    flat = {flat_name(key): value for key, value in leaves.items()}
    flat |= {
        "scale": config.lora.scale,
        "examples_per_step": config.train.examples_per_step,
        "steps": config.train.steps,
    }
    if config.tracking.trial is not None:
        tracking = config.tracking
        flat |= {"study": tracking.group, "trial": tracking.trial, "sampler": tracking.sampler}
    kept: dict[str, Any] = redact({k: v for k, v in flat.items() if k not in _LEFT_OUT and v is not None})
    return kept


def _leaves(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Every setting by its dotted path; a list as text."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        match value:
            case dict():
                found |= _leaves(value, f"{above}{key}.")
            case list():
                found[f"{above}{key}"] = ",".join(map(str, value))
            case _:
                found[f"{above}{key}"] = value
    return found


def run_name(config: RunConfig) -> str:
    """'r64-a64-b4', of a study's run with its trial's number: 'r64-a64-b4 #3'."""
    trial = config.tracking.trial
    return str(redact(config.name if trial is None else f"{config.name} #{trial}"))


def run_tags(config: RunConfig) -> tuple[str, ...]:
    """The user's tags; how the run ended is added when it does."""
    return tuple(str(redact(tag)) for tag in config.tracking.tags)


def final_numbers(record: RunRecord) -> dict[str, float | str]:
    """A run's last words: every metric with its interval, the costs, and why it ended early.

    Only a completed run has `final_validation/*`: what a pruned one had at its last validation does not compare. Slices
    are there by their accuracy; result.json has the rest of them.
    """
    metrics, costs = record.metrics, record.costs
    flat: dict[str, float | str] = {}
    for prefix, part in (
        ("test", metrics.test),
        ("test_tuned", metrics.tuned),
        ("zero_shot", metrics.zero_shot),
        ("final_validation", metrics.validation if record.status is Status.completed else None),
    ):
        if part is not None:
            flat |= part.flat(prefix)
    for name, part in metrics.slices.items():
        flat |= {key: value for key, value in part.flat(f"test_slice/{name}").items() if "/accuracy" in key}
    flat |= {f"seconds/{phase}": seconds for phase, seconds in costs.seconds.items()}
    others = {
        "seconds/all": round(sum(costs.seconds.values()), 3) if costs.seconds else None,
        "threshold": metrics.threshold,
        "tokens": costs.tokens,
        "tokens_per_second": costs.tokens_per_second,
        "peak_memory_bytes": costs.peak_memory_bytes,
        "optimizer_steps": costs.optimizer_steps,
        "examples_seen": costs.examples_seen,
        "trainable_parameters": costs.trainable_parameters,
        "reason": record.reason,
    }
    return flat | {name: value for name, value in others.items() if value is not None}
