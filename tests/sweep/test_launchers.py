"""Hydra's own launchers under the sweeper: each ends a study right, and what runs at once has different devices."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from .conftest import Program, Sweep, small
from .ends import study_of

SPACE = ["x=interval(-5,5)", "y=choice(1,2,3)", "hydra/sweeper/sampler=random"]
AT_ONCE = ["hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=5"]

pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="mathverify[launchers] is not installed")


def check_study(program: Program, count: int) -> list[FrozenTrial]:
    trials = program.trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * count
    assert all(t.value == pytest.approx(t.params["x"] ** 2 + t.params["y"]) for t in trials)
    assert len(program.calls) == len({(x, y) for _, x, y in program.calls}) == count
    folders = {p.name for p in (program.folder / "multirun/s").iterdir() if p.name.isdigit()}
    assert folders == set(map(str, range(count)))
    return trials


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_study_in_batches_of_a_launcher_is_what_it_is_without(
    program: Program, tmp_path: Path, launcher: str
) -> None:
    if launcher == "submitit_local":
        pytest.importorskip("submitit")
    two_at_once = [f"hydra/launcher={launcher}", "hydra.sweeper.n_jobs=2"]
    out = program.sweep(*SPACE, *two_at_once, "hydra.sweeper.n_trials=3")
    trials = check_study(program, 3)
    assert "3 trials: 3 completed, 0 pruned, 0 failed" in out
    pids = {t.user_attrs["owner"]["pid"] for t in trials}
    assert len(pids) >= 2  # not in the sweeper's process, one after another
    before = {t.number: t.params for t in trials}
    program.sweep(*SPACE, *two_at_once, "hydra.sweeper.n_trials=4")
    assert {t.number: t.params for t in check_study(program, 4)[:3]} == before


@pytest.mark.long
def test_ray_ends_a_study_right(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="mathverify[launchers] is not installed")
    monkeypatch.setenv("HOME", str(program.folder))  # where Ray leaves a token
    devices = {"MATHVERIFY_DEVICES": "GPU-a,GPU-b", "MATHVERIFY_LEASES": str(program.folder / "leases")}
    for name, value in devices.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    record_devices(program)
    program.sweep(
        *SPACE, "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false", *AT_ONCE, "seconds=0.5", seconds=150,
    )  # fmt: skip
    check_study(program, 5)
    check_devices(program, 5)


@pytest.mark.long
def test_a_run_of_ours_goes_through_a_launcher(sweep_here: Sweep) -> None:
    """mathverify.train's own task, with its checkpoints and validations, in another process."""
    pytest.importorskip("submitit")
    swept = sweep_here(
        *small("lora=choice(r4,r16)", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=2",
               "hydra.sweeper.study_name=s", "hydra/launcher=submitit_local", "hydra.sweeper.n_jobs=2")
    )  # fmt: skip
    assert swept.code == 0, swept.out
    trials = study_of(swept.folder / "multirun/s", "s").trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 2
    assert all(t.user_attrs["facts"]["steps"] > 0 and t.intermediate_values for t in trials)
    assert {t.user_attrs["owner"]["pid"] for t in trials}.isdisjoint({os.getpid()})


# A launcher that loses jobs


LOSING = '''
"""Launches like Hydra's own launcher, and loses the second job of its first batch before it begins."""
import sys, types
from hydra._internal.core_plugins.basic_launcher import BasicLauncher


class Losing(BasicLauncher):
    batches = 0

    def launch(self, job_overrides, initial_job_idx):
        Losing.batches += 1
        mode = open("mode.txt").read()
        if mode == "always" or Losing.batches <= int(mode):
            super().launch(job_overrides[:1] if mode != "always" else [], initial_job_idx)
            raise ConnectionError("postgresql://me:planted-7@host is gone")
        return super().launch(job_overrides, initial_job_idx)


Losing.__module__ = "hydra_plugins.losing"
sys.modules["hydra_plugins.losing"] = types.ModuleType("hydra_plugins.losing")
sys.modules["hydra_plugins.losing"].Losing = Losing
from hydra.core.plugins import Plugins
Plugins.instance().register(Losing)
'''


def losing(program: Program, mode: str) -> list[str]:
    app = program.folder / "app.py"
    app.write_text(app.read_text().replace("\nplugin.register()\n", "\nplugin.register()\nimport losing\n"))
    (program.folder / "losing.py").write_text(textwrap.dedent(LOSING))
    (program.folder / "mode.txt").write_text(mode)
    return ["hydra.launcher._target_=hydra_plugins.losing.Losing", *AT_ONCE]


def test_a_job_that_its_launcher_lost_is_launched_again(program: Program) -> None:
    program.sweep(*SPACE, *losing(program, "1"))
    check_study(program, 5)


def test_a_launcher_that_starts_nothing_stops_the_sweep_and_loses_no_trial(program: Program) -> None:
    words = [*SPACE, *losing(program, "always")]
    out = program.sweep(*words, code=1)
    assert "stopped: 3 times in a row no trial began: the launcher failed: ConnectionError" in out
    assert "planted-7" not in out
    assert program.calls == []
    (program.folder / "mode.txt").write_text("0")
    program.sweep(*words)
    check_study(program, 5)


# Devices


def record_devices(program: Program) -> None:
    """Let the program write down what it may see, and when it began and ended."""
    app = program.folder / "app.py"
    sleeping = "    time.sleep(config.seconds)\n"
    assert sleeping in app.read_text()
    recording = (
        f"    begin = time.time()\n{sleeping}"
        '    with open("devices.txt", "a") as file:\n'
        "        file.write(f\"{os.environ.get('CUDA_VISIBLE_DEVICES')} {begin} {time.time()}\\n\")\n"
    )
    app.write_text(app.read_text().replace(sleeping, recording))


def check_devices(program: Program, count: int) -> None:
    """Every trial saw one device, both were used, and no two trials had one device at the same time."""
    rows = [line.split() for line in (program.folder / "devices.txt").read_text().splitlines()]
    spans = [(device, float(begin), float(end)) for device, begin, end in rows]
    assert len(spans) == count
    assert {device for device, _, _ in spans} == {"GPU-a", "GPU-b"}
    for place, (device, begin, end) in enumerate(spans):
        for other, its_begin, its_end in spans[place + 1 :]:
            assert device != other or end <= its_begin or its_end <= begin


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["hydra.sweeper.n_jobs=2"], ["hydra.sweeper.n_jobs=3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]]
)
def test_trials_that_run_at_once_have_different_devices(
    program: Program, monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    """Also where a launcher has more processes than there are devices, which live on between their trials."""
    monkeypatch.setenv("MATHVERIFY_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv("MATHVERIFY_LEASES", str(program.folder / "leases"))
    record_devices(program)
    program.sweep(*SPACE, *how, "hydra.sweeper.n_trials=6", "seconds=0.4")
    check_study(program, 6)
    check_devices(program, 6)
