"""What is said of a study's costs follows from its trials."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from mathverify.sweep.report import trial_lines
from mathverify.sweep.settings import Settings
from mathverify.sweep.space import parse_space
from mathverify.sweep.study import Session, StudyFacts

SPACE = parse_space({}, ["x=choice(1,2,3,4)"])


def session(lanes: int, *trials: tuple[TrialState, dict[int, float], float]) -> Session:
    """A study of four points. trials: (state, validations, seconds) of each that was begun."""
    study = optuna.create_study()
    for x, (state, validations, seconds) in enumerate(trials, start=1):
        study.add_trial(
            create_trial(
                state=state, value=0.5 if state is TrialState.COMPLETE else None, params={"x": x},
                distributions={"x": SPACE.dimensions["x"].distribution}, intermediate_values=validations,
                user_attrs={"facts": {"seconds": seconds, "steps": 40}} if seconds else {},
            )
        )  # fmt: skip
    settings = Settings({"_target_": "optuna.samplers.GridSampler"}, n_trials=None, n_jobs=2)
    facts = StudyFacts("id", {}, {}, ["minimize"], [], "")
    return Session(settings, study, study._storage, "s", Path("folder"), SPACE, facts, lanes)


@pytest.mark.parametrize(("lanes", "rest"), [(1, "30 s"), (2, "15 s")])
def test_after_the_first_trial_the_rest_is_priced(lanes: int, rest: str) -> None:
    """Side by side, trials take their seconds at the same time; in a pack each counts its own share."""
    one = session(lanes, (TrialState.COMPLETE, {}, 10.0))
    line, cost = trial_lines(one, one.trial(0)).splitlines()
    assert line.endswith(f"| 1/4 done, about {rest} left")
    assert cost == f"cost      10 s a trial so far; {rest} for the 3 left"


def test_what_a_running_trial_has_done_is_not_counted_again() -> None:
    own = session(1, (TrialState.COMPLETE, {}, 10.0), (TrialState.RUNNING, {20: 0.1}, 0.0))
    assert trial_lines(own, own.trial(0)).splitlines()[0].endswith("| 1/4 done, about 25 s left")


def test_after_the_last_nothing_is_left() -> None:
    own = session(1, *[(TrialState.COMPLETE, {}, 10.0)] * 4)
    assert trial_lines(own, own.trial(3)).splitlines()[0].endswith("| 4/4 done")
