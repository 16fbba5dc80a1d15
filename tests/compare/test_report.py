"""report.html without a browser: what it says of which runs, how it is escaped, how large it is; and --figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.special import expit

from mathverify.compare.reading import Comparison, read_runs
from mathverify.compare.report.content import collect
from mathverify.compare.report.facts import calibration, find_parameters, gather, pair_of, roc
from mathverify.compare.report.figures import write_figures
from mathverify.compare.report.importance import importance
from mathverify.compare.report.page import as_script, render
from mathverify.compare.report.pair import differences
from mathverify.compare.report.rows import found_again, row_facts
from mathverify.compare.verdict import judge
from mathverify.config import DataConfig, DataSource
from mathverify.records import Predictions, Status
from mathverify.scoring import measure

from . import synthetic

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 1'>",
    "<!--<script>",
    "line\u2028paragraph\u2029end",
    "{{ 7 * 7 }} ${alert(1)} <b>bold</b> &amp; \"quoted\" 'single'",
)


def page_of(comparison: Comparison) -> str:
    return render(collect(comparison, judge(comparison, resamples=200)))


def test_the_page_holds_every_run_and_names_what_differs(tmp_path: Path) -> None:
    page = page_of(read_runs([synthetic.sweep(tmp_path, 6, seeds=2)]))
    table = _Table.read(page)
    assert [row[1] for row in table.rows] and len(table.rows) == 6
    assert {"rank", "seed"} <= {head.partition(" +")[0] for head in table.heads}
    best = max(r.test.accuracy.value or 0.0 for r in read_runs([tmp_path]).runs if r.test)
    assert f"{best:.1%} [" in table.rows[0][2]  # with its interval
    assert all("[" in row[2] and "completed" in row for row in table.rows)


def test_nothing_in_the_page_points_outside(tmp_path: Path) -> None:
    page = page_of(read_runs([synthetic.sweep(tmp_path, 2)]))
    outside = _Outside()
    outside.feed(page)
    assert outside.found == []
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and policy[1].startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "unsafe-eval" not in policy[1] and "http" not in policy[1] and "*" not in policy[1]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    rows = synthetic.rows(60)
    texts = [HOSTILE[k % len(HOSTILE)] + f" {k}" for k in range(60)]
    for name in ("question", "answer", "solution"):
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(texts))
    rows = rows.set_column(rows.schema.get_field_index("slice"), "slice", pa.array(HOSTILE * 12))
    folder = synthetic.sweep(
        tmp_path / "runs", 4, table=rows, rename=lambda n: f"<script>window.hacked = {n}<" if n else "a&b"
    )
    page = page_of(read_runs([folder]))
    scripts = _Scripts()
    scripts.feed(page)
    assert len(scripts.bodies) == 4  # early, data, library, program: nothing that a text opened or closed
    assert all(hostile not in page for hostile in HOSTILE[:3])
    data = json.loads(scripts.bodies[1])
    assert {row["slice"] for row in data["slices"]["0"]} == set(HOSTILE)
    assert any("<script>" in run["name"] for run in data["tables"]["runs"])
    assert "\u2028" not in scripts.bodies[1] and "<" not in scripts.bodies[1]


def test_a_secret_in_the_environment_breaks_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are cleaned where they come from; packed numbers and specs, in which it may stand by chance, are not."""
    folder = synthetic.sweep(tmp_path, 2, seeds=1, test_rows=60, rename=lambda n: f"sesame{n}")
    plain = page_of(read_runs([folder]))
    scripts = _Scripts()
    scripts.feed(plain)
    packed = json.loads(scripts.bodies[1])["rows"]["runs"]["0"]["said"]
    monkeypatch.setenv("A_TOKEN", packed[:6])
    monkeypatch.setenv("B_TOKEN", "sesame")
    page = page_of(read_runs([folder]))
    assert packed in page and "sesame" not in page


