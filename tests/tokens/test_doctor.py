"""The token doctor: sound tokenizers of several kinds pass, and each fault is refused by name."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from tokenizers import normalizers

from mathverify.config import LossKind, PromptConfig
from mathverify.errors import UserError
from mathverify.examples.schema import Example
from mathverify.prompts import render
from mathverify.tokens import VerdictTokens, examine, verdict_tokens
from mathverify.tokens.encoding import PROBE, encode_text
from tests.tokens.small import byte_level, sentencepiece_like, swapped

SOUND = {
    "byte-level": byte_level,
    "metaspace": sentencepiece_like,
    "no BOS defined and none added": lambda: byte_level(template=None, bos_token=None),
    "no padding token": lambda: byte_level(pad_token=None),
    "BOS is the end token": lambda: byte_level(eos_token="<s>"),
    "lower-case": lambda: byte_level(normalizer=normalizers.Lowercase(), words=("true", "false")),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("with_solution", [False, True])
def test_sound_tokenizers_pass(name: str, with_solution: bool) -> None:
    tokenizer = SOUND[name]()
    found = examine(tokenizer, PromptConfig(with_solution), LossKind.sequence)
    ids = encode_text(tokenizer, render(PROBE, with_solution).text)
    assert [token for token, _, _ in found.tokens] == [*ids, found.verdicts.true_id]
    assert found.tokens[-1][2] == "verdict"
    bos = [token for token, _, role in found.tokens if role == "BOS"]
    assert bos == ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])


def test_verdict_tokens_are_what_follows_the_prompt() -> None:
    for make in (byte_level, sentencepiece_like):
        tokenizer = make()
        verdicts = verdict_tokens(tokenizer)
        for with_solution in (False, True):
            text = render(PROBE, with_solution).text
            for word, token in (("True", verdicts.true_id), ("False", verdicts.false_id)):
                assert encode_text(tokenizer, text + word) == [*encode_text(tokenizer, text), token]
        assert verdicts.of(True) == verdicts.true_id != verdicts.of(False) == verdicts.false_id


SAME = normalizers.Replace("False", "True")
FAULTS: dict[str, tuple[Any, str]] = {
    "no BOS": (lambda: byte_level(template=None), r"puts 0 BOS tokens \('<s>', id 0\).*add_bos_token=true"),
    "two BOS": (
        lambda: byte_level(template="<s> <s> $A"),
        r"puts 2 BOS tokens .*not exactly one: let its post-processor",
    ),
    "BOS not first": (
        lambda: byte_level(template="<pad> <s> $A", pad_token=None),
        r"BOS token \('<s>'\) is at position 1",
    ),
    "BOS at the end": (lambda: byte_level(template="$A <s>"), r"BOS token .*position \d+, not first"),
    "verdicts of several tokens": (
        lambda: byte_level(words=()),
        r"verdict word 'True' is \d+ tokens \(\[.*not one",
    ),
    "False of several tokens": (lambda: byte_level(words=("True",)), r"verdict word 'False' is \d+ tokens"),
    "verdicts that are one token": (
        lambda: byte_level(normalizer=SAME),
        r"'True' and 'False' are the same token \(\d+\)",
    ),
    "verdict reads as another word": (
        lambda: byte_level(normalizer=normalizers.Replace("True", "Output")),
        r"verdict word 'True' is token \d+, which reads 'Output'",
    ),
    "end token after every text": (
        lambda: byte_level(template="<s> $A </s>"),
        r"not a prefix of prompt \+ 'True'.*add_eos_token",
    ),
    "verdict merges with the line before": (
        lambda: byte_level(added=("\nTrue",)),
        r"not a prefix of prompt \+ 'True' .*part at",
    ),
    "True and False swapped": (
        swapped,
        r"True and False are swapped: token \d+ stands for True but reads 'False'",
    ),
    "padding is the end token": (
        lambda: byte_level(pad_token="</s>"),
        r"padding token '</s>' is the end token.*train\.loss=label",
    ),
    "padding is BOS": (lambda: byte_level(pad_token="<s>"), r"padding token '<s>' is part of every prompt"),
    "padding is a verdict": (
        lambda: byte_level(words=("True", "False"), pad_token="False"),
        r"padding token 'False' is (part of every prompt|a verdict)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_refused_by_name(name: str) -> None:
    make, says = FAULTS[name]
    with pytest.raises(UserError, match=says) as caught:
        examine(make(), PromptConfig(), LossKind.sequence)
    assert str(caught.value).isprintable()


def test_padding_with_the_end_token_is_harmless_to_the_label_loss() -> None:
    found = examine(byte_level(pad_token="</s>"), PromptConfig(), LossKind.label)
    assert any("end token too; harmless" in remark for remark in found.remarks)


def test_recorded_verdicts_must_be_the_tokenizers() -> None:
    tokenizer = byte_level()
    right = verdict_tokens(tokenizer)
    examine(tokenizer, PromptConfig(), recorded=right)
    with pytest.raises(UserError, match="True and False are swapped"):
        examine(tokenizer, PromptConfig(), recorded=VerdictTokens(right.false_id, right.true_id))
    with pytest.raises(UserError, match=r"token 5, which reads"):
        examine(tokenizer, PromptConfig(), recorded=VerdictTokens(right.true_id, 5))


def test_no_bos_is_said_where_none_is_defined() -> None:
    found = examine(byte_level(template=None, bos_token=None), PromptConfig())
    assert any("defines no BOS" in remark for remark in found.remarks)


def test_the_example_is_printed_with_control_characters_escaped() -> None:
    nasty = Example("x", "\x1b[31mred [bold]?\u202e", "1", "", False, "g", "all")
    found = examine(byte_level(), PromptConfig(), example=nasty)
    out = io.StringIO()
    Console(file=out, width=120).print(found.render())
    text = out.getvalue()
    assert "\x1b" not in text and "\u202e" not in text
    assert r"\x1b" in text and r"'\n'" in text and "verdict" in text
    assert found.tokens[-1][0] == found.verdicts.false_id


def test_a_long_example_is_cut_as_in_training() -> None:
    long = Example("x", "q?", "1", "step " * 500, True, "g", "all")
    found = examine(byte_level(), PromptConfig(with_solution=True, max_length=100), example=long)
    assert len(found.tokens) <= 100
