"""Generated word problems with worked solutions and proposed answers, half of them wrong by a realistic slip.

No files and no models here. The same seed gives the same rows on every machine and Python version: all chance
comes from `random.Random.random`, the one method whose sequence Python guarantees.

A wrong answer must not give itself away. Slips shift answers (a dropped carry makes them smaller), so rows picked
at random would let "small" mean "wrong". Instead wrong rows are picked in cycles: 85 mistaken for 75, 75 for 57,
57 for 85. Within a kind every value is then as often a wrong answer as it is the right answer of a question, and
each wrong row is matched by a right row whose true answer is the same. Neither the answer alone nor the question
alone says anything about the label; only the two together do.
"""

# ruff: noqa: RUF001 (the sign × is meant)
from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pyarrow as pa

from mathverify.errors import UserError
from mathverify.examples.schema import EXAMPLE_SCHEMA, Splits

NAMES = [
    "Mia",
    "Noah",
    "Lena",
    "Omar",
    "Ivy",
    "Hugo",
    "Nina",
    "Theo",
    "Ada",
    "Paul",
    "Rosa",
    "Emil",
    "Zoe",
    "Karl",
    "Ines",
    "Yusuf",
    "Cleo",
    "Sam",
    "Tara",
    "Ben",
    "Elif",
    "Max",
    "Asha",
    "Leo",
]
THINGS = [
    "marbles",
    "stickers",
    "apples",
    "pencils",
    "coins",
    "shells",
    "cards",
    "books",
    "beads",
    "stamps",
    "buttons",
    "cookies",
    "lemons",
    "tickets",
    "ribbons",
    "eggs",
    "plums",
    "bricks",
    "candles",
    "flowers",
    "nuts",
    "toys",
    "cups",
    "pears",
]


def generate(train_rows: int, validation_rows: int, test_rows: int, seed: int) -> Splits:
    """Make the three splits; they share no question, and test and validation do not depend on `train_rows`.

    Each split holds the kinds in equal parts (to one row) in random order; half of its rows are wrong. About a
    quarter of the right rows ask the question of a wrong row again, so some questions repeat within a split.
    Train takes only questions that `held_out` refuses, the other two only those that it takes.
    Raises UserError if a count is negative.
    """
    sizes = {"test": test_rows, "validation": validation_rows, "train": train_rows}
    for name, rows in sizes.items():
        if rows < 0:
            raise UserError(f"data.{name}_rows={rows} is negative: give a number of rows of 0 or more")
    seen: set[str] = set()
    tables = {name: _split(name, rows, seed, seen) for name, rows in sizes.items()}
    return Splits(tables["train"], tables["validation"], tables["test"])


def held_out(question: str) -> bool:
    """Whether a question is kept for validation and test (one in eight); nothing is ever trained on these."""
    return zlib.crc32(question.encode()) % 8 == 0


# ---------------------------------------------------------------------------------------------------------------
# One problem: a question, the steps that solve it, and one way to get them wrong.


@dataclass(slots=True)
class Problem:
    """A question with its right answer and one wrong answer, each with the steps that lead there."""

    kind: str
    question: str
    answer: str
    solution: str
    wrong_answer: str
    wrong_solution: str
    slip: str


class Of:
    """An operand of a step that is the result of an earlier step."""

    __slots__ = ("step",)

    def __init__(self, step: int) -> None:
        self.step = step


FIRST, SECOND = Of(0), Of(1)
Step = tuple[Any, str, Any, str]
"""left (int or Of), operation (one of + - × ÷), right (int or Of), what the result counts."""
Worked = tuple[int, str, int, int, str]
"""left, operation, right, result, what it counts: a step with its numbers filled in."""
Slip = Callable[[Random, int, str, int, int], int]
"""(rng, left, operation, right, right result) -> wrong result, or the right one where the slip can't happen."""


def _pick(rng: Random, options: Sequence[Any]) -> Any:
    return options[int(rng.random() * len(options))]


