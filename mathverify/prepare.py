"""What the trials of a pack share, made ready once: rows, token stores, tokenizer, base. Nothing is trained here.

Everything stays warm in the process: the next pack on the same base, rows and prompt reads, tokenises, loads and
quantises nothing anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mathverify.base import load_base, load_tokenizer, model_path, resolve_device
from mathverify.config import DataConfig, LossKind, RunConfig
from mathverify.engine.budget import RESERVE, Lengths, adapter_bytes, device_memory, needs, plan_budget
from mathverify.engine.kernels import use_liger
from mathverify.engine.lora import targets
from mathverify.engine.model import PackedModel, adopt
from mathverify.engine.passes import TokenBudget
from mathverify.engine.ranks import place
from mathverify.errors import UserError
from mathverify.examples.report import DataReport, data_report, lengths
from mathverify.examples.schema import Splits
from mathverify.examples.sources import Loaded, cache_dir, load
from mathverify.progress import Progress, silent
from mathverify.tokens.doctor import examine
from mathverify.tokens.store import TokenStore, tokenize
from mathverify.tokens.verdicts import VerdictTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KEPT_ROWS = 2
"""How many data sets stay warm: a table of rows takes little memory, its token ids are mapped files."""

SHARE_FOR_ADAPTERS = 0.5
"""Most of a GPU's free memory that adapters and their optimizers may take; the rest is for activations."""


@dataclass(frozen=True)
class Workbench:
    """Everything that runs with the same model, quantization, prompt and data have in common.

    data_fingerprint: of the rows, prompt and tokenizer that training sees. segments: their tokens, verdicts included.
    at_once: how many of the runs it was prepared for fit beside each other. planned: those that the budget is planned
    for (see `plan_again`). base_scores: by split, what the bare base says; filled when first asked for.
    """

    model: PackedModel
    model_path: str
    tokenizer: PreTrainedTokenizerBase
    verdicts: VerdictTokens
    splits: Splits
    stores: Mapping[str, TokenStore]
    report: DataReport
    data_fingerprint: str
    budget: TokenBudget
    segments: Lengths
    at_once: int = 1
    planned: list[RunConfig] = field(default_factory=list)
    base_scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """A data set as one tokenizer and prompt see it. base_scores: of each base that was asked, by its config."""

    loaded: Loaded
    stores: Mapping[str, TokenStore]
    report: DataReport
    base_scores: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)


_warm: OrderedDict[str, _Rows] = OrderedDict()


def prepare(config: RunConfig, progress: Progress = silent, beside: Sequence[RunConfig] = ()) -> Workbench:
    """Read and check the rows, examine the tokenizer, tokenise, load the base, plan the token budget.

    The cheap checks come first: a bad tokenizer or data file is told before a large base is loaded.

    Args:
        beside: configs on the same base that are to train at the same time. What is wrong with one config alone (its
            targets, its loss with this tokenizer) is told when that run is opened.

    Raises:
        UserError: anything wrong with the data, the tokenizer or the model.
    """
    resolve_device(config.device)
    tokenizer = load_tokenizer(config.model)
    together = [config, *beside]
    diagnosis = examine(tokenizer, config.prompt, min((c.train.loss for c in together), key=list(LossKind).index))
    rows = _rows(config, tokenizer, progress)
    base = load_base(config)
    model = adopt(base)
    _refuse_small_vocabulary(model, tokenizer, diagnosis.verdicts, rows.stores, config)
    use_liger(model)
    possible = _possible(model, together)
    at_once = _at_once(model, possible)
    longest = 1 + max(int(store.lengths.max()) for store in rows.stores.values())  # with the verdict
    segments = Lengths.of(rows.stores["train"].lengths + 1, longest)
    plan = plan_budget(model, possible[:at_once], segments, place().size)
    return Workbench(
        model=model,
        model_path=model_path(config.model),
        tokenizer=tokenizer,
        verdicts=diagnosis.verdicts,
        splits=rows.loaded.splits,
        stores=rows.stores,
        report=rows.report,
        data_fingerprint=rows.stores["train"].fingerprint,
        budget=TokenBudget(plan.tokens, plan.held, plan.text),
        segments=segments,
        planned=possible[:at_once],
        at_once=at_once if at_once < len(possible) else len(together),
        base_scores=rows.base_scores.setdefault(repr((config.quantization, base.dtype, base.device)), {}),
    )


def plan_again(bench: Workbench, config: RunConfig) -> None:
    """Plan for a run that comes when the others have ended, if it is unlike those that it was planned for.

    Raises:
        UserError: the config's targets.
    """
    if needs(config) in map(needs, bench.planned):
        return
    plan = plan_budget(bench.model, [config], bench.segments, place().size)
    bench.budget.renew(plan.tokens, plan.held, plan.text)
    bench.planned[:] = [config]


def _refuse_small_vocabulary(
    model: PackedModel,
    tokenizer: PreTrainedTokenizerBase,
    verdicts: VerdictTokens,
    stores: Mapping[str, TokenStore],
    config: RunConfig,
) -> None:
    """A tokenizer may know tokens that the base has no row for, as long as the prompts have none of them."""
    embeddings: Any = model.base.model.get_input_embeddings()
    known = int(embeddings.weight.shape[0])
    if len(tokenizer) <= known:
        return
    largest = max(verdicts.true_id, verdicts.false_id, *(store.largest for store in stores.values()))
    if largest >= known:
        raise UserError(
            f"model.path = {model_path(config.model)}: the model's vocabulary has {known:,} tokens and its tokenizer "
            f"writes token {largest:,}: give the tokenizer files that belong to the weights"
        )


def _rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> _Rows:
    """Rows, token stores and report: from memory if this process has made them of the very same files."""
    key = repr((config.model, config.prompt, config.data, _marks(config.data)))
    if key not in _warm:
        loaded = load(config.data, progress)
        stores = {
            name: tokenize(rows, tokenizer, config.prompt, cache_dir(config.data), progress)
            for name, rows in loaded.splits.items()
        }
        tokens = {name: lengths(store.lengths, store.cut) for name, store in stores.items()}
        report = data_report(loaded.surveys, loaded.shared_questions, loaded.prepared, tokens)
        _warm[key] = _Rows(loaded, stores, report)
    _warm.move_to_end(key)
    while len(_warm) > KEPT_ROWS:
        _warm.popitem(last=False)
    return _warm[key]


def _marks(data: DataConfig) -> list[tuple[str, int, int]]:
    """Local files of a data set as they are now: path, time of change, bytes."""
    named = [Path(name).expanduser() for name in (data.path, data.train, data.validation, data.test) if name]
    files = [file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file()]


# Memory of several runs at once


def _possible(model: PackedModel, configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The configs whose targets the base has; all if none, so that planning says what is wrong."""

    def is_possible(config: RunConfig) -> bool:
        try:
            return bool(targets(model.host.shapes, config.lora))
        except UserError:
            return False

    return [config for config in configs if is_possible(config)] or list(configs)


def _at_once(model: PackedModel, configs: Sequence[RunConfig]) -> int:
    """How many of the configs, in their order, fit beside each other; at least one."""
    if model.device.type != "cuda":
        return len(configs)
    free, _ = device_memory(model)
    needed = np.cumsum([adapter_bytes(model, config) for config in configs])
    return max(1, int(np.searchsorted(needed, free * RESERVE * SHARE_FOR_ADAPTERS, side="right")))
