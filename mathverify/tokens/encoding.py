"""Prompt parts -> token ids with one tokenizer: special tokens in the rows' own text stay text, long solutions are cut.

Needs no model; what ids mean for training is the engine's business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from mathverify.errors import UserError
from mathverify.examples.schema import Example
from mathverify.prompts import PromptParts

PROBE = Example("probe", "What is 17 + 25?", "42", "17 + 25 = 42.", True, "probe", "all")
"""An example to try prompts and tokenizers on; not part of any data set."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt's ids (int32 [tokens]); `cut`: whether its solution was shortened. ids is None if it cannot fit."""

    ids: np.ndarray | None
    cut: bool
    tokens_needed: int


def backend(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` inside a transformers tokenizer; UserError for one that has none."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None or not hasattr(inner, "encode_batch"):
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) has no tokenizer.json: "
            "save the model's fast tokenizer beside it"
        )
    return inner


@contextmanager
def plain(tokenizer: Any) -> Iterator[Any]:
    """Lend the backend with no padding, no truncation, and special tokens in texts read as the characters they are.

    Without the last, a row whose text holds "<|begin_of_text|>" would bring a second BOS into the prompt.
    """
    inner = backend(tokenizer)
    padding, truncation, as_text = inner.padding, inner.truncation, inner.encode_special_tokens
    inner.no_padding()
    inner.no_truncation()
    inner.encode_special_tokens = True
    try:
        yield inner
    finally:
        inner.encode_special_tokens = as_text
        if padding is not None:
            inner.enable_padding(**padding)
        if truncation is not None:
            inner.enable_truncation(**truncation)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of one text, with whatever the tokenizer adds around it (BOS)."""
    with plain(tokenizer) as inner:
        return list(inner.encode(text).ids)


def encode_prompts(inner: Any, prompts: Sequence[PromptParts], limit: int) -> list[Encoded]:
    """Ids of each prompt, at most `limit` of them. inner: a backend lent by `plain`.

    Ids are those of the whole text, tokenised in one piece. A prompt with more loses characters from the end of its
    solution until what is left, tokenised again in one piece, fits: the ids are always those of an actual text.
    """
    texts = [prompt.text for prompt in prompts]
    whole = [np.array(encoding.ids, np.int32) for encoding in inner.encode_batch_fast(texts)]
    done = [Encoded(ids, False, len(ids)) for ids in whole]
    long = [row for row, ids in enumerate(whole) if len(ids) > limit]
    if long:
        for row, cut in zip(long, _cut(inner, [prompts[row] for row in long], limit), strict=True):
            done[row] = cut
    return done


def _cut(inner: Any, prompts: Sequence[PromptParts], limit: int) -> list[Encoded]:
    """Shorten solutions, all prompts in step: each round asks the tokenizer where the surplus tokens begin."""
    done: list[Encoded | None] = [None] * len(prompts)
    kept = [len(prompt.solution) for prompt in prompts]
    waiting = list(range(len(prompts)))
    while waiting:
        texts = [prompts[i].head + prompts[i].solution[: kept[i]] + prompts[i].tail for i in waiting]
        still = []
        for i, encoding in zip(waiting, inner.encode_batch(texts), strict=True):
            surplus = len(encoding.ids) - limit
            if surplus <= 0:
                done[i] = Encoded(np.array(encoding.ids, np.int32), True, len(encoding.ids))
            elif kept[i] == 0:
                done[i] = Encoded(None, True, len(encoding.ids))
            else:
                kept[i] = _shorter(encoding.offsets, len(prompts[i].head), kept[i], surplus)
                still.append(i)
        waiting = still
    return [encoded for encoded in done if encoded is not None]


def _shorter(offsets: list[tuple[int, int]], head: int, kept: int, surplus: int) -> int:
    """How many of a solution's characters to keep so that about `surplus` tokens go; always fewer than `kept`."""
    starts = [start for start, end in offsets if head < end and start < head + kept and end > start]
    if len(starts) <= surplus:
        return 0
    return min(max(starts[-surplus] - head, 0), kept - 1)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """32 hex digits of all that decides ids: vocabulary, merges, normalisation, and the special tokens' roles."""
    with plain(tokenizer) as inner:
        content = inner.to_str()
    roles = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    return xxhash.xxh3_128_hexdigest((content + json.dumps(roles)).encode())
