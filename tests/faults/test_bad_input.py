"""Bad input of every kind, by table: one line that names what, where and the remedy, exit code 2, nothing left behind.

The table is cases.py. All of it goes through the command's own main() in this process; the first case of each kind also
through a process of its own.
"""

from __future__ import annotations

import fcntl
import re
from pathlib import Path

import pytest

from mathverify.records import Status, read_record, write_record

from .cases import CASES, MY_MODEL, RANK, STUDY, TABLE, Case, make_base
from .conftest import TINY, Command, Ended, in_a_process


def holds(place: Path) -> dict[str, bytes]:
    """Every file (with its bytes) and empty folder of a place, but for the cache's whole folders and lock files."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if name.startswith("cache"):
            assert ".tmp" not in name, "a half-made folder in the cache"
        elif path.is_file():
            found[name] = b"" if path.name in (".lock", "study.journal.flock") else path.read_bytes()
            if path.name == "study.journal":  # asking for a study that exists is written down, and changes nothing
                found[name] = b"\n".join(line for line in found[name].splitlines() if b'"op_code":0' not in line)
        elif not any(path.iterdir()):
            found[name + "/"] = b""
    return found


def check(case: Case, ended: Ended) -> None:
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    line = ended.err.strip()
    assert line.startswith("error: ")
    assert line.isprintable()
    assert len(line) < 1000
    for part in case.says:
        assert re.search(part.removeprefix("re:"), line) if part.startswith("re:") else part in line, line


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(case: Case, command: Command, tmp_path: Path) -> None:
    case.make(tmp_path)
    if case.earlier is not None:
        assert command(*TINY, *case.earlier).code == 0
    before = holds(tmp_path)
    check(case, command(*TINY, *case.arguments))
    assert holds(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLE)
def test_in_a_process_of_its_own_it_is_the_same(kind: str, tmp_path: Path) -> None:
    case = next(case for case in TABLE[kind] if case.earlier is None)
    case.make(tmp_path)
    before = holds(tmp_path)
    check(case, in_a_process(*TINY, *case.arguments, cwd=tmp_path))
    assert holds(tmp_path) == before


def test_there_are_enough_cases_and_each_has_its_name() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 60


def test_any_letters_and_spaces_in_paths_are_no_bad_input(command: Command, tmp_path: Path) -> None:
    from tests.examples.files import make_rows, write

    place = tmp_path / "ein Ordner — 数据 (1), it's"
    place.mkdir()
    write(place / "meine Zeilen ü.csv", make_rows())
    escaped = lambda path: str(path).replace("'", r"\'")  # noqa: E731
    ended = command(
        *TINY, "data=table", f"data.train='{escaped(place / 'meine Zeilen ü.csv')}'",
        f"data.cache_dir='{escaped(place / 'ca che')}'", f"hydra.run.dir='{escaped(place / 'ein Lauf')}'",
        "data.train_rows=null", "data.validation_rows=null", "data.test_rows=null",
        "data.validation_fraction=0.2", "data.test_fraction=0.2",
    )  # fmt: skip
    assert ended.code == 0, ended.out + ended.err
    assert read_record(place / "ein Lauf").status is Status.completed


@pytest.mark.parametrize("ending", [".flock", ".lock"])
def test_a_study_that_another_process_holds_locked_is_told(
    ending: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*TINY, *STUDY, RANK, "train.max_steps=2").code == 0
    monkeypatch.setattr("mathverify.sweep.storage.LOCK_SECONDS", 0.2)
    name = next(p.name for p in (tmp_path / "multirun" / "s").iterdir() if p.name.endswith(ending))
    with (tmp_path / "multirun" / "s" / name).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ended = command(*TINY, *STUDY, RANK, "train.max_steps=2", "hydra.sweeper.n_trials=2")
    check(Case("locked", [], [name, "locked by another process", "end it"]), ended)


def test_a_journal_whose_very_first_line_was_cut_off_is_begun_anew(command: Command, tmp_path: Path) -> None:
    (tmp_path / "multirun" / "s").mkdir(parents=True)
    (tmp_path / "multirun" / "s" / "study.journal").write_text('{"op_code":0,"wor')
    assert command(*TINY, *STUDY, RANK).code == 0


def test_a_checkpoint_of_other_weights_is_refused_and_the_folder_kept(command: Command, tmp_path: Path) -> None:
    """The model folder's content was changed under a run that was cut short: same config, another base."""
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path)
    run = [*TINY, *MY_MODEL, "hydra.run.dir=run"]
    assert command(*run, "train.checkpoint_every=2").code == 0
    record = read_record(tmp_path / "run")
    record.status = Status.interrupted
    write_record(tmp_path / "run", record)
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    before = holds(tmp_path)
    ended = command(*run)
    check(
        Case("other weights", [], ["checkpoint/step-", "belongs to another run", "base differ", "another run folder"]),
        ended,
    )
    after = holds(tmp_path)
    assert {name: after[name] for name in before if ".hydra" not in name} == {
        name: data for name, data in before.items() if ".hydra" not in name
    }
