"""Where Hydra ends: command line -> composed config -> RunConfig, and errors as one line. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mathverify.config import RunConfig
from mathverify.engine.ranks import place
from mathverify.errors import CannotWrite, RunFailed, UserError
from mathverify.files import cannot_write, is_full, write_atomic
from mathverify.printable import printable

MOST_JOBS = 10_000
"""Of a grid: each is composed and checked before the first one starts."""

BAD_INPUT, FAILED = 2, 1
"""Exit codes: bad input of any kind; a run that failed by itself."""

TRIAL_VARIABLE = "MATHVERIFY_TRIAL"
"""'NUMBER:TOKEN' in hydra.job.env_set of a study's job: part of Hydra's own config, so of no run's fingerprint."""

NOT_A_SWEEP = (
    "torchrun shares one run out over GPUs, -m starts many runs: for a sweep start one worker a GPU instead, "
    "`python -m mathverify.train -m ...` with hydra.sweeper.n_jobs=N, or the same command N times"
)

_wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
"""As the user set it; `main` sets the variable for Hydra's sake."""


def config_dir() -> str:
    """The folder of conf/: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def register_schema() -> None:
    """Tell Hydra the types of every key, so that a typo or a wrong type is an error at composition; our sweeper too."""
    from mathverify.sweep import plugin

    ConfigStore.instance().store(name="schema", node=RunConfig)
    plugin.register()


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The RunConfig that these command-line overrides describe.

    Raises:
        UserError: an override does not parse, names an unknown key or choice, or gives an impossible value.
    """
    register_schema()
    try:
        with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
            return to_run_config(hydra.compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error


def to_run_config(composed: DictConfig) -> RunConfig:
    """Hydra's DictConfig -> RunConfig; the only place where the conversion happens.

    Raises:
        UserError: a value is missing or impossible.
    """
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    try:
        plain = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
        return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), plain)))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(one_line(error)) from error


