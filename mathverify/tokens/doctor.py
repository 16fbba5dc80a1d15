"""The token doctor: does this tokenizer turn prompts into what training believes they are? Looks at no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mathverify.config import LossKind, PromptConfig
from mathverify.errors import UserError
from mathverify.examples.schema import Example
from mathverify.prompts import render
from mathverify.tokens.encoding import PROBE, encode_prompts, encode_text, plain
from mathverify.tokens.verdicts import VerdictTokens, check_reading, verdict_tokens

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Diagnosis:
    """A sound tokenizer's account: one example as (id, text, role) tokens, the verdicts, and remarks worth reading."""

    tokens: list[tuple[int, str, str]]
    verdicts: VerdictTokens
    remarks: list[str]

    def render(self) -> Group:
        """For a screen: a rich table of the example's tokens, control characters escaped, and the remarks."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("position", "id", "text", "role", title="one example as tokens", title_justify="left")
        for position, (token, text, role) in enumerate(self.tokens):
            table.add_row(str(position), str(token), Text(visible(text)), role)
        return Group(table, *(Text(remark) for remark in self.remarks))


def visible(text: str) -> str:
    """A text in quotes with everything unprintable escaped, so that data cannot steer a terminal."""
    return repr(text)


def examine(
    tokenizer: Any,
    prompt: PromptConfig,
    loss: LossKind = LossKind.label,
    example: Example = PROBE,
    recorded: VerdictTokens | None = None,
) -> Diagnosis:
    """Check a tokenizer as training will use it; `recorded`: the verdicts that an adapter was trained with, if any.

    Raises UserError: not exactly one BOS, at the start (none, for a tokenizer that defines no BOS); the prompt's
    tokens are not a prefix of prompt + verdict; a verdict is not a single token of its own; True and False swapped;
    the padding token is one that masking by id would wrongly hide: part of the prompt or a verdict, or, with the
    sequence loss, the end token.
    """
    ids = _ids(tokenizer, prompt, example)
    remarks = [_check_bos(tokenizer, ids)]
    verdicts = verdict_tokens(tokenizer)
    if recorded is not None:
        check_reading(tokenizer, recorded)
        if recorded != verdicts:
            raise UserError(
                f"recorded verdict tokens {recorded} are not the tokenizer's {verdicts}: use its own tokenizer"
            )
    remarks.append(_check_padding(tokenizer, ids, verdicts, loss))
    return Diagnosis(_labelled(tokenizer, ids, verdicts.of(example.is_correct)), verdicts, remarks)


def _ids(tokenizer: Any, prompt: PromptConfig, example: Example) -> list[int]:
    parts = render(example, prompt.with_solution)
    with plain(tokenizer) as inner:
        (encoded,) = encode_prompts(inner, [parts], prompt.max_length - 1)
    # Too long is the store's complaint, about real rows and with the length that would do.
    return encode_text(tokenizer, parts.text) if encoded.ids is None else encoded.ids.tolist()


def _check_bos(tokenizer: Any, ids: list[int]) -> str:
    bos = tokenizer.bos_token_id
    if bos is None:
        return "beginning: the tokenizer defines no BOS token, so prompts have none"
    count = ids.count(bos)
    if count != 1:
        remedy = "set add_bos_token=true" if count == 0 else "let its post-processor add it once"
        raise UserError(
            f"the tokenizer puts {count} BOS tokens ({tokenizer.bos_token!r}, id {bos}) into a prompt, not exactly "
            f"one: {remedy} in tokenizer_config.json or tokenizer.json (or remove bos_token if the model has none)"
        )
    if ids[0] != bos:
        where = ids.index(bos)
        raise UserError(
            f"the BOS token ({tokenizer.bos_token!r}) is at position {where}, not first: mend the tokenizer"
        )
    return f"beginning: one BOS token, {tokenizer.bos_token!r}"


def _check_padding(tokenizer: Any, ids: list[int], verdicts: VerdictTokens, loss: LossKind) -> str:
    pad, name = tokenizer.pad_token_id, repr(tokenizer.pad_token)
    if pad is None:
        return "padding: the tokenizer defines no padding token; none is needed, passes are packed"
    remedy = "give it a padding token of its own, or none (remove pad_token from tokenizer_config.json)"
    if pad in ids or pad in (verdicts.true_id, verdicts.false_id):
        what = "part of every prompt" if pad in ids else "a verdict"
        raise UserError(f"the padding token {name} is {what}, which masking would hide: {remedy}")
    if pad == tokenizer.eos_token_id:
        if loss is LossKind.sequence:
            raise UserError(
                f"the padding token {name} is the end token, which the sequence loss would mask as padding: "
                f"set train.loss=label, or {remedy}"
            )
        return f"padding: {name} is the end token too; harmless here, the label loss looks at the verdict alone"
    return f"padding: {name}, a token of its own"


def _labelled(tokenizer: Any, ids: list[int], verdict: int) -> list[tuple[int, str, str]]:
    tokens = []
    with plain(tokenizer) as inner:
        for position, token in enumerate([*ids, verdict]):
            text = inner.decode([token], skip_special_tokens=False)
            if not text or "\ufffd" in text:  # part of a character, or a piece that its decoder strips
                text = inner.id_to_token(token) or ""
            role = "verdict" if position == len(ids) else "BOS" if token == tokenizer.bos_token_id else ""
            tokens.append((token, text, role))
    return tokens
