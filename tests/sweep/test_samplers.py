"""Every sampler and pruner of the config groups can be made, draws from its space, and draws alike in any process."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from mathverify.errors import UserError
from mathverify.sweep.plugin import PRUNERS, SAMPLERS
from mathverify.sweep.proposals import suggest
from mathverify.sweep.samplers import make_pruner, make_sampler
from mathverify.sweep.settings import Settings
from mathverify.sweep.space import parse_space

NUMBERS = ["x=interval(-5,5)", "y=interval(0,1)"]
TRIALS = 5


def settings(name: str) -> Settings:
    own = dict(SAMPLERS[name], seed=3)
    if "n_startup_trials" in own:
        own["n_startup_trials"] = 2
    return Settings(sampler=own)


def proposals(name: str, arguments: list[str], fresh: bool) -> list[dict[str, Any]]:
    """The points of a study; with `fresh`, by a sampler that is made anew for every trial, as after a kill."""
    space = parse_space({}, arguments, grid=name == "grid")
    study = optuna.create_study(sampler=make_sampler(settings(name), space))
    for _ in range(TRIALS):
        if fresh:
            study.sampler = make_sampler(settings(name), space)
        trial = study.ask()
        for dimension in space.dimensions.values():
            value = suggest(trial, dimension)
            assert dimension.distribution._contains(dimension.distribution.to_internal_repr(value))
        study.tell(trial, sum(map(float, trial.params.values())))
    return [trial.params for trial in study.trials]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_proposes_and_a_new_process_proposes_the_same(name: str) -> None:
    arguments = ["x=choice(1,2,3)", "y=choice(1,2)"] if name == "grid" else NUMBERS
    points = proposals(name, arguments, fresh=False)
    assert len({tuple(point.items()) for point in points}) == TRIALS
    assert proposals(name, arguments, fresh=True) == points


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_is_made_and_asked(name: str) -> None:
    pruner = make_pruner(Settings(sampler=SAMPLERS["random"], pruner=PRUNERS[name]))
    study = optuna.create_study(pruner=pruner, direction="maximize")
    for value in (0.9, 0.8, 0.7):
        trial = study.ask()
        for step in range(3):
            trial.report(value, step)
            assert trial.should_prune() in (True, False)
        study.tell(trial, value)


def test_a_grid_over_a_continuous_dimension_is_refused() -> None:
    with pytest.raises(UserError, match="x is continuous"):
        make_sampler(settings("grid"), parse_space({}, NUMBERS, grid=True))


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(UserError, match=r"optuna\.samplers\.Nope"):
        make_sampler(Settings(sampler={"_target_": "optuna.samplers.Nope"}), parse_space({}, NUMBERS))
