"""Small tokenizers for tests, built on the spot: sound ones of several kinds, and ones with a fault."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mathverify.prompts import render
from mathverify.tokens.encoding import PROBE

SPECIAL = ["<s>", "</s>", "<pad>"]


def byte_level(
    template: str | None = "<s> $A",
    words: tuple[str, ...] = ("True", "False"),
    normalizer: Any = None,
    added: tuple[str, ...] = (),
    **roles: str | None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few prompts, so that `words` are single tokens and others are not."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    text = [render(PROBE, True).text, *words] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=5,
    )
    inner.train_from_iterator(_without_verdicts(text, words), trainer)
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_tokens(list(added))
    if template:
        pairs = [(token, inner.token_to_id(token)) for token in SPECIAL]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    given = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | roles
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{k: v for k, v in given.items() if v is not None})


def _without_verdicts(texts: list[str], words: tuple[str, ...]) -> list[str]:
    """The instruction itself says 'True' and 'False': leave them out where they are not to become tokens."""
    for word in {"True", "False"} - set(words):
        texts = [text.replace(word, "") for text in texts]
    return texts


def swapped() -> PreTrainedTokenizerFast:
    """A tokenizer that reads True where the text says False, and the other way round."""
    steps = [("True", "\x00"), ("False", "True"), ("\x00", "False")]
    return byte_level(normalizer=normalizers.Sequence([normalizers.Replace(a, b) for a, b in steps]))


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer of the older kind: spaces as "▁", the text normalised, bytes for unknown characters."""
    pieces = [f"<0x{i:02X}>" for i in range(256)]
    text = render(PROBE, True).text
    letters = sorted({char if char != " " else "▁" for char in text + "0123456789"})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *pieces, *letters])}
    merges = []
    for word in ("True", "False", "▁is", "▁the", "▁answer"):
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append(pair)
    inner = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=False, unk_token="<pad>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    inner.add_special_tokens(SPECIAL)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