def test_json_within_a_script_comes_back_unchanged() -> None:
    tree = {text: [text, 1, None, 0.5] for text in HOSTILE}
    assert json.loads(as_script(tree)) == tree


@pytest.mark.parametrize("states", [[Status.failed], [Status.running], [Status.pruned, Status.interrupted]])
def test_runs_without_a_result_are_shown_with_their_reasons(tmp_path: Path, states: list[Status]) -> None:
    page = page_of(read_runs([synthetic.sweep(tmp_path, 4, states=states)]))
    table = _Table.read(page)
    assert len(table.rows) == 4
    assert "no test accuracy to show" in page and "Left out" in page
    for state in set(states) - {Status.running}:
        assert any(state.value in row for row in table.rows)
    if Status.failed in states:
        assert "lower optimizer.learning_rate" in table.rows[0][-1]


def test_one_run_is_a_page_of_its_own_scores(tmp_path: Path) -> None:
    page = page_of(read_runs([synthetic.sweep(tmp_path, 1)]))
    figures = set(re.findall(r'<figure id="(\w+)"', page))
    assert {"scores_a", "calibration", "roc", "learning_curves"} <= figures
    assert not figures & {"scores_b", "slice_difference", "parallel_coordinates"}
    assert 'id="pick-a"' not in page


def test_a_run_that_repeats_another_is_in_no_figure(tmp_path: Path) -> None:
    for name in ("first", "again"):
        synthetic.run(tmp_path / name, synthetic.SHAPES[0], 1)
    synthetic.run(tmp_path / "other", synthetic.SHAPES[5], 1)
    facts = gather(read_runs([tmp_path]))
    assert [row["state"] for row in facts.runs].count("repeated") == 1
    assert len(facts.completed) == 2


