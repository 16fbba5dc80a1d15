"""Configs as the documentation of hydra-optuna-sweeper has them run unchanged: only the program behind them is ours."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from optuna.trial import TrialState

from .conftest import Program, make_program

SAMPLER = """
    sampler:
      _target_: optuna.samplers.TPESampler
      seed: 123
      consider_prior: true
      prior_weight: 1.0
      consider_magic_clip: true
      consider_endpoints: false
      n_startup_trials: 10
      n_ei_candidates: 24
      multivariate: false
      warn_independent_sampling: true
"""
SPHERE = """
defaults:
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: {sampler}
hydra:
  sweeper:
    {seed}
    direction: minimize
    study_name: sphere
    storage: null
    n_trials: 8
    n_jobs: 1
    max_failure_rate: 0.0
    params:
      x: {x}
      y: choice(-5, 0, 5)
x: 1
y: 1
z: 1
"""
CODE = """
import hydra, sys
from mathverify.sweep import plugin

plugin.register()

@hydra.main(version_base=None, config_path="conf", config_name="config")
def sphere(cfg):
    {body}

def configure(cfg, trial):
    {configure}

if __name__ == "__main__":
    sphere()
"""


def made(folder: Path, config: str, body: str = "return cfg.x**2 + cfg.y**2", configure: str = "pass") -> Program:
    program = make_program(folder)
    (folder / "conf" / "config.yaml").write_text(config)
    (folder / "app.py").write_text(CODE.format(body=body, configure=textwrap.indent(configure, "    ").strip()))
    return program


@pytest.mark.parametrize(
    ("sampler", "x"),
    [
        ("tpe", "interval(-5.5, 5.5)"),
        ("random", "tag(log, interval(0.1, 5.5))"),
        ("grid", "range(-1.0, 2.0, step=0.5)"),
        ("cmaes", "interval(-5.5, 5.5)"),
        ("qmc", "int(interval(1, 5))"),
    ],
)
def test_the_sphere_with_each_sampler_and_form_of_range(sampler: str, x: str, tmp_path: Path) -> None:
    program = made(
        tmp_path,
        SPHERE.format(sampler=sampler, x=x, seed="sampler: {seed: 123}").replace(
            "choice(-5, 0, 5)", "range(0.0, 4.0, step=1)"
        ),
    )
    out = program.run_plain("hydra.job.chdir=true")
    results = program.results("sphere")
    assert set(results) == {"name", "best_params", "best_value"}
    assert set(results["best_params"]) == {"x", "y"}
    assert results["best_value"] == pytest.approx(sum(v**2 for v in results["best_params"].values()))
    assert "8 trials: 8 completed" in out
    assert len([p for p in (tmp_path / "multirun/sphere").iterdir() if p.is_dir()]) == 8
    assert sorted(p.name for p in (tmp_path / "multirun/sphere").glob("*.journal")) == ["study.journal"]


def test_the_whole_default_config_of_its_sampler_is_taken(tmp_path: Path) -> None:
    program = made(tmp_path, SPHERE.format(sampler="tpe", x="interval(-5.5, 5.5)", seed=SAMPLER.strip()))
    out = program.run_plain("~z", "y=0", "x=choice(0, 1, 2)")  # as on its command lines
    assert program.results("sphere")["best_params"] == {"x": 0}
    assert "fixed     ~z y=0" in out


def test_several_directions_give_solutions(tmp_path: Path) -> None:
    config = """
defaults:
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: nsgaii
hydra:
  sweeper:
    sampler: {seed: 123}
    direction: [minimize, minimize]
    study_name: multi-objective
    storage: null
    n_trials: 20
    n_jobs: 1
    params:
      x: range(0, 5, step=0.5)
      y: range(0, 3, step=0.5)
x: 1
y: 1
"""
    program = made(tmp_path, config, "return 4 * cfg.x**2 + 4 * cfg.y**2, (cfg.x - 5) ** 2 + (cfg.y - 5) ** 2")
    program.run_plain()
    solutions = program.results("multi-objective")["solutions"]
    assert all(set(s) == {"params", "values"} and len(s["values"]) == 2 for s in solutions)
    assert not any(
        all(a <= b for a, b in zip(one["values"], other["values"], strict=True)) and one["values"] != other["values"]
        for one in solutions
        for other in solutions
    )


CUSTOM = """
defaults:
  - override hydra/sweeper: optuna
hydra:
  sweeper:
    sampler: {seed: 123}
    direction: minimize
    study_name: custom
    storage: sqlite:///custom.db
    n_trials: 12
    n_jobs: 1
    params:
      x: interval(-5.5, 5.5)
      y: choice(-5, 0, 5)
    custom_search_space: .app.configure
x: 1
y: 1
z: 100
near: 0.3
"""


def test_a_custom_search_space_adds_dimensions_that_depend_on_those_drawn(tmp_path: Path) -> None:
    """x is drawn first, z near it, and w, which no config knows, only where x is positive: a conditional space."""
    program = made(
        tmp_path, CUSTOM, 'return cfg.x**2 + cfg.y**2 + cfg.z**2 + cfg.get("w", 0)',
        'x = trial.params["x"]\ntrial.suggest_float("z", x - cfg.near, x + cfg.near)\n'
        'assert trial.user_attrs["near"] == "0.3"\n'
        'if x > 0:\n    trial.suggest_float("+w", 0.0, 1.0)',
    )  # fmt: skip
    program.run_plain("near=0.3", "hydra.sweeper.n_trials=6")
    program.run_plain("near=0.3", "hydra.job.chdir=true")  # the second half
    trials = program.trials_of("custom", f"sqlite:///{tmp_path}/custom.db")
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 12
    assert all(abs(t.params["z"] - t.params["x"]) <= 0.3 for t in trials)
    assert {t.params["x"] > 0 for t in trials if "+w" in t.params} == {True}
    assert {t.params["x"] > 0 for t in trials if "+w" not in t.params} == {False}
    found = [sum(v if k == "+w" else v**2 for k, v in t.params.items()) for t in trials]
    assert [t.value for t in trials] == pytest.approx(found)


def test_a_custom_function_that_cannot_be_found_is_one_line(tmp_path: Path) -> None:
    program = made(tmp_path, CUSTOM)
    out = program.run_plain("hydra.sweeper.custom_search_space=app.nowhere", code=1)
    assert out.splitlines()[-1].startswith(
        "mathverify.errors.UserError: hydra.sweeper.custom_search_space = app.nowhere: no such function"
    )
    assert not (tmp_path / "custom.db").exists()