class Preflight(Callback):
    """Checks a run's config and folder before Hydra writes there, so that bad input leaves nothing behind and a folder
    that holds another run keeps its own .hydra/."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises SystemExit, which, unlike an Exception, Hydra does not turn into a warning."""
        try:
            refuse_contradictions(_as_given(config))
            self._claim(Path(config.hydra.run.dir), to_run_config(config))
        except UserError as error:
            sys.exit(report(error))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The same for every job of a grid, before the first one starts; all that is wrong is told."""
        if place().size > 1:
            sys.exit(report(UserError(NOT_A_SWEEP)))
        if not str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
            return  # other sweepers make up their jobs as they go
        wrong = 0
        folders: list[Path] = []
        try:
            jobs = _grid(_as_given(config))
        except UserError as error:
            sys.exit(report(error))
        for number, overrides in enumerate(jobs):
            try:
                refuse_contradictions(overrides)
                folders.append(self._check_job(config, number, overrides))
            except (UserError, HydraException, OmegaConfBaseException) as error:
                wrong = report(UserError(f"job {number} ({' '.join(overrides)}): {one_line(error)}"))
        if not wrong and len(set(folders)) < len(folders):
            wrong = report(_shared_folder(folders))
        if wrong:
            sys.exit(wrong)
        _group(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra has written its files by now."""
        _redact_files(Path(config.hydra.runtime.output_dir) / str(config.hydra.output_subdir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The same for the file that Hydra's own sweeper writes."""
        _redact_files(Path(config.hydra.sweep.dir))

    def _check_job(self, config: DictConfig, number: int, overrides: Sequence[str]) -> Path:
        """Returns the job's folder."""
        job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
        with open_dict(job):
            job.hydra.job.num, job.hydra.job.id = number, str(number)
        folder: Path = Path(job.hydra.sweep.dir) / job.hydra.sweep.subdir
        self._claim(folder, to_run_config(job))
        return folder

    def _claim(self, folder: Path, config: RunConfig) -> None:
        from mathverify.records import check_writable, claim_run_folder

        if folder.exists():
            claim_run_folder(folder, config)
        else:
            check_writable(folder)


def _shared_folder(folders: Sequence[Path]) -> UserError:
    """What is wrong where jobs of a grid (their folders, in order) would get into each other's way."""
    counts = Counter(folders)
    first = next(folder for folder in folders if counts[folder] > 1)
    one, other = [number for number, folder in enumerate(folders) if folder == first][:2]
    return UserError(
        f"hydra.sweep.subdir: jobs {one} and {other} would share the folder {first}: leave it out, so that each has "
        "its number, or have it name all that differs, as in 'hydra.sweep.subdir=seed-${seed}'"
    )


def _as_given(config: DictConfig) -> list[str]:
    """The command line's overrides. Not resolved: one that holds an interpolation is text here, not a value."""
    return cast(list[str], OmegaConf.to_container(config.hydra.overrides.task, resolve=False))


def _redact_files(folder: Path) -> None:
    """Black out secrets in the config files that Hydra wrote; files without any are left alone."""
    from mathverify.records import redact

    for file in folder.glob("*.yaml"):
        text = file.read_text("utf-8")
        if (clean := str(redact(text))) != text:
            try:
                write_atomic(file, clean.encode())
            except CannotWrite:  # better no file than one with secrets
                file.unlink()


def _redact_logs() -> None:
    """Black out secrets in whatever is logged by whomever: Hydra's launchers log every job's overrides."""
    make = logging.getLogRecordFactory()
    if getattr(make, "is_ours", False):
        return

    def redacted(*arguments: Any, **named: Any) -> logging.LogRecord:
        from mathverify.records import redact

        record = make(*arguments, **named)
        with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit: logging tells that by itself
            lines = str(redact(record.getMessage())).split("\n")
            record.msg, record.args = "\n".join(map(printable, lines)), ()
        return record

    redacted.is_ours = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacted)


def _group(config: DictConfig) -> None:
    """Have the runs of a grid share a group in W&B, named after the grid's folder, unless another one is set."""
    if OmegaConf.get_type(config) is RunConfig and config.tracking.group is None:
        name = QuotedString("-".join(Path(config.hydra.sweep.dir).parts[-2:]), Quote.single).with_quotes()
        with open_dict(config):
            config.hydra.overrides.task.append(f"tracking.group={name}")


def _grid(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of Hydra's own grid: one list of overrides for each combination of choices, in its order.

    Raises:
        UserError: there are more than anybody means.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    axes = [
        [f"{one.get_key_element()}={value}" for value in itertools.islice(one.sweep_string_iterator(), MOST_JOBS + 1)]
        if one.is_sweep_override()
        else [str(one.input_line)]
        for one in parsed
        if not one.get_key_element().startswith("hydra.")
    ]
    if math.prod(map(len, axes)) > MOST_JOBS:
        raise UserError(
            f"{' '.join(overrides)}: is a grid of more than {MOST_JOBS:,} jobs: give fewer values, or sample them with "
            "hydra/sweeper=optuna"
        )
    return [list(combination) for combination in itertools.product(*axes)]


def refuse_contradictions(overrides: Sequence[str]) -> None:
    """Raise UserError when the command line itself sets two things of which only one can hold."""
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides if not override.endswith("=null")}
    if {"train.max_steps", "train.max_examples"} <= keys:
        raise UserError(
            "train.max_steps and train.max_examples are both given: the length of a run is one or the other, drop one"
        )


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Say what went wrong in a job in one line, and take back its folder if nothing was done in it.

    A single run ends here with its exit code. In a grid the error goes on to Hydra, which does the other jobs first; a
    study's trial says nothing, its study will. Raised as it is when HYDRA_FULL_ERROR=1 was asked for.
    """
    try:
        yield
    except (UserError, RunFailed) as error:
        if _wants_traceback:
            raise
        code = refuse(folder, error)
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        sys.exit(code)


def refuse(folder: Path, error: Exception, is_trial: bool | None = None) -> int:
    """Report the error of a job and take back its folder if nothing was done in it; returns the exit code for it.

    is_trial: of a study, which will say why the trial failed; unless given, whether this job is one.
    """
    if folder.is_dir():
        _take_back(folder)
    if trial_number() is not None if is_trial is None else is_trial:
        return _code_of(error)
    return report(error)


def _take_back(folder: Path) -> None:
    """Remove a run folder that holds nothing but what Hydra puts there, and parents that are empty then."""
    if any(item.name not in (".hydra", ".lock") for item in folder.iterdir()):
        return
    shutil.rmtree(folder)
    for parent in (
        folder.absolute().relative_to(Path.cwd()).parents if folder.absolute().is_relative_to(Path.cwd()) else ()
    ):
        if parent == Path() or any(parent.iterdir()):
            return
        parent.rmdir()


def run_folder() -> Path:
    """The folder Hydra made for this job."""
    return Path(HydraConfig.get().runtime.output_dir)


def trial_number() -> int | None:
    """The number of the trial that this job is; None for a job of no study."""
    mark = os.environ.get(TRIAL_VARIABLE)
    return None if mark is None else int(mark.partition(":")[0])


def main(task: Callable[[DictConfig], Any]) -> None:
    """Run a Hydra task from the command line; exit 2 with one line on bad input, 130 on Ctrl-C.

    With HYDRA_FULL_ERROR=1 in the environment every error is shown with its traceback instead.
    """
    register_schema()
    # Idle OpenMP threads spin for long by default, and as soon as anything else wants a core every small product waits
    # for the scheduler: beside 2 busy processes on 2 cores one took 22.8 ms, with a short spin 1.1 ms. Alone the short
    # spin costs nothing (5,886 against 5,784 tokens/s of the default run); none at all would (2,568).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return
    # Hydra prints and exits by itself on errors unless this is set; here the errors are wanted as exceptions.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        _check_flags(sys.argv[1:])
        _redact_logs()
        hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")(task)()
    except (UserError, RunFailed, HydraException, OmegaConfBaseException) as error:
        if _wants_traceback:
            raise
        sys.exit(report(error))
    except ValueError as error:
        if _wants_traceback or not _is_hydras(error):
            raise
        sys.exit(report(UserError(f"{one_line(error)}: see --help for what can be set")))
    except OSError as error:
        if _wants_traceback:
            raise
        if is_full(error):  # under files that Hydra writes, whose errors do not say which
            where = error.filename or "the run's folder (hydra.run.dir, hydra.sweep.dir)"
            sys.exit(report(cannot_write(where, error)))
        if error.filename is None:
            raise
        sys.exit(report(UserError(f"{error.filename}: {error.strerror}: use another folder or mend its permissions")))
    except KeyboardInterrupt:
        sys.exit(130)


def _check_flags(words: Sequence[str]) -> None:
    """Raise UserError where Hydra's own parser of flags would print its whole usage."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}: put flags such as -m before all overrides; --hydra-help lists them")

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(list(words))


def _is_hydras(error: BaseException) -> bool:
    """Whether an exception was raised within Hydra or OmegaConf, which use plain ValueErrors for some bad overrides."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in (
        "hydra",
        "omegaconf",
    )


def is_a_run(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for a run or runs, and not for --help, --cfg and the like; one with unknown flags
    does not."""
    try:
        with redirect_stderr(StringIO()):
            options = get_args_parser().parse_args(list(arguments))
    except SystemExit:
        return False
    return not (options.help or options.hydra_help or options.cfg or options.info or options.shell_completion)


_USAGE = """\
Fine-tune LoRA adapters on a frozen base to say whether an answer to a maths question is correct.

  python -m mathverify.train lora=r64                        one run
  python -m mathverify.train -m lora=r16,r64 seed=1,2        a grid of runs"""


def help_text() -> str:
    """What --help prints: every part of a run with its choices, in the words of their own files, and the defaults.

    Hydra's own --help lists names only, and takes longer than a second to do it; its flags are on --hydra-help.
    """
    lines = [_USAGE, "", "Choices (each is a file; pick one with part=choice):"]
    for part in [*(f.name for f in fields(RunConfig)), "experiment", "sweep"]:
        for file in sorted((Path(config_dir()) / part).glob("*.yaml"), key=lambda file: (len(file.stem), file.stem)):
            lines.append(f"  {f'{part}={file.stem}':34s} {_first_words(file)}")
    lines += ["", "Settings and their defaults (change one with part.setting=value):"]
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        lines.append(OmegaConf.to_yaml(hydra.compose("config")).rstrip())
    lines += ["", "More: --cfg job shows what a command line composes; --hydra-help lists Hydra's own flags."]
    return "\n".join(lines)


def _first_words(file: Path) -> str:
    """The first sentence of a config file's opening comment."""
    comments = [line.lstrip("# ").rstrip() for line in file.read_text("utf-8").splitlines() if line.startswith("#")]
    opening = " ".join(line for line in comments[:3] if not line.startswith("@package"))
    return re.split(r"(?<=[.:;]) ", opening, maxsplit=1)[0].rstrip(".:;")


def report(error: Exception) -> int:
    """Print the error's one line on stderr, once, without secrets; return the exit code for it."""
    if not getattr(error, "is_told", False):
        from mathverify.records import redact

        print(f"error: {printable(str(redact(one_line(error))))}", file=sys.stderr)
    return _code_of(told(error))


def told(error: Exception) -> Exception:
    """The same error; `report` does not say again what a user has been told."""
    error.is_told = True  # type: ignore[attr-defined]
    return error


def show_traceback(error: Exception) -> None:
    """Print it, without secrets, on stderr if the error is none that a user is meant to see as one line, or if
    HYDRA_FULL_ERROR=1 asks for it."""
    if (_wants_traceback or not isinstance(error, UserError | RunFailed)) and error.__traceback__ is not None:
        from mathverify.records import redact

        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)


