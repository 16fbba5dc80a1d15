"""Which two tokens say True and False after a prompt. Whether they are the right ones is checked here too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mathverify.errors import UserError
from mathverify.prompts import render
from mathverify.tokens.encoding import PROBE, encode_text, plain

TRUE, FALSE = "True", "False"


@dataclass(frozen=True, slots=True)
class VerdictTokens:
    """Ids of the tokens that say True and False where a prompt ends."""

    true_id: int
    false_id: int

    def of(self, is_correct: bool) -> int:
        return self.true_id if is_correct else self.false_id


def verdict_tokens(tokenizer: Any) -> VerdictTokens:
    """Find the verdicts' tokens by encoding a prompt with and without each word, as training will see it.

    Raises UserError if the prompt's tokens are not a prefix of prompt + verdict, if a verdict is not one token, if
    both are the same token, or if a token does not read as its word (True and False swapped among them).
    """
    found: dict[str, int] = {}
    for prompt in (render(PROBE, False).text, render(PROBE, True).text):
        for word in (TRUE, FALSE):
            token = _token_after(tokenizer, prompt, word)
            if found.setdefault(word, token) != token:
                raise UserError(
                    f"the tokenizer writes the verdict {word!r} as a different token with a solution: {_OTHER}"
                )
    if found[TRUE] == found[FALSE]:
        raise UserError(
            f"verdict words {TRUE!r} and {FALSE!r} are the same token ({found[TRUE]}), so no verdict can be told from "
            f"the other: {_OTHER}"
        )
    tokens = VerdictTokens(found[TRUE], found[FALSE])
    check_reading(tokenizer, tokens)
    return tokens


_OTHER = "use a tokenizer that has both as words of its vocabulary"


def _token_after(tokenizer: Any, prompt: str, word: str) -> int:
    before = encode_text(tokenizer, prompt)
    after = encode_text(tokenizer, prompt + word)
    if after[: len(before)] != before:
        raise UserError(
            f"the prompt's tokens are not a prefix of prompt + {word!r} (they part at token "
            f"{_parting(before, after)} of {len(before)}): turn off the tokenizer's end token (add_eos_token) or "
            "use one that does not merge across lines"
        )
    added = after[len(before) :]
    if len(added) != 1:
        raise UserError(
            f"verdict word {word!r} is {len(added)} tokens ({added}) where a prompt ends, not one: {_OTHER}"
        )
    return added[0]


def _parting(before: list[int], after: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))


def check_reading(tokenizer: Any, tokens: VerdictTokens) -> None:
    """Raise UserError unless the True token reads "True" and the False token "False", whatever their case."""
    with plain(tokenizer) as inner:
        said = [inner.decode([token], skip_special_tokens=False) for token in (tokens.true_id, tokens.false_id)]
    read = [text.strip().casefold() for text in said]
    if read == [FALSE.casefold(), TRUE.casefold()]:
        raise UserError(
            f"True and False are swapped: token {tokens.true_id} stands for True but reads {said[0]!r}, token "
            f"{tokens.false_id} for False but reads {said[1]!r}: mend the tokenizer or the recorded verdict tokens"
        )
    for word, token, text in zip((TRUE, FALSE), (tokens.true_id, tokens.false_id), said, strict=True):
        if text.strip().casefold() != word.casefold():
            raise UserError(f"verdict word {word!r} is token {token}, which reads {text!r}: {_OTHER}")
