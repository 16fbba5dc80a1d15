"""`python -m mathverify.compare` as a user meets it: what it prints, writes and refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mathverify.compare.__main__ import main
from mathverify.compare.table import _latex, _markdown, _unarmed
from mathverify.config import TrackingConfig
from mathverify.records import Status
from tests.test_records import json_trees

from .conftest import Make, TestRows, config_of

ROOT = Path(__file__).parents[2]


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in this process, on a terminal of so many columns."""

    def run(*arguments: str, columns: int = 200) -> Done:
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            code = main(arguments)
        except SystemExit as end:
            code = int(str(end.code))
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def python(*arguments: str, columns: int = 200) -> subprocess.CompletedProcess[str]:
    """The same as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def sweep(make: Make, tmp_path: Path) -> Path:
    """Two ranks with three seeds each, and one of every kind of trouble."""
    rows, rng = TestRows(300, 200), np.random.default_rng(0)
    for rank in (16, 64):
        for seed in (1, 2, 3):
            make(
                f"sweep/{rank}-{seed}", config_of(rank=rank, seed=seed), rows, right=rng.random(300) < 0.6 + rank / 300
            )
    make("sweep/bad", config_of(seed=9), rows, status=Status.failed, reason="loss is not finite at step 3")
    make("sweep/dead", config_of(seed=8), rows, status=Status.running)
    (tmp_path / "sweep/torn").mkdir()
    (tmp_path / "sweep/torn/result.json").write_text('{"na')
    return tmp_path / "sweep"


@pytest.mark.parametrize("columns", [80, 200])
def test_it_is_readable_at_any_width(command: Command, sweep: Path, columns: int) -> None:
    done = command(str(sweep), columns=columns)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    text = " ".join(done.stdout.split())
    for word in (
        "rank",
        "alpha",
        "seed",
        "accuracy",
        "AUROC",
        "Brier",
        "examples",
        "seconds",
        "tokens/s",
        "memory",
        "state",
    ):
        assert word in text
    assert "loss is not finite at step 3" in text and "torn" in text and "killed dead: its process is gone" in text
    assert re.search(r"\d\d\.\d% \[\d\d\.\d%, \d\d\.\d%\]", text)
    assert "winner: rank=64 alpha=64" in text


def test_as_a_program_it_ends_with_the_same_codes_and_streams(sweep: Path) -> None:
    done = python("-m", "mathverify.compare", str(sweep), columns=80)
    assert done.returncode == 0 and done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80 and "winner: rank=64 alpha=64" in done.stdout
    refused = python("-m", "mathverify.compare", "nowhere")
    assert refused.returncode == 2 and refused.stdout == "" and len(refused.stderr.splitlines()) == 1


def test_the_best_run_comes_first(command: Command, sweep: Path) -> None:
    shown = command(str(sweep)).stdout
    runs = shown[shown.index("runs (") :]
    accuracies = [float(x) for x in re.findall(r"(\d\d\.\d)% \[", runs.partition("\n\n")[0])]
    assert len(accuracies) == 6 and accuracies == sorted(accuracies, reverse=True)


def test_long_tables_are_cut_and_say_so(command: Command, sweep: Path) -> None:
    assert "... and 5 more (--limit 0 shows all" in command(str(sweep), "--limit", "4").stdout
    assert "more (--limit 0" not in command(str(sweep), "--limit", "0").stdout


def test_csv_holds_every_run_in_full(sweep: Path, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "out.csv"
    assert main([str(sweep), "--table", str(path)]) == 0
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert len(rows) == 9
    best = json.loads((sweep / rows[0]["run"] / "result.json").read_text())
    assert float(rows[0]["accuracy"]) == best["metrics"]["test"]["accuracy"]["value"]
    assert float(rows[0]["auroc_low"]) == best["metrics"]["test"]["auroc"]["low"]
    assert rows[0]["lora.rank"] == "64" and rows[0]["standing"] == "chosen"
    assert {row["standing"] for row in rows if row["lora.rank"] == "16" and row["state"] == "completed"} == {"worse"}
    assert {row["state"] for row in rows} == {"completed", "failed", "killed", "unreadable"}
    assert next(row for row in rows if row["state"] == "failed")["reason"] == "loss is not finite at step 3"


HOSTILE = "=cmd|'/c calc'!A0 <script>alert(1)</script> \\write18{rm} \x1b]0;owned\x07 a|b_c & 100% $x$ #1 ~^{}\u202e"


def test_hostile_names_are_harmless_everywhere(command: Command, make: Make, tmp_path: Path) -> None:
    for number, name in enumerate((HOSTILE, "plain")):
        make(f"runs/{number}", config_of(seed=number, tracking=TrackingConfig(name=name, group=HOSTILE)))
    folder = tmp_path / "runs" / "0"
    folder.rename(tmp_path / "runs" / "=1+1|_x [red]bold \x1b[31m")
    paths = [tmp_path / f"out.{end}" for end in ("csv", "md", "tex")]
    done = command(str(tmp_path / "runs"), *(word for path in paths for word in ("--table", str(path))))
    assert done.returncode == 0, done.stderr
    texts = [done.stdout, *(path.read_text() for path in paths)]
    for text in texts:
        assert not {c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"}
    assert "[red]bold" in texts[0]  # shown as it is, not obeyed
    rows = list(csv.reader(io.StringIO(texts[1])))
    assert not any(cell[:1] in "=+-@" and not re.fullmatch(r"-?[\d.e-]+", cell) for row in rows for cell in row if cell)
    for line in texts[2].splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) - 1 in (8, 10, 11, 12)
    bare = re.sub(
        r"\\textbackslash\{\}|\\[&%#_{}$]|\\hline|\\tabularnewline|\\(begin|end)\{tabular\}(\{\w+\})?|\{\[\}|\{\]\}",
        "",
        texts[3],
    )
    body = "\n".join(line for line in bare.splitlines() if not line.startswith("%"))
    assert "$x" not in body and "#" not in body and "_" not in body and "%" not in body


@given(st.text(max_size=40))
def test_escapes_leave_nothing_that_is_obeyed(text: str) -> None:
    markdown = _markdown(text)
    assert not re.search(r"(?<!\\)(\\\\)*[|*`_]", markdown.replace("\\\\", "")) or "\\" in markdown
    assert "<" not in markdown
    latex = _latex(text)
    assert not re.search(r"(?<!\\)[%#&_$]", latex)
    assert not str(_unarmed(text)).startswith(("=", "+", "-", "@", "\t", "\r"))


def test_other_confidences_are_measured_again(sweep: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    main([str(sweep / "16-1"), str(sweep / "64-1"), "--table", str(paths[0])])
    main([str(sweep / "16-1"), str(sweep / "64-1"), "--table", str(paths[1]), "--confidence", "0.8"])
    wide, narrow = (next(csv.DictReader(io.StringIO(path.read_text()))) for path in paths)
    for name in ("accuracy", "auroc", "brier", "difference"):
        if wide[name]:
            widths = [float(row[f"{name}_high"]) - float(row[f"{name}_low"]) for row in (wide, narrow)]
            assert widths[1] < widths[0]
            assert wide[name] == narrow[name]


@pytest.mark.slow
def test_report_and_figures_are_written_with_what_the_terminal_says(
    command: Command, sweep: Path, tmp_path: Path
) -> None:
    page, folder = tmp_path / "new" / "report.html", tmp_path / "figures"
    done = command(str(sweep), "--report", str(page), "--figures", str(folder))
    assert done.returncode == 0, done.stderr
    assert "Winner: rank=64 alpha=64" in page.read_text()
    assert {path.suffix for path in folder.iterdir()} == {".svg", ".png", ".md"}


def test_without_its_packages_a_report_is_refused_at_once(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(sweep), "--report", "report.html"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "--report needs altair and vl-convert-python" in said.err and "pip install 'mathverify[report]'" in said.err


def test_the_terminal_needs_none_of_the_reports_packages(sweep: Path) -> None:
    """In a process that cannot import them, the comparison is printed all the same."""
    without = (
        "import sys; sys.modules.update(dict.fromkeys(('altair', 'vl_convert', 'jinja2', 'matplotlib')));"
        "from mathverify.compare.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", without, str(sweep)], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "winner: rank=64" in done.stdout


@pytest.mark.slow
def test_a_report_lies_in_the_sweep_unless_it_is_told_where(command: Command, sweep: Path) -> None:
    assert command(str(sweep), "--report").returncode == 0
    assert (sweep / "report.html").is_file()
    assert command(str(sweep)).returncode == 0  # and is no run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["EMPTY"], "holds no run"),
        (["MISSING"], "no such folder"),
        (["SWEEP", "--table", "x.xlsx"], r"--table x\.xlsx.*\.csv, \.md, \.tex"),
        (["SWEEP", "--baseline", "nobody"], "nobody: is none of the runs"),
        (["SWEEP", "--baseline", "bad"], "is failed: choose a run that was completed"),
        (["SWEEP", "--confidence", "95"], r"--confidence 95\.0 is not possible"),
        (["SWEEP", "--resamples", "3"], "--resamples 3 is not possible"),
        (["SWEEP", "--limit", "-1"], "below 0"),
        (["SWEEP", "--limit", "many"], "invalid int value"),
        (["postgresql://u:hunter2@127.0.0.1:1/none"], "cannot be read as a study"),
        (["nosuch://u:hunter2@host/x"], "cannot be read as a study"),
        (["journal://SWEEP/16-1/result.json"], "cannot be read as a study"),
        (["sqlite:///SWEEP/16-1/result.json"], "cannot be read as a study"),
        (["SWEEP", "--table", "/proc/nowhere/x.csv"], "cannot be written"),
        (["SWEEP", "--table", "SWEEP/16-1/result.json/x.csv"], "cannot be written"),
        ([], "required: PLACE"),
        (["--report", "SWEEP"], "ends in .html"),
        (["SWEEP", "--report", "page.pdf"], "ends in .html"),
        (["SWEEP", "--report", "SWEEP/torn/result.json/page.html"], "cannot be (made|written)"),
        (["SWEEP", "--figures", "SWEEP/torn/result.json"], "is a file: give a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    command: Command, sweep: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "MISSING": str(tmp_path / "missing"), "SWEEP": str(sweep)}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = command(*(places.get(word, word.replace("SWEEP", str(sweep))) for word in arguments))
    assert done.returncode == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (line,) = done.stderr.splitlines()
    assert re.search(says, line) and line.startswith("error: ")
    assert "hunter2" not in done.stderr and "Traceback" not in done.stderr


def test_a_bad_place_beside_a_good_one_is_told_and_passed_over(command: Command, sweep: Path, tmp_path: Path) -> None:
    done = command(str(tmp_path / "missing"), str(sweep / "16-1"))
    assert done.returncode == 0
    assert "not read: " in done.stdout and "no such folder" in done.stdout
    assert "runs (300 rows of" in done.stdout


def test_it_reads_a_studys_journal_by_url(command: Command, make: Make, tmp_path: Path) -> None:
    """Trials with a folder come from it; one whose folder is gone is shown as the study knows it."""
    import optuna

    from mathverify.sweep.storage import open_storage

    folder = tmp_path / "study"
    study = optuna.create_study(storage=open_storage(None, folder), study_name="ranks", direction="maximize")
    study.set_user_attr("mathverify", {"folder": str(folder)})
    for number, rank in enumerate((16, 64)):
        trial = study.ask({"lora.rank": optuna.distributions.CategoricalDistribution([16, 64])})
        make(f"study/{number}", config_of(rank=rank))
        study.tell(trial, 0.8)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    before = (folder / "study.journal").read_bytes()
    done = command(f"journal://{folder}/study.journal#ranks")
    assert done.returncode == 0, done.stderr
    assert "failed 2" in done.stdout and done.stdout.count("completed") == 2
    assert (folder / "study.journal").read_bytes() == before
    wrong = command(f"journal://{folder}/study.journal#other")
    assert wrong.returncode == 2 and "no study other" in wrong.stderr and "'ranks'" in wrong.stderr


WHOLE: dict[str, object] = {}


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_record_with_any_field_replaced_stops_nobody(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    """Every comparison ends with its tables and without a traceback, whatever one of the records says."""
    if not (tmp_path / "runs").exists():
        make("runs/good", config_of(rank=64))
        WHOLE.update(json.loads((make("runs/odd", config_of(rank=16)) / "result.json").read_text()))
    plain = json.loads(json.dumps(WHOLE))
    place = plain
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [key for key, value in place.items() if isinstance(value, dict) and value]
        if not inner:
            break
        place = place[data.draw(st.sampled_from(inner))]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_trees)
    (tmp_path / "runs/odd/result.json").write_text(json.dumps(plain))
    assert main([str(tmp_path / "runs"), "--resamples", "100", "--table", str(tmp_path / "x.csv")]) == 0
    assert "good" in capsys.readouterr().out


def test_comparing_imports_neither_torch_nor_optuna(sweep: Path) -> None:
    code = f"""
import sys
from mathverify.compare.__main__ import main
assert main([{str(sweep)!r}]) == 0
print("heavy:", sorted({{"torch", "transformers", "optuna", "wandb", "sklearn", "pandas"}} & set(sys.modules)))
"""
    done = python("-c", code)
    assert "heavy: []" in done.stdout, done.stderr


def test_help_imports_only_what_it_needs() -> None:
    code = """
import sys
from mathverify.compare.__main__ import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print("heavy:", sorted({"numpy", "torch", "rich", "pyarrow", "scipy"} & set(sys.modules)))
"""
    done = python("-c", code)
    assert "heavy: []" in done.stdout, done.stderr
    assert "--baseline RUN" in done.stdout
