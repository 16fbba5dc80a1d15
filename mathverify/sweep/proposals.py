"""What to run next, and telling what came of it: where trials change hands, always under the study's lock.

A trial is, in this order: told if its outcome is there, taken over if its worker is dead, waited for if its worker
lives; only then a new one is proposed, as long as the budget and the space have one.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import optuna
from hydra.utils import get_method
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from mathverify.entry import TRIAL_VARIABLE
from mathverify.errors import UserError
from mathverify.sweep import outcome as outcomes
from mathverify.sweep.attempt import release
from mathverify.sweep.composer import Composer
from mathverify.sweep.liveness import Watch, Worker
from mathverify.sweep.outcome import End, Outcome
from mathverify.sweep.samplers import trial_seed
from mathverify.sweep.settings import Duplicates
from mathverify.sweep.space import Dimension, Value, quoted
from mathverify.sweep.storage import last_outage
from mathverify.sweep.study import Session, counts

ASKS = 3
"""Repeated proposals of one point before an untried point of a discrete space is taken instead."""
MOST_REPEATS = 50
"""Repeated proposals in a row after which a space is taken for finished that cannot be counted."""


@dataclass(frozen=True)
class Job:
    """A trial to launch: its number, what this try is called, and Hydra overrides."""

    number: int
    token: str
    overrides: tuple[str, ...]


class Nothing(Enum):
    """Why there is no job: others still work on the last trials, or the study is done."""

    waiting = "waiting"
    over = "over"


@dataclass
class Proposer:
    """Hands out jobs of one study to one sweeper. ended: called once for every trial told here.

    why: why the study is over, once it is. problem: whether that is a failure.
    """

    session: Session
    composer: Composer
    config: Any
    job_extras: Callable[[int], list[str]]
    ended: Callable[[FrozenTrial], None] = lambda trial: None
    why: str = ""
    problem: bool = False

    def __post_init__(self) -> None:
        self.me = Worker.this()
        self.running: dict[int, str] = {}
        self._watch = Watch(self.session.settings.dead_after, last_outage)
        self._fruitless = 0  # launches in a row of which no job began
        self._first: list[str | None] = []  # reasons of this command's first trials; None for one that did not fail

    def take(self) -> Job | Nothing:
        """The next job.

        Raises:
            UserError: the sampler cannot propose.
        """
        return self.session.alone(self._take)

    def _take(self) -> Job | Nothing:
        if self.problem:
            return Nothing.over
        others = 0
        for trial in self.session.trials():
            if trial.state is TrialState.RUNNING and trial.number not in self.running:
                match self._adopt(trial):
                    case Job() as job:
                        return job
                    case True:
                        others += 1
        return self._propose(others)

    def settle(self, job: Job, launch_error: str | None = None) -> None:
        """A job of ours came back, somehow: tell its outcome, or leave the trial to whoever takes it over."""
        self.running.pop(job.number, None)
        self.session.alone(lambda: self._settle(job, launch_error))

    def _settle(self, job: Job, launch_error: str | None) -> None:
        trial = self.session.trial(job.number)
        marks = trial.user_attrs
        if trial.state is not TrialState.RUNNING or marks["attempt"]["token"] not in (job.token, None):
            return
        if "outcome" in marks:
            self.tell(trial, Outcome.from_plain(marks["outcome"]))
        elif launch_error is not None and marks.get("claimed") != job.token and marks["attempt"]["token"]:
            self.tell(trial, outcomes.failed(launch_error))

    def launch_failed(self, jobs: Sequence[Job], error: str) -> None:
        """A launcher raised in the middle of a batch, as for a job that was killed; tell those that came to an end.

        Those that began are their workers', or taken over if these are dead. Those that did not are released: a job
        that still waits in a queue will find itself superseded. When nothing began several times in a row, it is the
        launcher that fails, and the sweep stops.
        """
        for job in jobs:
            self.running.pop(job.number, None)
        began = self.session.alone(lambda: [self._salvage(job) for job in jobs])
        self._fruitless = 0 if any(began) else self._fruitless + 1
        if self._fruitless >= self.session.settings.stop_after_same_failures:
            self.why = f"stopped: {self._fruitless} times in a row no trial began: {error}"
            self.problem = True

    def _salvage(self, job: Job) -> bool:
        """Whether the job had begun."""
        trial = self.session.trial(job.number)
        marks = trial.user_attrs
        if trial.state is not TrialState.RUNNING or marks["attempt"]["token"] != job.token:
            return True
        if "outcome" in marks:
            self.tell(trial, Outcome.from_plain(marks["outcome"]))
        elif marks.get("claimed") != job.token:
            release(self.session, trial, job.token)
            return False
        return True

    def give_back(self) -> list[int]:
        """Interrupted: release what this sweeper has in hand; returns the numbers.

        Not what a job of a launcher has begun: that may go on without us, and leaves its outcome in the study.
        """
        held, self.running = self.running, {}

        def section() -> list[int]:
            trials = [self.session.trial(number) for number in sorted(held)]
            ours = [t for t in trials if t.user_attrs.get("owner") in (None, self.me.to_plain())]
            for trial in ours:
                release(self.session, trial, held[trial.number])
            return [trial.number for trial in ours]

        return self.session.alone(section)

    def beat(self) -> None:
        """A sign of life for every job in hand, queued ones too."""
        import time

        for number in list(self.running):
            self.session.mark(self.session.trial(number), beat=time.time())

    def tell(self, trial: FrozenTrial, outcome: Outcome) -> None:
        """Finish a trial in the study."""
        session, number = self.session, trial.number
        infeasible = outcome.end is End.failed and outcome.out_of_memory
        if outcome.reason is not None:
            session.mark(trial, reason=outcome.reason)
        if outcome.facts:
            session.mark(trial, facts=outcome.facts)
        # As Trial.set_constraint does: above 0 is infeasible. Samplers leave FAIL out, so such a trial is told PRUNED.
        session.storage.set_trial_system_attr(trial._trial_id, "constraints:memory", 1.0 if infeasible else 0.0)
        if outcome.end is End.completed:
            session.study.tell(number, outcome.values)
        elif outcome.end is End.pruned or infeasible:
            session.study.tell(number, state=TrialState.PRUNED)
        else:
            session.study.tell(number, state=TrialState.FAIL)
        self._first.append(outcome.reason if outcome.end is End.failed else None)
        self.ended(session.trial(number))

    # Trials that exist

    def _adopt(self, trial: FrozenTrial) -> Job | bool:
        """A running trial that is not ours: tell it (False), take it over (Job), or leave it to its worker (True)."""
        marks = trial.user_attrs
        if "outcome" in marks:
            self.tell(trial, Outcome.from_plain(marks["outcome"]))
            return False
        owner = Worker.from_plain(marks["owner"]) if marks.get("owner") else None
        # One of ours that is not in hand was cut short while it was proposed, by a database that went away.
        if owner not in (None, self.me) and self._watch.is_alive(trial.number, owner, marks.get("beat")):
            return True
        count = marks.get("attempt", {"count": 0})["count"]
        if count >= self.session.settings.max_attempts:
            self.tell(
                trial, outcomes.failed(f"its worker died {count} times without a word (killed, or out of memory?)")
            )
            return False
        if "job" in marks:
            return self._job(trial, marks["job"], count + 1)
        # Its worker died while proposing it; the sampler proposes the same again (samplers.py).
        return self._prepared(optuna.trial.Trial(self.session.study, trial._trial_id)) or False

    # New trials

    def _propose(self, others: int) -> Job | Nothing:
        repeats = 0
        while True:
            trials = self.session.trials()
            if self._must_stop(trials) or self._is_finished(trials, repeats):
                return Nothing.waiting if others and not self.problem else Nothing.over
            if self._asks_again and repeats and repeats % ASKS == 0:
                self._enqueue_untried(trials)
            job = self._prepared(self.session.study.ask())
            if job is not None:
                return job
            repeats += 1

    @property
    def _asks_again(self) -> bool:
        return self.session.settings.duplicates is not Duplicates.train

    def _prepared(self, trial: optuna.Trial) -> Job | None:
        """Draw the point of a fresh trial; None when it was told at once (a repetition, or impossible)."""
        session = self.session
        for dimension in session.space.dimensions.values():
            suggest(trial, dimension)
        if (custom := session.settings.custom_search_space) is not None:
            self._extend(trial, custom)
        frozen = session.trial(trial.number)
        try:
            overrides = self.composer.overrides(trial.params)
            config = self.composer.check(overrides)
        except UserError as error:
            self.tell(frozen, outcomes.failed(str(error)))
            return None
        if self._asks_again and (earlier := self._earlier(frozen, config)) is not None:
            self._tell_repeated(frozen, earlier)
            return None
        return self._job(frozen, {"overrides": overrides, "config": config}, 1)

    def _extend(self, trial: optuna.Trial, custom: str) -> None:
        """The user's function may suggest more, also depending on what was drawn; it sees fixed settings as marks."""
        for override in self.session.space.fixed:
            key, _, value = override.partition("=")
            if not key.startswith("~"):
                trial.set_user_attr(key, value)
        get_method(custom)(self.config, trial)

    def _job(self, trial: FrozenTrial, job: dict[str, Any], count: int) -> Job:
        token = secrets.token_hex(4)
        marks = {"job": job} if "job" not in trial.user_attrs else {}
        self.session.mark(trial, **marks, owner=self.me.to_plain(), attempt={"token": token, "count": count})
        self.running[trial.number] = token
        extras = [
            f"++hydra.job.env_set.{TRIAL_VARIABLE}={quoted(f'{trial.number}:{token}')}",
            *self.job_extras(trial.number),
        ]
        return Job(trial.number, token, (*job["overrides"], *extras))

    # Repetitions

    def _earlier(self, trial: FrozenTrial, config: str) -> FrozenTrial | None:
        for other in self.session.trials():
            if other.number != trial.number and other.user_attrs.get("job", {}).get("config") == config:
                return other
        return None

    def _tell_repeated(self, trial: FrozenTrial, earlier: FrozenTrial) -> None:
        session = self.session
        session.mark(trial, duplicate_of=earlier.number)
        told = session.settings.duplicates is Duplicates.tell
        if told and earlier.state is TrialState.COMPLETE:
            session.study.tell(trial.number, earlier.values)
        elif told and earlier.state is TrialState.PRUNED:
            for step, value in earlier.intermediate_values.items():
                session.storage.set_trial_intermediate_value(trial._trial_id, step, value)
            session.study.tell(trial.number, state=TrialState.PRUNED)
        else:
            session.study.tell(trial.number, state=TrialState.FAIL)

    def _enqueue_untried(self, trials: list[FrozenTrial]) -> None:
        """Of a discrete space, the sampler having nothing new to say: any point that was not tried."""
        space = self.session.space
        if space.size is None or space.size > 100_000 or self.session.settings.custom_search_space:
            return
        tried = {_key(trial.params) for trial in trials}
        untried = [point for point in space.points() if _key(point) not in tried]
        if untried:
            place = trial_seed(self.session.settings.seed, len(trials)) % len(untried)
            self.session.study.enqueue_trial(untried[place])

    # When to stop

    def _is_finished(self, trials: list[FrozenTrial], repeats: int) -> bool:
        space = self.session.space
        counted = sum(counts(trial) and trial.state is not TrialState.WAITING for trial in trials)
        if counted >= self.session.budget:
            self.why = f"the budget of {self.session.budget} trials is used"
        elif self._asks_again and self._has_all_points(trials):
            self.why = f"all {space.size} points of the space are done"
        if repeats >= MOST_REPEATS:
            self.why = f"{repeats} proposals in a row were points that were run before: the space seems finished"
        return bool(self.why)

    def _has_all_points(self, trials: list[FrozenTrial]) -> bool:
        space = self.session.space
        if space.size is None or self.session.settings.custom_search_space:
            return False
        return len({_key(t.params) for t in trials if len(t.params) >= len(space.dimensions)}) >= space.size

    def _must_stop(self, trials: list[FrozenTrial]) -> bool:
        settings = self.session.settings
        failures = [t for t in trials if is_failure(t)]
        first = self._first[: settings.stop_after_same_failures]
        reasons = Counter(outcomes.kind_of(reason) for reason in first if reason is not None)
        if len(first) == settings.stop_after_same_failures and reasons.most_common(1)[:1] == [
            (outcomes.kind_of(first[0] or ""), len(first))
        ]:
            self.why = f"stopped: the first {len(first)} trials all failed for the same reason: {first[0]}"
            self.problem = True
        elif failures and len(failures) > settings.max_failure_rate * self.session.budget:
            self.why = (
                f"stopped: {len(failures)} trials failed, more than max_failure_rate = {settings.max_failure_rate:g} "
                f"of {self.session.budget}; the last: {failures[-1].user_attrs.get('reason')}"
            )
            self.problem = True
        return self.problem


def is_failure(trial: FrozenTrial) -> bool:
    """Whether a trial counts as failed: told FAIL for a reason of its own, or out of memory (told PRUNED)."""
    if trial.state is TrialState.FAIL:
        return "duplicate_of" not in trial.user_attrs
    return is_infeasible(trial)


def is_infeasible(trial: FrozenTrial) -> bool:
    """Whether a trial ran out of memory at the smallest pass."""
    return bool(trial.constraints.get("memory", 0.0) > 0)


def suggest(trial: optuna.Trial, dimension: Dimension) -> Value:
    """Draw one dimension; the same value again for a trial that has it already."""
    d = dimension.distribution
    match d:
        case CategoricalDistribution():
            return trial.suggest_categorical(dimension.key, d.choices)
        case IntDistribution():
            return trial.suggest_int(dimension.key, d.low, d.high, step=d.step, log=d.log)
        case FloatDistribution():
            return trial.suggest_float(dimension.key, d.low, d.high, step=d.step, log=d.log)
    raise AssertionError(d)


def _key(params: Any) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, repr(value)) for key, value in params.items()))
