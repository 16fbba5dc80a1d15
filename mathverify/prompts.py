"""Example -> prompt text, and the two verdict words. No tokens here: tokens.py turns text into segments."""

from __future__ import annotations

from dataclasses import dataclass

from mathverify.examples.schema import Example

INSTRUCTION = (
    "You are a great mathematician and you are tasked with verifying if an answer is correct. "
    "Your response should be 'True' if the answer is correct, otherwise 'False'."
)


@dataclass(frozen=True, slots=True)
class PromptParts:
    """A prompt in three pieces. Only `solution` may be cut to fit a length limit; head and tail never are.

    The prompt's text is head + solution + tail, and it ends where the verdict's token comes next.
    """

    head: str
    solution: str
    tail: str

    @property
    def text(self) -> str:
        return self.head + self.solution + self.tail


def render(example: Example, with_solution: bool) -> PromptParts:
    """Lay out an example for the model: instruction, Question, (Solution,) Answer, Output.

    The text ends in "Output:\\n" so that 'True' and 'False' follow as words of their own: a trailing space would
    be merged into the verdict by most tokenizers.
    """
    head = f"{INSTRUCTION}\n\nQuestion:\n{example.question}\n\n"
    tail = f"Answer:\n{example.answer}\n\nOutput:\n"
    if not (with_solution and example.solution):
        return PromptParts(head, "", tail)
    return PromptParts(head + "Solution:\n", example.solution, "\n\n" + tail)