def _between(rng: Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def _apply(left: int, operation: str, right: int) -> int:
    """The exact result, or -1 where a whole, positive one does not exist."""
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    if operation == "×":
        return left * right
    return left // right if right and left % right == 0 else -1


def _off_by_one(rng: Random, left: int, operation: str, right: int, result: int) -> int:
    group = left if operation == "×" and rng.random() < 0.5 else 1  # a group too many, or one too many
    return result + group if rng.random() < 0.5 else result - group


def _dropped_carry(rng: Random, left: int, operation: str, right: int, result: int) -> int:
    if operation == "+" and left % 10 + right % 10 >= 10:
        return result - 10
    if operation == "-" and left % 10 < right % 10:
        return result + 10
    if operation == "×" and max(left, right) >= 10:
        return result - (left % 10) * (right % 10) // 10 * 10
    return result


def _wrong_operation(rng: Random, left: int, operation: str, right: int, result: int) -> int:
    return _apply(left, {"+": "-", "-": "+", "×": "+", "÷": "-"}[operation], right)


def _swapped_digits(rng: Random, left: int, operation: str, right: int, result: int) -> int:
    tens, units = result // 10 % 10, result % 10
    if result < 10 or (result < 100 and units == 0):
        return result
    return result + 9 * (units - tens)


def _wrong_last_line(rng: Random, left: int, operation: str, right: int, result: int) -> int:
    slip = _pick(rng, (_off_by_one, _swapped_digits, _tens_misread))
    return int(slip(rng, left, "+", right, result))


def _tens_misread(rng: Random, left: int, operation: str, right: int, result: int) -> int:
    return result + 10 if rng.random() < 0.5 else result - 10


SLIPS: dict[str, Slip] = {
    "dropped carry": _dropped_carry,
    "wrong operation": _wrong_operation,
    "off by one": _off_by_one,
    "swapped digits": _swapped_digits,
    "wrong last line": _wrong_last_line,
}
_SLIP_NAMES = tuple(SLIPS)


def _work(steps: Sequence[Step], at: int = -1, slip: Slip | None = None, rng: Random | None = None) -> list[Worked]:
    """Work the steps in order, with a slip in step `at`; (left, operation, right, result, what) of each."""
    done: list[Worked] = []
    for index, (left, operation, right, what) in enumerate(steps):
        x = done[left.step][3] if type(left) is Of else left
        y = done[right.step][3] if type(right) is Of else right
        result = _apply(x, operation, y)
        if index == at and slip is not None and rng is not None:
            if slip is _wrong_operation:  # the written step shows the operation that was really used
                operation = {"+": "-", "-": "+", "×": "+", "÷": "-"}[operation]
                result = _apply(x, operation, y)
            else:
                result = slip(rng, x, operation, y, result)
        if result <= 0:
            return []
        done.append((x, operation, y, result, what))
    return done


def _lines(done: Sequence[Worked]) -> str:
    return "\n".join([f"{what}: {x} {operation} {y} = {result}" for x, operation, y, result, what in done])


def _problem(rng: Random, kind: str, question: str, steps: Sequence[Step]) -> Problem | None:
    """Solve the steps, and once more with a random slip; None if the slip happens to change nothing."""
    right = _work(steps)
    if not right:
        return None
    name = _pick(rng, _SLIP_NAMES)
    if name == "wrong last line":
        wrong, final = right, _wrong_last_line(rng, *right[-1][:4])
    else:
        wrong = _work(steps, int(rng.random() * len(steps)), SLIPS[name], rng)
        final = wrong[-1][3] if wrong else 0
    answer = right[-1][3]
    if final <= 0 or final == answer:
        return None
    return Problem(
        kind,
        question,
        str(answer),
        f"{_lines(right)}\nThe answer is {answer}.",
        str(final),
        f"{_lines(wrong)}\nThe answer is {final}.",
        name,
    )


# ---------------------------------------------------------------------------------------------------------------
# The kinds. Each mixes operations, so that slips move answers up as well as down.


def _change(rng: Random) -> Problem | None:
    """Something is added to, or taken from, what someone has."""
    name, things, a, b = _pick(rng, NAMES), _pick(rng, THINGS), _between(rng, 12, 99), _between(rng, 12, 99)
    if rng.random() < 0.5:
        story = _pick(rng, _GAIN).format(n=name, t=things, a=a, b=b)
        return _problem(rng, "change", story, [(a, "+", b, f"{name} has now")])
    a, b = max(a, b) + 3, min(a, b)
    story = _pick(rng, _LOSS).format(n=name, t=things, a=a, b=b)
    return _problem(rng, "change", story, [(a, "-", b, f"{name} has left")])


_GAIN = (
    "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
    "{n} had {a} {t}. A friend gave {n} {b} more. How many {t} are there now?",
    "There are {a} {t} in a box. {n} puts in {b} more. How many {t} are in the box?",
    "After finding {b} {t}, {n} adds them to the {a} at home. How many {t} is that?",
    "{n} counts {a} {t} on Monday and {b} on Tuesday. How many {t} in all?",
)
_LOSS = (
    "{n} has {a} {t} and gives away {b}. How many {t} does {n} have now?",
    "{n} had {a} {t}. A friend took {b} of them. How many {t} are there now?",
    "There are {a} {t} in a box. {n} takes out {b}. How many {t} are in the box?",
    "After losing {b} {t}, {n} counts what is left of the {a} at home. How many {t} is that?",
    "{n} sells {b} of {a} {t}. How many {t} remain?",
)


def _compare(rng: Random) -> Problem | None:
    """How much more or less one has than another; larger numbers."""
    name, other, things = _pick(rng, NAMES), _pick(rng, NAMES), _pick(rng, THINGS)
    if name == other:
        return None
    a, b = _between(rng, 100, 299), _between(rng, 15, 99)
    op, templates = _pick(rng, (("+", _MORE), ("-", _FEWER)))
    story = _pick(rng, templates).format(n=name, o=other, t=things, a=a, b=b)
    return _problem(rng, "compare", story, [(a, op, b, f"{other} has")])


_MORE = (
    "{n} has {a} {t}. {o} has {b} more than {n}. How many {t} does {o} have?",
    "{o} owns {b} more {t} than {n}, who owns {a}. How many {t} does {o} own?",
    "{n} made {a} {t}, which is {b} fewer than {o}. How many {t} did {o} make?",
)
_FEWER = (
    "{n} has {a} {t}. {o} has {b} fewer than {n}. How many {t} does {o} have?",
    "{o} owns {b} fewer {t} than {n}, who owns {a}. How many {t} does {o} own?",
    "{n} made {a} {t}, which is {b} more than {o}. How many {t} did {o} make?",
)


def _groups(rng: Random) -> Problem | None:
    """Equal groups put together, or a total shared out."""
    name, things, k, m = _pick(rng, NAMES), _pick(rng, THINGS), _between(rng, 3, 9), _between(rng, 3, 20)
    if rng.random() < 0.5:
        story = _pick(rng, _TIMES).format(n=name, t=things, k=k, m=m)
        return _problem(rng, "groups", story, [(k, "×", m, f"{things} in all")])
    story = _pick(rng, _SHARED).format(n=name, t=things, k=k, total=k * m)
    return _problem(rng, "groups", story, [(k * m, "÷", k, "in each")])


_TIMES = (
    "{n} has {k} bags with {m} {t} each. How many {t} is that in all?",
    "{n} fills {k} boxes and puts {m} {t} in each. How many {t} are packed?",
    "Each of {k} friends brings {m} {t} to {n}. How many {t} are brought?",
    "There are {k} rows of {m} {t}. {n} counts them all. How many {t} are there?",
)
_SHARED = (
    "{n} puts {total} {t} into {k} equal bags. How many {t} are in each bag?",
    "{n} shares {total} {t} fairly among {k} friends. How many {t} does each get?",
    "{total} {t} stand in {k} equal rows. {n} counts one row. How many {t} is that?",
    "{n} packs {total} {t} into {k} boxes, the same in each. How many {t} go in a box?",
)


def _budget(rng: Random) -> Problem | None:
    """Several at one price, paid from or added to a sum of money."""
    name, things, k, p = _pick(rng, NAMES), _pick(rng, THINGS), _between(rng, 2, 9), _between(rng, 2, 9)
    if rng.random() < 0.5:
        money = k * p + _between(rng, 3, 60)
        story = _pick(rng, _SPEND).format(n=name, t=things, k=k, p=p, a=money)
        return _problem(rng, "budget", story, [(k, "×", p, "spent"), (money, "-", FIRST, f"{name} has left")])
    money = _between(rng, 3, 60)
    story = _pick(rng, _EARN).format(n=name, t=things, k=k, p=p, a=money)
    return _problem(rng, "budget", story, [(k, "×", p, "earned"), (money, "+", FIRST, f"{name} has now")])


_SPEND = (
    "{n} has ${a} and buys {k} {t} at ${p} each. How many dollars are left?",
    "{t} cost ${p} apiece. {n} pays for {k} with ${a}. How much change is due, in dollars?",
    "With ${a} in hand, {n} spends ${p} a day for {k} days. How many dollars remain?",
)
_EARN = (
    "{n} has ${a} and sells {k} {t} at ${p} each. How many dollars is that now?",
    "{t} sell for ${p} apiece. {n} sells {k} and had ${a} before. How many dollars in all?",
    "With ${a} in hand, {n} earns ${p} a day for {k} days. How many dollars are there then?",
)


def _ledger(rng: Random) -> Problem | None:
    """Two changes, one after the other."""
    name, things = _pick(rng, NAMES), _pick(rng, THINGS)
    a, b, c = _between(rng, 20, 79), _between(rng, 11, 49), _between(rng, 11, 49)
    if rng.random() < 0.5:
        story = _pick(rng, _UP_DOWN).format(n=name, t=things, a=a, b=b, c=c)
        return _problem(rng, "ledger", story, [(a, "+", b, "then"), (FIRST, "-", c, "at the end")])
    if a <= b:
        return None
    story = _pick(rng, _DOWN_UP).format(n=name, t=things, a=a, b=b, c=c)
    return _problem(rng, "ledger", story, [(a, "-", b, "then"), (FIRST, "+", c, "at the end")])


_UP_DOWN = (
    "{n} has {a} {t}, gets {b} more and then loses {c}. How many {t} are left?",
    "A bus has {a} riders. {b} get on, then {c} get off. How many riders are on it?",
    "A shop has {a} {t}. It buys {b} and sells {c}. How many {t} does it have?",
)
_DOWN_UP = (
    "{n} has {a} {t}, loses {b} and then gets {c} more. How many {t} are there?",
    "A bus has {a} riders. {b} get off, then {c} get on. How many riders are on it?",
    "A shop has {a} {t}. It sells {b} and buys {c}. How many {t} does it have?",
)


def _packs(rng: Random) -> Problem | None:
    """Two products, added or compared."""
    name, other, things = _pick(rng, NAMES), _pick(rng, NAMES), _pick(rng, THINGS)
    k, m, p, q = (_between(rng, 2, 9) for _ in range(4))
    if name == other:
        return None
    products = [(k, "×", m, f"{name} has"), (p, "×", q, f"{other} has")]
    if rng.random() < 0.5:
        story = _pick(rng, _TOGETHER).format(n=name, o=other, t=things, k=k, m=m, p=p, q=q)
        return _problem(rng, "packs", story, [*products, (FIRST, "+", SECOND, "together")])
    if k * m <= p * q:
        return None
    story = _pick(rng, _AHEAD).format(n=name, o=other, t=things, k=k, m=m, p=p, q=q)
    return _problem(rng, "packs", story, [*products, (FIRST, "-", SECOND, "difference")])


_TOGETHER = (
    "{n} has {k} packs of {m} {t} and {o} has {p} packs of {q}. How many {t} do they have together?",
    "{n} buys {k} bags of {m} {t}; {o} buys {p} bags of {q}. How many {t} is that in all?",
)
_AHEAD = (
    "{n} has {k} packs of {m} {t} and {o} has {p} packs of {q}. How many more {t} does {n} have?",
    "{n} buys {k} bags of {m} {t}; {o} buys {p} bags of {q}. How many fewer {t} does {o} buy?",
)


def _part(rng: Random) -> Problem | None:
    """A fraction of a number, or what is left without it."""
    name, things, m = _pick(rng, NAMES), _pick(rng, THINGS), _between(rng, 3, 20)
    d, word = _pick(rng, ((2, "half"), (3, "a third"), (4, "a quarter"), (5, "a fifth")))
    templates, rest = _pick(rng, ((_TAKEN, False), (_LEFT, True)))
    story = _pick(rng, templates).format(n=name, t=things, f=word, a=d * m)
    steps: list[Step] = [(d * m, "÷", d, f"{word} is")]
    return _problem(rng, "part", story, [*steps, (d * m, "-", FIRST, "left")] if rest else steps)


_TAKEN = (
    "{n} gives away {f} of {a} {t}. How many {t} is that?",
    "Of {a} {t}, {f} are red. How many red {t} does {n} see?",
)
_LEFT = (
    "{n} gives away {f} of {a} {t}. How many {t} are left?",
    "Of {a} {t}, {f} are red. How many {t} that are not red does {n} see?",
)


def _clock(rng: Random) -> Problem | None:
    """A time of day before or after another; answers like 10:15."""
    name, hour, minute, span = (
        _pick(rng, NAMES),
        _between(rng, 1, 12),
        5 * _between(rng, 0, 11),
        5 * _between(rng, 2, 11),
    )
    sign = 1 if rng.random() < 0.5 else -1
    story = _pick(rng, _LATER if sign > 0 else _EARLIER).format(n=name, s=f"{hour}:{minute:02d}", m=span)
    answer, lines = _tell(hour, minute, sign * span)
    name_of_slip = _pick(rng, _SLIP_NAMES)
    wrong, wrong_lines = answer, lines
    match name_of_slip:
        case "dropped carry":  # the hour is not moved on
            wrong, wrong_lines = _tell(hour, minute, sign * span, roll=False)
        case "wrong operation":
            wrong, wrong_lines = _tell(hour, minute, -sign * span)
        case "off by one":  # an hour too many or too few
            wrong, wrong_lines = _tell(hour, minute, sign * span, extra=_pick(rng, (-1, 1)))
        case "swapped digits":
            wrong, wrong_lines = _tell(hour, minute, sign * span, swap=True)
        case _:
            h, m = answer.split(":")
            wrong = f"{h}:{(int(m) + _pick(rng, (5, 10, 50, 55))) % 60:02d}"
    if wrong == answer:
        return None
    solution, wrong_solution = f"{lines}\nThe answer is {answer}.", f"{wrong_lines}\nThe answer is {wrong}."
    return Problem("clock", story, answer, solution, wrong, wrong_solution, name_of_slip)


def _tell(hour: int, minute: int, span: int, roll: bool = True, extra: int = 0, swap: bool = False) -> tuple[str, str]:
    """The time `span` minutes on (back if negative), and the lines that say so; the rest are the slips."""
    total = minute + span
    lines = [f"minutes: {minute} {'+' if span > 0 else '-'} {abs(span)} = {total}"]
    hours, left = divmod(total, 60)
    if hours:
        lines.append(f"past the hour: {total} {'-' if hours > 0 else '+'} 60 = {left}")
    if swap and left % 10 < 6:
        left = left % 10 * 10 + left // 10
        lines[-1] = lines[-1].rpartition("=")[0] + f"= {left}"
    hour = (hour - 1 + (hours if roll else 0) + extra) % 12 + 1
    return f"{hour}:{left:02d}", "\n".join([*lines, f"hour: {hour}"])


_LATER = (
    "{n} leaves at {s} and walks for {m} minutes. At what time does {n} arrive?",
    "A film starts at {s} and lasts {m} minutes. {n} sees it all. When does it end?",
    "It is {s}. {n} has to wait {m} minutes more. What time will it be?",
)
_EARLIER = (
    "{n} arrives at {s} after walking for {m} minutes. At what time did {n} leave?",
    "A film ends at {s} and lasts {m} minutes. {n} sees it all. When does it start?",
    "It is {s}. {n} has waited {m} minutes. What time was it before?",
)

KINDS: dict[str, Callable[[Random], Problem | None]] = {
    "change": _change,
    "compare": _compare,
    "groups": _groups,
    "budget": _budget,
    "ledger": _ledger,
    "packs": _packs,
    "part": _part,
    "clock": _clock,
}


def draw(rng: Random, kind: str | None = None) -> Problem:
    """Draw one problem, of a random kind unless one is named. Its wrong answer is not balanced (see above)."""
    while True:
        problem = KINDS[kind or _pick(rng, tuple(KINDS))](rng)
        if problem is not None:
            return problem


# ---------------------------------------------------------------------------------------------------------------
# Rows: which problems are shown with their right answer and which with the wrong one.


class _Picker:
    """Draws problems of one kind for one split and picks right and wrong rows so that their values match."""

    def __init__(self, kind: str, split: str, rng: Random, seen: set[str]) -> None:
        self.kind, self.rng, self.seen = kind, rng, seen
        self.held_out = split != "train"
        self.waiting: dict[str, deque[Problem]] = {}  # by right answer

    def rows(self, count: int) -> list[tuple[Problem, bool]]:
        """`count` pairs (problem, shown with its right answer?), half of them wrong."""
        wrong_count = count // 2
        wrong: list[Problem] = []
        while len(wrong) < wrong_count:
            wrong += self._cycle()
        rows = [(problem, False) for problem in wrong[:wrong_count]]
        rows += [(self._twin(problem), True) for problem in wrong[: count - wrong_count]]
        if count > 2 * wrong_count:  # an odd count has one right row more
            rows.append((self._twin(wrong[0] if wrong else self._draw()), True))
        return rows[:count]

    def _draw(self) -> Problem:
        while True:
            problem = draw(self.rng, self.kind)
            if held_out(problem.question) is self.held_out and problem.question not in self.seen:
                self.seen.add(problem.question)
                return problem

    def _take(self, value: str) -> Problem | None:
        """The problem that has waited longest among those whose right answer is `value`."""
        waiting = self.waiting.get(value)
        return waiting.popleft() if waiting else None

    def _wait(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            self.waiting.setdefault(problem.answer, deque()).append(problem)

    def _cycle(self) -> list[Problem]:
        """Problems whose wrong answers are, as a multiset, their right answers; empty if the walk led nowhere.

        Walk from a fresh problem to a waiting one whose right answer is the first's wrong answer, and so on, until
        the walk meets itself. What is not in the cycle waits for a later walk.
        """
        path: list[Problem] = [self._draw()]
        left_at = {path[0].answer: 0}
        while (value := path[-1].wrong_answer) not in left_at:
            problem = self._take(value)
            if problem is None:
                self._wait(path)
                return []
            left_at[value] = len(path)
            path.append(problem)
        start = left_at[value]
        self._wait(path[:start])
        return path[start:]

    def _twin(self, problem: Problem) -> Problem:
        """Another problem with the same right answer; once in four times, or if there is none, the same one."""
        if self.rng.random() < 0.25:
            return problem
        return self._take(problem.answer) or problem


def _split(name: str, count: int, seed: int, seen: set[str]) -> pa.Table:
    rng = Random(f"{seed} {name}")  # a text seed is hashed with SHA-512: the same everywhere
    rows: list[tuple[Problem, bool]] = []
    for index, kind in enumerate(KINDS):
        share = count // len(KINDS) + (index < count % len(KINDS))
        rows += _Picker(kind, name, rng, seen).rows(share)
    _shuffle(rng, rows)
    groups: dict[str, str] = {}
    columns: dict[str, list[Any]] = {field: [] for field in EXAMPLE_SCHEMA.names}
    for index, (problem, right) in enumerate(rows):
        columns["id"].append(f"{name}-{index}")
        columns["question"].append(problem.question)
        columns["answer"].append(problem.answer if right else problem.wrong_answer)
        columns["solution"].append(problem.solution if right else problem.wrong_solution)
        columns["is_correct"].append(right)
        columns["group"].append(groups.setdefault(problem.question, f"{name}-q{len(groups)}"))
        columns["slice"].append(problem.kind)
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def _shuffle(rng: Random, rows: list[Any]) -> None:
    """Fisher-Yates on `Random.random` alone; `Random.shuffle` may change between Python versions."""
    for last in range(len(rows) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        rows[last], rows[other] = rows[other], rows[last]