def test_torn_and_missing_files_leave_a_page(tmp_path: Path) -> None:
    folder = synthetic.sweep(tmp_path, 3, seeds=3)
    (folder / "0" / "predictions.parquet").write_bytes(b"PAR1 torn")
    (folder / "1" / "predictions.parquet").unlink()
    (folder / "2" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"step": 2, "tra')
    page = page_of(read_runs([folder]))
    assert "not readable as predictions" in page and len(_Table.read(page).rows) == 3


def test_settings_that_move_together_are_one(tmp_path: Path) -> None:
    for number, (rank, alpha, seed) in enumerate([(4, 8, 1), (4, 8, 2), (16, 32, 1), (16, 32, 2)]):
        synthetic.run(tmp_path / str(number), (rank, alpha, 4, 1e-3), seed)
    comparison = read_runs([tmp_path])
    lora, by_seed = find_parameters(comparison.runs, comparison.varying)
    assert (lora.key, lora.with_it, by_seed.key) == ("lora.rank", ("alpha",), "seed")
    assert "cannot be told apart" in page_of(comparison)


def test_calibration_is_that_of_the_ece() -> None:
    predictions = _predictions(400)
    rows = calibration(predictions)
    weighted = sum(row["rows"] * abs(row["said"] - row["right"]) for row in rows) / 400
    metrics = measure(predictions.scores, predictions.labels, predictions.groups, resamples=100)
    assert metrics.ece.value == pytest.approx(weighted, abs=1e-4)  # rows are rounded to 4 digits
    assert all(row["low"] <= row["right"] <= row["high"] for row in rows)


def test_the_roc_encloses_the_auroc() -> None:
    predictions = _predictions(600)
    curve = roc(predictions)
    area = np.trapezoid([p["hits"] for p in curve], [p["alarms"] for p in curve])
    metrics = measure(predictions.scores, predictions.labels, predictions.groups, resamples=100)
    assert metrics.auroc.value == pytest.approx(area, abs=0.005)  # 41 points
    assert all(point["low"] <= point["hits"] <= point["high"] for point in curve)
    assert np.all(np.diff([point["hits"] for point in curve]) >= 0)


def test_differences_count_questions_and_know_no_certainty() -> None:
    first = _predictions(300, seed=1)
    second = Predictions(first.ids, first.groups, first.slices, first.labels, _predictions(300, seed=2).scores)
    (whole, *parts) = differences(first, second)
    right = [(p.scores > 0) == p.labels for p in (first, second)]
    assert whole["difference"] == pytest.approx(100 * (right[0].mean() - right[1].mean()))
    assert whole["only_a"] - whole["only_b"] == round(3 * whole["difference"])
    assert sum(part["rows"] for part in parts) == 300
    (same, *_) = differences(first, first)
    assert same["difference"] == 0 and same["low"] < 0 < same["high"]
    doubled = Predictions(first.ids * 2, first.groups * 2, first.slices * 2, np.tile(first.labels, 2),
                          np.tile(first.scores, 2))  # fmt: skip
    doubled.ids = [f"{i}-{k}" for k, i in enumerate(doubled.ids)]
    again = Predictions(doubled.ids, doubled.groups, doubled.slices, doubled.labels, np.tile(second.scores, 2))
    (twice, *_) = differences(doubled, again)
    assert twice["high"] == pytest.approx(whole["high"])  # the same questions twice say nothing new


def test_importance_finds_the_setting_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mathverify.compare.report.importance.RESAMPLES", 8)
    facts = gather(read_runs([synthetic.sweep(tmp_path, 24, seeds=2, test_rows=100)]))
    found = importance(facts)
    assert not isinstance(found, str)
    assert found[0]["parameter"] == "rank" and sum(row["importance"] for row in found) == pytest.approx(1, abs=0.01)
    assert all(0 <= row["low"] <= row["importance"] <= row["high"] <= 1 for row in found)
    few = gather(read_runs([tmp_path / "0", tmp_path / "23"]))
    assert isinstance(importance(few), str)


def test_rows_come_with_their_text_and_verdicts(tmp_path: Path) -> None:
    comparison = read_runs([synthetic.sweep(tmp_path, 4, seeds=1)])
    facts = gather(comparison)
    by_name = {run.label: run for run in comparison.runs}
    rows = row_facts({row["run"]: by_name[row["name"]] for row in facts.runs}, facts.predictions)
    assert not isinstance(rows, str) and rows.without_text is None
    table = {row["id"]: row for row in synthetic.rows().to_pylist()}
    assert rows.listed and all(table[row["id"]]["question"] == row["question"] for row in rows.listed)
    judged = np.stack([(p.scores > 0) == p.labels for p in facts.predictions.values()])
    assert len(rows.listed) == rows.disputed == int((np.ptp(judged.astype(int), axis=0) > 0).sum())


def test_rows_of_other_data_come_without_text(tmp_path: Path) -> None:
    moved = synthetic.rows(80)
    moved = moved.set_column(moved.schema.get_field_index("id"), "id", pa.array([f"other-{k}" for k in range(80)]))
    page = page_of(read_runs([synthetic.sweep(tmp_path, 2, seeds=1, table=moved)]))
    assert "Their text cannot be shown" in page


def test_relative_paths_are_taken_from_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text of a table's rows is found from any folder, as long as the table is where it was."""
    table = synthetic.rows(80).select(["question", "answer", "solution", "is_correct"])
    (tmp_path / "started").mkdir()
    pq.write_table(table, tmp_path / "started" / "rows.parquet")
    pq.write_table(synthetic.rows(), tmp_path / "started" / "train.parquet")
    synthetic.sweep(tmp_path / "runs", 2, seeds=1)
    for folder in (tmp_path / "runs").iterdir():
        (folder / ".hydra").mkdir()
        runtime = {"hydra": {"runtime": {"cwd": str(tmp_path / "started")}}}
        (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(runtime))
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source=DataSource.table, train="train.parquet", test="rows.parquet")
    found = found_again(config, tmp_path / "runs" / "0")
    assert found.test == str(tmp_path / "started" / "rows.parquet")
    assert found.validation is None
    assert found_again(DataConfig(source=DataSource.table, train="gone.parquet"), tmp_path).train == "gone.parquet"


