"""What Hydra sees: `hydra/sweeper=optuna` with its sampler and pruner groups, and `hydra/launcher=pack`.

Imports neither Optuna nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.plugin import Plugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig

# Hydra accepts plugins only from the package hydra_plugins. This is the name of hydra-optuna-sweeper's class, so that
# a config that spells its `_target_` out works too; nothing of that package is needed or imported.
TARGET = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
PACK_TARGET = "hydra_plugins.mathverify.PackLauncher"


@dataclass
class SweeperConf:
    """The keys of hydra.sweeper. The first ten are hydra-optuna-sweeper's; what they mean is in settings.py."""

    _target_: str = TARGET
    _recursive_: bool = False  # samplers are made anew for every trial (samplers.py), from their config
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "none"}])
    sampler: Any = MISSING
    direction: Any = None
    storage: Any = None
    study_name: str | None = None
    n_trials: int | None = 20
    n_jobs: int = 1
    max_failure_rate: float = 1.0
    search_space: Any = None
    params: Any = None
    custom_search_space: str | None = None
    pruner: Any = MISSING
    objective: Any = None
    report: str = "validation/accuracy"
    duplicates: str = "ask_again"
    stop_after_same_failures: int = 3
    max_attempts: int = 10
    dead_after: float = 60.0
    lease_devices: bool = True
    dry_run: bool = False


@dataclass
class PackLauncherConf:
    """The keys of hydra.launcher. max_trials: runs that train at once; null: for a study its n_jobs, for a grid 8 on a
    CPU and on a GPU as many as its memory allows, which also bounds the others."""

    _target_: str = PACK_TARGET
    max_trials: int | None = None


SAMPLERS: dict[str, dict[str, Any]] = {
    "tpe": {
        "_target_": "optuna.samplers.TPESampler",
        "seed": None,
        "consider_prior": None,
        "prior_weight": None,
        "consider_magic_clip": None,
        "consider_endpoints": None,
        "n_startup_trials": 10,
        "n_ei_candidates": 24,
        "multivariate": None,
        "group": None,
        "constant_liar": None,
        "warn_independent_sampling": None,
    },
    "random": {"_target_": "optuna.samplers.RandomSampler", "seed": None},
    "grid": {"_target_": "optuna.samplers.GridSampler", "seed": None},
    "cmaes": {
        "_target_": "optuna.samplers.CmaEsSampler",
        "seed": None,
        "x0": None,
        "sigma0": None,
        "n_startup_trials": None,
        "independent_sampler": None,
        "warn_independent_sampling": None,
        "consider_pruned_trials": None,
        "restart_strategy": None,
        "inc_popsize": None,
        "use_separable_cma": None,
        "source_trials": None,
    },
    "nsgaii": {
        "_target_": "optuna.samplers.NSGAIISampler",
        "seed": None,
        "population_size": 50,
        "mutation_prob": None,
        "crossover_prob": 0.9,
        "swapping_prob": 0.5,
        "constraints_func": None,
    },
    "motpe": {  # removed from Optuna: TPE itself takes several objectives
        "_target_": "optuna.samplers.TPESampler",
        "seed": None,
        "consider_prior": None,
        "prior_weight": None,
        "consider_magic_clip": None,
        "consider_endpoints": None,
        "n_startup_trials": 10,
        "n_ehvi_candidates": None,
    },
    "gp": {
        "_target_": "optuna.samplers.GPSampler",
        "seed": None,
        "n_startup_trials": 10,
        "deterministic_objective": None,
    },
    "qmc": {
        "_target_": "optuna.samplers.QMCSampler",
        "seed": None,
        "qmc_type": "sobol",
        "scramble": None,
        "warn_asynchronous_seeding": None,
        "warn_independent_sampling": None,
    },
}
"""Group hydra/sweeper/sampler. A null leaves a key to Optuna's default."""

PRUNERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "median": {
        "_target_": "optuna.pruners.MedianPruner",
        "n_startup_trials": 5,
        "n_warmup_steps": 0,
        "interval_steps": 1,
        "n_min_trials": 1,
    },
    "hyperband": {
        "_target_": "optuna.pruners.HyperbandPruner",
        "min_resource": 1,
        "max_resource": "auto",
        "reduction_factor": 3,
        "bootstrap_count": 0,
    },
    "asha": {
        "_target_": "optuna.pruners.SuccessiveHalvingPruner",
        "min_resource": "auto",
        "reduction_factor": 4,
        "min_early_stopping_rate": 0,
        "bootstrap_count": 0,
    },
    "patient": {
        "_target_": "optuna.pruners.PatientPruner",
        "wrapped_pruner": {"_target_": "optuna.pruners.MedianPruner"},
        "patience": 2,
        "min_delta": 0.0,
    },
    "wilcoxon": {"_target_": "optuna.pruners.WilcoxonPruner", "p_threshold": 0.1, "n_startup_steps": 2},
}
"""Group hydra/sweeper/pruner."""


class OptunaSweeper(Sweeper):
    """Hydra's door to a study; the work is in sweeper.py."""

    def __init__(self, **keys: Any) -> None:
        self.keys = keys

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the study to the end of its budget.

        Raises:
            UserError: settings, space or study that cannot work.
            SystemExit: not everything went well; the code tells what (sweeper.py).
        """
        from mathverify.sweep.sweeper import sweep

        assert self.hydra_context is not None
        assert self.config is not None

        return sweep(self.keys, self.hydra_context, self.task_function, self.config, arguments)


class PackLauncher(Launcher):
    """Hydra's door to packs; the work is in pack_launcher.py. Takes jobs as a batch (Hydra's way) or as a stream."""

    def __init__(self, max_trials: int | None = None) -> None:
        self.max_trials = max_trials

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises UserError for a setting that cannot work, or a task that is not mathverify.train's."""
        from mathverify.sweep.pack_launcher import require_possible

        require_possible(self.max_trials, task_function, config)
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run these jobs, those that share a base at once.

        Raises:
            SystemExit: with code 130 after a signal; what was done is saved.
        """
        from mathverify.sweep.pack_launcher import launch

        return launch(job_overrides, initial_job_idx, self.max_trials, self.context, self.config)

    def stream(self, take: Callable[[], Any], settle: Callable[[Any, str | None], None]) -> None:
        """Run jobs as they come (sweeper.StreamingLauncher).

        Raises:
            SystemExit: with code 130 after a signal; what was done is saved.
        """
        from mathverify.sweep.pack_launcher import stream

        stream(take, settle, self.max_trials, self.context, self.config)


def _place_under_hydra_plugins(target: str, plugin: type[Plugin]) -> None:
    """Make `target` importable as a name of `plugin`; modules that exist are kept."""
    plugin.__module__ = target.rpartition(".")[0]
    above: ModuleType | None = None
    path = ""
    for part in target.split(".")[:-1]:
        path = f"{path}.{part}" if path else part
        try:
            module = import_module(path)
        except ModuleNotFoundError:
            module = sys.modules[path] = ModuleType(path)
            module.__path__ = []
        if above is not None:
            setattr(above, part, module)
        above = module
    assert above is not None
    setattr(above, plugin.__name__, plugin)


def register() -> None:
    """Make `hydra/sweeper=optuna` and `hydra/launcher=pack` known to Hydra; harmless when repeated."""
    for target, plugin in ((TARGET, OptunaSweeper), (PACK_TARGET, PackLauncher)):
        _place_under_hydra_plugins(target, plugin)
        Plugins.instance().register(plugin)
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="pack", node=PackLauncherConf, provider="mathverify")
    store.store(group="hydra/sweeper", name="optuna", node=SweeperConf, provider="mathverify")
    for name, node in SAMPLERS.items():
        store.store(group="hydra/sweeper/sampler", name=name, node=node, provider="mathverify")
    for name, pruner in PRUNERS.items():
        store.store(group="hydra/sweeper/pruner", name=name, node=pruner or {"_target_": None}, provider="mathverify")
