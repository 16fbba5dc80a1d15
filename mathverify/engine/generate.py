"""The mission's way to a verdict, for comparison: write text greedily and look for True or False at its end.

Slow: one forward pass a written token where scoring needs one in all, and no probability comes of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mathverify.engine.attention import ATTENTION
from mathverify.engine.lora import Adapter
from mathverify.engine.model import PackedModel
from mathverify.engine.passes import TokenBudget, cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mathverify.tokens.store import TokenStore

UNPARSED = -1
_VERDICT_AT_END = re.compile(r"(True|False)\W*$")


def generate_verdicts(
    model: PackedModel,
    adapter: Adapter | None,
    store: TokenStore,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    budget: TokenBudget,
    between: Callable[[], None] = lambda: None,
) -> NDArray[np.int8]:
    """Verdicts of every row by generation: 1 True, 0 False, UNPARSED when the text ends in neither.

    Args:
        between: called after each batch; what it raises ends the work.

    Returns:
        int8 [rows], in the store's order.

    Raises:
        UserError: not even one row fits into memory.
    """
    verdicts = np.full(len(store), UNPARSED, dtype=np.int8)
    lengths = [int(length) + max_new_tokens for length in store.lengths]
    with _plain_attention(model), torch.no_grad(), model.host.applying([adapter], None, training=False):
        for rows in cut(lengths, budget.tokens):
            own = [lengths[row] for row in rows]

            def write(rows: list[int] = rows, own: list[int] = own) -> None:
                for places in cut(own, budget.tokens):
                    part = [rows[place] for place in places]
                    texts = _write(model, store, part, tokenizer, max_new_tokens)
                    verdicts[part] = [parse(text) for text in texts]

            budget.until_it_fits(own, write)
            between()
    return verdicts


def parse(text: str) -> int:
    """1 if the text ends in True, 0 if in False (punctuation and space behind it are allowed), else UNPARSED."""
    found = _VERDICT_AT_END.search(text)
    return UNPARSED if found is None else int(found.group(1) == "True")


def _write(
    model: PackedModel, store: TokenStore, rows: list[int], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[str]:
    longest = max(int(store.lengths[row]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        own = torch.from_numpy(store.ids(row).astype(np.int64))
        ids[place, longest - len(own) :], mask[place, longest - len(own) :] = own, 1
    generator: Any = model.base.model
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = generator.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad if pad is not None else 0,
    )
    written: list[str] = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return written


@contextmanager
def _plain_attention(model: PackedModel) -> Iterator[None]:
    """Generation keeps a cache and pads on the left, which packed attention does not know."""
    model.lend_head(False)
    model.base.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.base.model.set_attn_implementation(ATTENTION)