def test_the_first_pair_is_the_best_and_the_best_of_another_kind(tmp_path: Path) -> None:
    facts = gather(read_runs([synthetic.sweep(tmp_path, 6, seeds=3, test_rows=100)]))
    a, b = pair_of(facts, None)
    assert a == 0 and facts.runs[b]["configuration"] != facts.runs[a]["configuration"]
    assert pair_of(facts, 3) == (0, 3)


def test_more_runs_than_the_page_shows_closely_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mathverify.compare.report import facts as limits

    monkeypatch.setattr(limits, "MOST_DETAILED", 4)
    monkeypatch.setattr(limits, "MOST_RUNS", 8)
    page = page_of(read_runs([synthetic.sweep(tmp_path, 10, test_rows=60)]))
    assert len(_Table.read(page).rows) == 8
    assert "best 8 of 10 runs" in page and "of 4 runs" in page


def test_figures_are_vector_and_bitmap_with_captions(tmp_path: Path) -> None:
    comparison = read_runs([synthetic.sweep(tmp_path / "runs", 4, test_rows=100)])
    written = write_figures(collect(comparison, judge(comparison, resamples=200)), tmp_path / "figures")
    names = {path.name for path in written}
    assert names == {path.name for path in (tmp_path / "figures").iterdir()}
    assert {
        "ranking.svg",
        "ranking.png",
        "configurations.svg",
        "differences.png",
        "calibration.svg",
        "slice_difference.png",
        "captions.md",
    } <= names
    for path in written:
        match path.suffix:
            case ".svg":
                text = path.read_text("utf-8")
                assert text.startswith("<svg") and "NaN" not in text and "@ink" not in text
            case ".png":
                assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and _dots_per_inch(path) == 300
    assert "A is " in (tmp_path / "figures" / "captions.md").read_text("utf-8")


def _dots_per_inch(path: Path) -> int:
    content = path.read_bytes()
    place = content.index(b"pHYs") + 4
    return round(int.from_bytes(content[place : place + 4], "big") * 0.0254)


def _predictions(rows: int, seed: int = 0) -> Predictions:
    random = np.random.default_rng(seed)
    labels = np.random.default_rng(9).random(rows) < 0.5
    scores = np.where(labels, 1.0, -1.0) + random.normal(0, 1.5, rows)
    groups = [f"q{k // 2}" for k in range(rows)]
    assert expit(scores).min() > 0
    return Predictions(
        [str(k) for k in range(rows)], groups, ["odd" if k % 3 else "even" for k in range(rows)], labels, scores
    )


class _Scripts(HTMLParser):
    """The bodies of all script elements, as a browser would cut them."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "script":
            self._inside = True
            self.bodies.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.bodies[-1] += data


class _Outside(HTMLParser):
    """Attributes that would make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "action", "poster", "data") or (
                name == "href" and not str(value).startswith(("#", "data:,"))
            ):
                self.found.append(f"{tag} {name}={value}")


class _Table(HTMLParser):
    """Headings and cells of the table of runs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[str] = []
        self.rows: list[list[str]] = []
        self._cells: list[str] | None = None
        self._depth = 0

    @classmethod
    def read(cls, page: str) -> _Table:
        table = cls()
        start = page.index('<table id="runs">')
        table.feed(page[start : page.index("</table>", start)])
        return table

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self._cells = []
            if "data-run" in dict(attrs):
                self.rows.append(self._cells)
            else:
                self.heads = self._cells
        elif tag in ("td", "th") and self._cells is not None:
            self._cells.append("")

    def handle_data(self, data: str) -> None:
        if self._cells:
            self._cells[-1] += data.strip()
