"""Nobody is let in: nothing that came from outside is unpickled, evaluated or instantiated, no secret is written, no text
steers a terminal, and files are as open as the user's umask says.
"""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.files import make_rows, write

from .conftest import TINY, Command, in_a_process
from .kills import SPACE, STUDY

PACKAGE = Path(__file__).parents[2] / "mathverify"
SOURCES = sorted(PACKAGE.rglob("*.py"))


# What the code itself may not do


def _calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, ast.expr], int]]:
    """(dotted name as written, keyword arguments, line) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: k.value for k in node.keywords if k.arg}, node.lineno


def _is(value: ast.expr | None, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


def forbidden(source: str) -> list[str]:
    """What a source does that would let data become code; 'LINE: what'."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        for name in [*names, module]:
            if name.partition(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"):
                found.append(f"{node.lineno}: imports {name}")  # type: ignore[attr-defined]
    for name, keywords, line in _calls(tree):
        last = name.rpartition(".")[2]
        if name in ("eval", "exec", "compile", "os.system", "os.popen"):
            found.append(f"{line}: calls {name}")
        if name == "torch.load" and not _is(keywords.get("weights_only"), True):
            found.append(f"{line}: torch.load without weights_only=True")
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(f"{line}: calls {name}")
        if "shell" in keywords and not _is(keywords["shell"], False):
            found.append(f"{line}: {name} through a shell")
        if "trust_remote_code" in keywords and not _is(keywords["trust_remote_code"], False):
            found.append(f"{line}: {name} trusts remote code")
        if name.startswith("Auto") and last == "from_pretrained" and not _is(keywords.get("trust_remote_code"), False):
            found.append(f"{line}: {name} without trust_remote_code=False")
        if name == "np.load" and not _is(keywords.get("allow_pickle"), False):
            found.append(f"{line}: np.load without allow_pickle=False")
        if last == "register_new_resolver":
            found.append(f"{line}: a resolver of its own")
        escapes = _is(keywords.get("autoescape"), True)
        if last == "Template" or (last == "Environment" and "jinja" in name and not escapes):
            found.append(f"{line}: a template engine, which may not escape: {name}")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=[str(file.relative_to(PACKAGE)) for file in SOURCES])
def test_no_data_becomes_code(file: Path) -> None:
    assert forbidden(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "eval(x)", "torch.load(f)", "torch.load(f, weights_only=False)",
     "yaml.load(f)", "subprocess.run(x, shell=True)", "AutoModel.from_pretrained(x)", "f(trust_remote_code=flag)", "np.load(f)"],
)  # fmt: skip
def test_the_search_finds_what_it_is_to_find(source: str) -> None:
    assert len(forbidden(source)) == 1


# What a config may do


def test_hydras_documented_resolvers_work_and_no_other(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from mathverify.entry import compose
    from mathverify.errors import UserError

    monkeypatch.setenv("MY_RANK", "8")
    assert compose(["lora.rank=${oc.env:MY_RANK}"]).lora.rank == 8
    assert compose(["lora.rank=${oc.decode:'[3]'}", "lora.rank=${oc.select:nosuch,5}"]).lora.rank == 5
    for text in ("${eval:'1+1'}", "${python:1}", "${oc.exec:ls}"):
        with pytest.raises(UserError, match="Unsupported interpolation type"):
            compose([f"lora.rank={text}"])


EVIL = ["os.system", "subprocess.Popen", "builtins.eval", "pathlib.Path", "optuna.create_study"]


@pytest.mark.parametrize("target", EVIL)
@pytest.mark.parametrize("key", ["sampler", "pruner", "pruner.wrapped_pruner", "storage"])
def test_only_parts_of_optunas_kinds_are_made_from_a_config(
    key: str, target: str, command: Command, tmp_path: Path
) -> None:
    outer = ["hydra/sweeper/pruner=patient"] if "wrapped" in key else []
    made = f"{{_target_:{target},args:[touch,owned]}}" if key == "storage" else None
    word = f"hydra.sweeper.storage={made}" if made else f"hydra.sweeper.{key}._target_={target}"
    ended = command(*STUDY, *TINY, *SPACE, *outer, word)
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert target in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["lora", "model", "data", "train", "tracking"])
def test_no_part_of_a_run_is_instantiated(place: str, command: Command) -> None:
    ended = command(*TINY, f"+{place}._target_=os.system")
    assert ended.code == 2
    assert "_target_" in ended.err


def test_a_sampler_of_the_users_own_is_allowed(command: Command) -> None:
    ended = command(
        *STUDY, *TINY, *SPACE, "hydra.sweeper.dry_run=true", f"hydra.sweeper.sampler._target_={__name__}.Mine"
    )
    assert ended.code == 0, ended
    assert "Mine" in ended.out


def __getattr__(name: str) -> object:
    """Optuna is not imported for the tests above."""
    if name != "Mine":
        raise AttributeError(name)
    from optuna.samplers import RandomSampler

    return type("Mine", (RandomSampler,), {})


