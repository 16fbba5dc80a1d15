"""Every sampler and pruner of the config groups can be made, draws from its space, and draws alike in any process."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from mathverify.errors import UserError
from mathverify.sweep.plugin import PRUNERS, SAMPLERS
from mathverify.sweep.proposals import suggest
from mathverify.sweep.samplers import left_out, make_pruner, make_sampler
from mathverify.sweep.settings import Settings
from mathverify.sweep.space import parse_space

NUMBERS = ["x=interval(-5,5)", "y=interval(0,1)"]
TRIALS = 5


def settings(name: str) -> Settings:
    own = dict(SAMPLERS[name], seed=3)
    if "n_startup_trials" in own:
        own["n_startup_trials"] = 2
    return Settings(sampler=own)


def proposals(name: str, arguments: list[str], fresh: str = "") -> list[dict[str, Any]]:
    """The points of a study; fresh: made by a sampler that is new for every "trial", or "value", as after a kill."""
    space = parse_space({}, arguments, grid=name == "grid")
    study = optuna.create_study(sampler=make_sampler(settings(name), space))
    for _ in range(TRIALS):
        if fresh:
            study.sampler = make_sampler(settings(name), space)
        trial = study.ask()
        for dimension in space.dimensions.values():
            if fresh == "value":
                study.sampler = make_sampler(settings(name), space)
                trial = optuna.trial.Trial(study, trial._trial_id)
            value = suggest(trial, dimension)
            assert dimension.distribution._contains(dimension.distribution.to_internal_repr(value))
        study.tell(trial, sum(map(float, trial.params.values())))
    return [trial.params for trial in study.trials]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_proposes_and_a_new_process_proposes_the_same(name: str) -> None:
    """Also one that finds a point half drawn, unless the sampler looks at that."""
    arguments = ["x=choice(1,2,3)", "y=choice(1,2)"] if name == "grid" else NUMBERS
    points = proposals(name, arguments)
    assert len({tuple(point.items()) for point in points}) == TRIALS
    assert proposals(name, arguments, fresh="trial") == points
    if name not in ("gp", "qmc"):
        assert proposals(name, arguments, fresh="value") == points


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


TPE = {"_target_": "optuna.samplers.TPESampler"}


@pytest.mark.parametrize(
    ("what", "component", "says"),
    [
        ("sampler", TPE | {"n_startup_trails": 3}, r"sampler\.n_startup_trails = 3: .*did you mean n_startup_trials"),
        ("pruner", {"_target_": "optuna.pruners.MedianPruner", "n_warmup": 1}, r"pruner\.n_warmup = 1: MedianPruner"),
    ],
)
def test_a_mistyped_argument_is_refused_with_what_was_meant(what: str, component: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"sampler": TPE, what: component}
    made = Settings(**arguments)
    with pytest.raises(UserError, match=says) as error:
        make_sampler(made, parse_space({}, NUMBERS)), make_pruner(made)
    assert "\n" not in str(error.value)


def test_an_argument_of_another_pruner_is_left_out_and_named() -> None:
    """As when the command line puts another pruner on a study of sweeps/."""
    made = Settings(
        TPE, pruner={"_target_": "optuna.pruners.HyperbandPruner", "n_startup_trials": 4, "min_resource": 1}
    )
    assert isinstance(make_pruner(made), optuna.pruners.HyperbandPruner)
    assert left_out(made) == ["hydra.sweeper.pruner: HyperbandPruner takes no n_startup_trials = 4: left out"]


def test_what_this_optuna_has_dropped_is_left_out_and_named() -> None:
    made = Settings({"_target_": "optuna.samplers.MOTPESampler", "seed": 1, "n_ehvi_candidates": 12})
    make_sampler(made, parse_space({}, NUMBERS))
    assert left_out(made) == ["hydra.sweeper.sampler: TPESampler takes no n_ehvi_candidates = 12: left out"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_group_sets_by_itself_is_no_news(name: str) -> None:
    assert left_out(settings(name)) == []
    random = settings(name).sampler | {"_target_": "optuna.samplers.RandomSampler", "n_startup_trials": 10}
    assert left_out(Settings(random)) == []


def test_a_grid_takes_no_custom_search_space() -> None:
    made = Settings(SAMPLERS["grid"], custom_search_space="some.function")
    with pytest.raises(UserError, match=r"custom_search_space .* grid"):
        make_sampler(made, parse_space({}, ["x=choice(1,2)"], grid=True))
