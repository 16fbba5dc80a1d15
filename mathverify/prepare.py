"""What the trials of a pack share, made ready once: rows, token stores, tokenizer, base. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mathverify.base import load_base, load_tokenizer, model_path, resolve_device
from mathverify.config import RunConfig
from mathverify.engine.budget import plan_budget
from mathverify.engine.kernels import use_liger
from mathverify.engine.model import PackedModel, adopt
from mathverify.engine.passes import TokenBudget
from mathverify.errors import UserError
from mathverify.examples.report import DataReport, data_report, lengths
from mathverify.examples.schema import Splits
from mathverify.examples.sources import cache_dir, load
from mathverify.progress import Progress, silent
from mathverify.tokens.doctor import examine
from mathverify.tokens.store import TokenStore, tokenize
from mathverify.tokens.verdicts import VerdictTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Workbench:
    """Everything that runs with the same model, quantization, prompt and data have in common.

    data_fingerprint: of the rows, prompt and tokenizer that training sees.
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
    plan: str


def prepare(config: RunConfig, progress: Progress = silent) -> Workbench:
    """Read and check the rows, examine the tokenizer, tokenise, load the base, plan the token budget.

    The cheap checks come first: a bad tokenizer or data file is told before a large base is loaded.

    Raises:
        UserError: anything wrong with the data, the tokenizer or the model.
    """
    resolve_device(config.device)
    tokenizer = load_tokenizer(config.model)
    diagnosis = examine(tokenizer, config.prompt, config.train.loss)
    loaded = load(config.data, progress)
    stores = {
        name: tokenize(rows, tokenizer, config.prompt, cache_dir(config.data), progress)
        for name, rows in loaded.splits.items()
    }
    tokens = {name: lengths(store.lengths, store.cut) for name, store in stores.items()}
    report = data_report(loaded.surveys, loaded.shared_questions, loaded.prepared, tokens)
    model = adopt(load_base(config))
    _refuse_small_vocabulary(model, tokenizer, diagnosis.verdicts, stores, config)
    use_liger(model)
    longest = 1 + max(int(store.lengths.max()) for store in stores.values())  # with the verdict
    plan = plan_budget(model, config, longest)
    return Workbench(
        model=model,
        model_path=model_path(config.model),
        tokenizer=tokenizer,
        verdicts=diagnosis.verdicts,
        splits=loaded.splits,
        stores=stores,
        report=report,
        data_fingerprint=stores["train"].fingerprint,
        budget=TokenBudget(plan.tokens),
        plan=plan.text,
    )


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