def _code_of(error: Exception) -> int:
    return FAILED if isinstance(error, RunFailed) else BAD_INPUT


def one_line(error: BaseException) -> str:
    """The text of an error and of what caused it as a single line, with the allowed names where a name is unknown."""
    if isinstance(error, UserError | RunFailed):
        return _fold(str(error))
    key = getattr(error, "full_key", None) or _key_in(str(error))
    seen: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = _fold(_without_noise(str(cause)))
        if text and not any(text in earlier for earlier in seen):
            seen.append(text)
        cause = cause.__cause__
    line = ": ".join(seen)
    unknown, allowed = _names_beside(key) if "not in" in line else (key, None)
    return line + (f"; {unknown} is not a setting, use one of: {', '.join(allowed)}" if allowed else "")


def _fold(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _without_noise(text: str) -> str:
    """Drop the lines that OmegaConf and Hydra add for programmers."""
    keep = [
        line
        for line in text.splitlines()
        if not re.match(r"\s*(object_type|reference_type|full_key)\b|To append to your config use|Set the env", line)
    ]
    return "\n".join(keep)


def _key_in(text: str) -> str:
    found = re.search(r"Could not override '([^']+)'|full_key: (\S+)", text)
    return (found.group(1) or found.group(2)) if found else ""


def _names_beside(key: str) -> tuple[str, list[str] | None]:
    """The first part of `key` that is not a setting, and the settings that exist in its place, if any do."""
    owner: Any = RunConfig()
    parts = key.split(".")
    for depth, part in enumerate(parts):
        names = [f.name for f in fields(owner)] if is_dataclass(owner) else None
        if names is None or part not in names:
            return ".".join(parts[: depth + 1]), names
        owner = getattr(owner, part)
    return key, None
