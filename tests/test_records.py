"""What a run leaves behind: whole files, readable records, one run per folder, and no secrets."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mathverify.config import (
    LoraConfig,
    RunConfig,
    TrackingConfig,
    TrackingKind,
    TrainConfig,
    from_plain,
    to_plain,
)
from mathverify.errors import UserError
from mathverify.records import (
    REDACTED,
    Costs,
    FolderState,
    Predictions,
    RunMetrics,
    RunRecord,
    Status,
    claim_run_folder,
    fingerprint,
    provenance,
    read_json,
    read_predictions,
    read_record,
    redact,
    write_json,
    write_predictions,
    write_record,
)
from mathverify.scoring import measure

ROOT = Path(__file__).resolve().parents[1]


def finished_record(config: RunConfig) -> RunRecord:
    metrics = measure([1.0, -1.0, 2.0], [True, False, True], ["a", "b", "b"], resamples=100)
    record = RunRecord.begin(config)
    record.status, record.finished = Status.completed, "2026-11-23T09:00:00+00:00"
    record.metrics = RunMetrics(test=metrics, slices={"sums": metrics}, threshold=-0.25)
    record.costs = Costs(seconds={"train": 1.5}, tokens=10, optimizer_steps=3, examples_seen=48)
    return record


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record = finished_record(RunConfig())
    write_record(tmp_path, record)
    again = read_record(tmp_path)
    assert again == record
    assert from_plain(again.config) == RunConfig()
    one_class = measure([1.0], [True], ["a"], resamples=100)  # null metrics survive too
    record.metrics.validation = one_class
    write_record(tmp_path, record)
    assert read_record(tmp_path).metrics.validation == one_class


def test_a_record_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    plain = finished_record(RunConfig()).to_plain() | {"schema_version": 99}
    (tmp_path / "result.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"schema 99.*update"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b'{"name": NaN}', b"[" * 5000, b'{"seed": 1e999}',
     b'{"name": "' + b"1" * 10_000, b'{"schema_version": 1, "status": "sleeping"}', b"\x00" * 100],
)  # fmt: skip
def test_a_torn_or_foreign_result_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_record(tmp_path)
    assert "result.json" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_every_cut_of_a_real_record_is_refused(tmp_path: Path) -> None:
    whole = write_record(tmp_path, finished_record(RunConfig())).read_bytes().rstrip()
    for length in range(0, len(whole), 97):
        (tmp_path / "result.json").write_bytes(whole[:length])
        with pytest.raises(UserError, match="torn"):
            read_record(tmp_path)


json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


WHOLE = finished_record(RunConfig()).to_plain()


@given(st.sampled_from(sorted(WHOLE)), json_trees)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_record_with_any_field_replaced_reads_or_says_why(tmp_path: Path, key: str, value: object) -> None:
    plain = WHOLE | {key: value}
    (tmp_path / "result.json").write_text(json.dumps(plain))
    said = ""
    try:
        assert isinstance(read_record(tmp_path), RunRecord)
    except UserError as error:
        said = str(error)
    assert "\n" not in said and (not said or "result.json" in said)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_read_as_json_or_say_why(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    said = "x.json"
    try:
        read_json(tmp_path / "x.json")
    except UserError as error:
        said = str(error)
    assert "x.json" in said and "\n" not in said


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_a_kill_never_tears_a_file(tmp_path: Path) -> None:
    """A process rewrites one file until killed with -9: what stands is a whole version, and a claim sweeps up."""
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from mathverify.records import write_json
        print("go", flush=True)
        k = 0
        while True:
            write_json(Path(sys.argv[1]) / "x.json", {"k": k, "body": [k] * 20000}); k += 1
    """)
    for delay in (0.02, 0.05, 0.11):
        command = [sys.executable, "-c", program, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "go\n"
            while not (tmp_path / "x.json").exists():
                pass
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        tree = read_json(tmp_path / "x.json")
        assert tree["body"] == [tree["k"]] * 20000
    claim_run_folder(tmp_path, RunConfig())
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_predictions_come_back_and_carry_probabilities(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    scores = np.array([0.0, 800.0, -3.25])
    rows = Predictions(
        ["1", "2", "ü\x1b"], ["a", "a", "b"], [None, "sums", "sums"], np.array([True, False, True]), scores
    )
    path = tmp_path / "predictions.parquet"
    write_predictions(path, rows)
    again = read_predictions(path)
    assert (again.ids, again.groups, again.slices) == (rows.ids, rows.groups, rows.slices)
    assert np.array_equal(again.scores, scores) and np.array_equal(again.labels, rows.labels)
    table = pq.read_table(path)
    assert table.column_names == ["id", "group", "slice", "is_correct", "score", "probability"]
    assert table["probability"].to_pylist() == pytest.approx([0.5, 1.0, 1 / (1 + math.exp(3.25))])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 10])