# Terminals

STEERING = "\x1b[2J\x1b]0;owned\x07\u202e\x9b31m"


def _controls(text: str) -> set[str]:
    import unicodedata

    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"}


def test_dataset_text_does_not_steer_the_terminal(command: Command, tmp_path: Path) -> None:
    rows = [
        row | {"question": row["question"] + STEERING, "id": f"{STEERING}{i}", f"kind{STEERING}": STEERING + str(i % 2)}
        for i, row in enumerate(make_rows())
    ]
    rows[7]["answer"] = None  # so that the report has something to name
    write(tmp_path / "rows.jsonl", rows)
    split = ["data.validation_fraction=0.2", "data.test_fraction=0.2"]
    limits = ["data.train_rows=null", "data.validation_rows=null", "data.test_rows=null"]
    column = f"data.slice_column='kind{STEERING}'"
    ended = command(*TINY, "data=table", "data.train=rows.jsonl", *split, *limits, column, "lora=r4")
    assert ended.code == 0, ended
    assert _controls(ended.out + ended.err) == set()


def test_overrides_and_errors_do_not_steer_the_terminal(command: Command) -> None:
    for word in (f"lora='{STEERING}'", f"+x='{STEERING}'", f"device='{STEERING}'", f"experiment='{STEERING}'"):
        ended = command(*TINY, word)
        assert ended.code == 2
        assert _controls(ended.out + ended.err) == set(), word
    ended = command(*STUDY, *TINY, f"tracking.name=choice('{STEERING}')", "hydra.sweeper.dry_run=true")
    assert _controls(ended.out + ended.err) == set()


# Secrets

SECRETS = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted0123",
    "WANDB_API_KEY": "planted-wandb-key-0123456789012345678901",
    "DATABASE_PASSWORD": "planted-database-password",
}
URL = "sqlite:///{}/study.db?password=planted-query-word"
PLANTED = [*SECRETS.values(), "planted-query-word", "planted-in-url"]


def _leaks(place: Path, said: str) -> list[str]:
    leaks = [f"screen: {secret}" for secret in PLANTED if secret in said]
    for file in place.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            leaks += [f"{file.relative_to(place)}: {secret}" for secret in PLANTED if secret.encode() in content]
    return leaks


def _words() -> list[str]:
    """Overrides that hold secrets, as users write them in a hurry."""
    return [
        f"tracking.name={SECRETS['HF_TOKEN']}",
        f"tracking.tags=[{SECRETS['DATABASE_PASSWORD']}]",
        "tracking.group='https://me:planted-in-url@host/x'",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "grid", "grid as a pack", "study", "study as a pack", "failing run"])
def test_no_secret_is_written_or_shown(kind: str, tmp_path: Path) -> None:
    more = {
        "run": ["tracking=wandb", "tracking.mode=offline"],
        "grid": ["-m", "seed=1,2"],
        "grid as a pack": ["-m", "seed=1,2", "hydra/launcher=pack"],
        "study": [*STUDY, *SPACE, "hydra.sweeper.n_trials=1"],
        "study as a pack": [*STUDY, *SPACE, "hydra.sweeper.n_trials=1", "hydra/launcher=pack"],
        "failing run": [f"model.path=https://me:planted-in-url@127.0.0.1:9/{SECRETS['HF_TOKEN']}"],
    }[kind]
    # A study keeps the overrides of a trial, which are what makes it again: there, secrets come from the environment.
    words = ["tracking.name=${oc.env:HF_TOKEN}", "tracking.tags=[${oc.env:DATABASE_PASSWORD}]"]
    ended = in_a_process(*TINY, *(words if "study" in kind else _words()), *more, cwd=tmp_path, **SECRETS)
    assert ended.code == (2 if kind == "failing run" else 0), ended
    assert _leaks(tmp_path, ended.out + ended.err) == []


def test_a_password_in_a_storage_url_is_neither_written_nor_shown(tmp_path: Path) -> None:
    storage = "hydra.sweeper.storage='postgresql://me:planted-in-url@127.0.0.1:1/s?password=planted-query-word'"
    ended = in_a_process(*STUDY, *TINY, *SPACE, storage, cwd=tmp_path)
    assert ended.code == 2, ended
    assert _leaks(tmp_path, ended.out + ended.err) == []


# Permissions


@pytest.mark.parametrize("kind", ["run", "study"])
def test_files_have_the_users_umask(kind: str, command: Command, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        more = [*STUDY, *SPACE, "hydra.sweeper.n_trials=1"] if kind == "study" else []
        ended = command(*TINY, "train.checkpoint_every=2", *more)
    finally:
        os.umask(before)
    assert ended.code == 0, ended
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert any(path.suffix == ".safetensors" for path in modes)
    for path, mode in modes.items():
        assert mode == (0o750 if (tmp_path / path).is_dir() else 0o640), f"{path}: {mode:o}"
