"""The generated text the embedded base is pre-trained on; no tokens and no model here.

It holds what a verifier needs to have learned before: solving the problems in the head, with steps, and as bare
equations; telling equal from unequal numbers. A tenth of it (`keyed`) shows somebody's answer, then the right one, then
"same" or "other": judging in other words and another layout, without which LoRA learns to verify much more slowly. The
words True and False never say whether an answer is right: the verification prompt occurs only with a verdict drawn by a
coin, so that its layout is known and says nothing.
Questions that `held_out` keeps for validation and test are left out.
"""

# ruff: noqa: RUF001 (the sign × is meant)
from __future__ import annotations

from collections.abc import Iterator
from random import Random

from mathverify.examples.arithmetic import NAMES, Problem, draw, held_out
from mathverify.examples.schema import Example
from mathverify.prompts import render


def documents(seed: str, keyed: float) -> Iterator[tuple[str, str]]:
    """An endless stream of short documents, each as (what is given, what is to be learned).

    The document's text is the two joined. A question's wording is given, not learned: its names and numbers are
    drawn at random, and half of the gradient would be spent on them. `keyed` is the share of documents in which an
    answer is followed by the key.
    """
    rng = Random(seed)
    while True:
        kind = rng.random()
        if kind < keyed:
            yield _keyed(rng)
        elif kind < 0.45:
            yield _answered(rng)
        elif kind < 0.60:
            yield _worked(rng)
        elif kind < 0.80:
            yield _prompt_with_coin(rng)
        elif kind < 0.90:
            yield "", _equations(rng)
        else:
            yield "", _equal_or_not(rng)


def _problem(rng: Random) -> Problem:
    while True:
        problem = draw(rng)
        if not held_out(problem.question):
            return problem


def _answered(rng: Random) -> tuple[str, str]:
    """A question and its answer, nothing between: it must be worked out in the head."""
    problem = _problem(rng)
    return f"Question:\n{problem.question}", f"\n\nAnswer:\n{problem.answer}"


def _worked(rng: Random) -> tuple[str, str]:
    problem = _problem(rng)
    return f"Question:\n{problem.question}", f"\n\nSolution:\n{problem.solution}\n\nAnswer:\n{problem.answer}"


def _keyed(rng: Random) -> tuple[str, str]:
    """Somebody's answer, right or wrong, then the key, and whether these two numbers are the same."""
    problem = _problem(rng)
    answer = problem.answer if rng.random() < 0.5 else problem.wrong_answer
    same = "same" if answer == problem.answer else "other"
    return f"Question:\n{problem.question}\n\nAnswer:\n{answer}", f"\n\nKey:\n{problem.answer}\n\n{same}"


def _prompt_with_coin(rng: Random) -> tuple[str, str]:
    """The exact prompt, its answer mostly right, and a verdict that has nothing to do with it."""
    problem = _problem(rng)
    right = rng.random() < 0.75
    answer = problem.answer if right else problem.wrong_answer
    solution = problem.solution if right else problem.wrong_solution
    example = Example("", problem.question, answer, solution, right, "", problem.kind)
    text = render(example, with_solution=rng.random() < 0.25).text
    end = text.index(problem.question) + len(problem.question)
    return text[:end], text[end:] + ("True" if rng.random() < 0.5 else "False")


def _equations(rng: Random) -> str:
    return "\n".join("{} = {}".format(*_equation(rng)) for _ in range(4))


def _equation(rng: Random) -> tuple[str, int]:
    operation, x, y = "+-×÷"[int(rng.random() * 4)], int(rng.random() * 300), int(rng.random() * 100)
    if operation == "+":
        return f"{x} + {y}", x + y
    if operation == "-":
        return f"{x + y} - {y}", x
    x, y = 2 + x % 8, 2 + y % 19
    return (f"{x} × {y}", x * y) if operation == "×" else (f"{x * y} ÷ {x}", y)


def _equal_or_not(rng: Random) -> str:
    """Statements about two numbers, or a number and an expression, in words that no verdict uses."""
    lines = []
    for _ in range(4):
        expression, value = _equation(rng)
        left = expression if rng.random() < 0.5 else str(value)
        right = value if rng.random() < 0.5 else _near(rng, value)
        same = right == value
        style = rng.random()
        if style < 0.4:
            lines.append(f"{left} and {right} are {'equal' if same else 'different'}.")
        elif style < 0.7:
            lines.append(f"{left} | {right} | {'same' if same else 'other'}")
        else:
            one, two = NAMES[int(rng.random() * 12)], NAMES[12 + int(rng.random() * 12)]
            lines.append(f"{one} says {left}, {two} says {right}: they {'agree' if same else 'disagree'}.")
    return "\n".join(lines)


def _near(rng: Random, value: int) -> int:
    """Another number, as near as slips put it."""
    shift = (1, -1, 10, -10, 2, -2, 9, -9, 5, 20)[int(rng.random() * 10)]
    return value + shift if value + shift > 0 else value + abs(shift)