def test_torn_predictions_are_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "predictions.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"predictions\.parquet.*again"):
        read_predictions(tmp_path / "predictions.parquet")


def test_the_fingerprint_sees_what_changes_the_result_and_nothing_else() -> None:
    base = RunConfig()
    same = [
        replace(base, device="cpu"),
        replace(base, tracking=TrackingConfig(kind=TrackingKind.none, tags=["x"])),
        replace(base, train=TrainConfig(token_budget=512, threads=1, checkpoint_every=5)),
    ]
    other = [
        replace(base, seed=1),
        replace(base, lora=LoraConfig(rank=16)),
        replace(base, train=TrainConfig(max_steps=9)),
    ]
    assert {fingerprint(c) for c in same} == {fingerprint(base)}
    assert len({fingerprint(c) for c in [base, *other]}) == 4


def test_a_folder_tells_nothing_resumable_finished(tmp_path: Path) -> None:
    config, folder = RunConfig(), tmp_path / "new" / "run"
    assert claim_run_folder(folder, config) is FolderState.nothing and folder.is_dir()
    record = RunRecord.begin(config)
    write_record(folder, record)
    assert claim_run_folder(folder, config) is FolderState.nothing
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "state.json").write_text("{}")
    assert claim_run_folder(folder, replace(config, device="cpu")) is FolderState.resumable
    record.status = Status.completed
    write_record(folder, record)
    assert claim_run_folder(folder, config) is FolderState.finished


def test_another_runs_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    write_record(tmp_path, RunRecord.begin(RunConfig(lora=LoraConfig(rank=16))))
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(UserError, match=r"lora\.rank is 16 there, 64 here"):
        claim_run_folder(tmp_path, RunConfig())
    assert (tmp_path / "result.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["adapter", "predictions.parquet", "metrics.jsonl"])
def test_files_of_unknown_origin_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("someone's")
    with pytest.raises(UserError, match="not known whose"):
        claim_run_folder(tmp_path, RunConfig())


def test_hydras_own_files_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "train.log").write_text("")
    assert claim_run_folder(tmp_path, RunConfig()) is FolderState.nothing


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        claim_run_folder(tmp_path / "file" / "run", RunConfig())
    with pytest.raises(UserError, match="cannot be written"):
        claim_run_folder(Path("/proc/mathverify-run"), RunConfig())  # refuses root too


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        claim_run_folder(tmp_path / "run", RunConfig())


def test_provenance_names_versions_without_importing_them() -> None:
    program = (
        "import sys; from mathverify.records import provenance; p = provenance(2);"
        "assert p.packages['torch'] and p.packages['transformers'] and p.threads == 2, p;"
        "heavy = {'torch', 'transformers', 'wandb', 'sklearn', 'scipy', 'pyarrow', 'pydantic'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_provenance_of_a_checkout_has_its_commit() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    found = provenance()
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert found.git_commit == head.stdout.strip() and found.git_dirty in (True, False)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("postgresql://ann:pa55word!@db.local:5432/s", ["postgresql://ann:", "@db.local:5432/s"]),
        ("postgresql+psycopg://ann:p@55:w@db/s", ["@db/s"]),
        ("redis://:hidden99@host", ["@host"]),
        ("postgresql://db/s?user=ann&password=hunter22&x=1", ["user=ann", "x=1"]),
        ("token hf_abcdefghijABCDEFGHIJ0123 rejected", ["rejected"]),
        ("a planted-secret-value inside", ["inside"]),
        ("nothing here: http://host:8080/a@b and 1", ["nothing here: http://host:8080/a@b and 1"]),
    ],
)
def test_secrets_are_blacked_out_and_the_rest_stays(
    monkeypatch: pytest.MonkeyPatch, text: str, kept: list[str]
) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "planted-secret-value")
    monkeypatch.setenv("SHORT_KEY", "1")  # too short to black out without hurting ordinary text
    clean = redact(text)
    for secret in ("pa55word!", "p@55:w", "55:w", "hidden99", "hunter22", "hf_abc", "planted-secret"):
        assert secret not in clean
    assert all(part in clean for part in kept)


def test_trees_are_redacted_by_value_and_by_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("DB_PASSWORD", "open-sesame")
    tree = {
        "storage": "mysql://u:p4ss@h/d",
        "list": ["k" * 40, 3, None],
        "open-sesame": 1,
        "api_key": "abc",
        "lora": 2,
    }
    write_json(tmp_path / "x.json", tree)
    expected = {
        "storage": f"mysql://u:{REDACTED}@h/d",
        "list": [REDACTED, 3, None],
        REDACTED: 1,
        "api_key": REDACTED,
        "lora": 2,
    }
    assert read_json(tmp_path / "x.json") == expected


def test_an_ordinary_config_is_not_touched() -> None:
    assert redact(to_plain(RunConfig())) == to_plain(RunConfig())
