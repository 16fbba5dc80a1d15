"""The table of figures in README.md, from the JSON results of the scripts and tests of this folder.

python -m tests.faults.figures          write the table from what was measured last
python -m tests.faults.figures --run    measure everything first, then write it
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.results import RESULTS, read_result, write_result

ROOT = Path(__file__).parents[2]
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- figures: written by `python -m tests.faults.figures` -->", "<!-- end of figures -->"
SCRIPTS = (
    ["tests.faults.kills", "--times", "100"],
    ["tests.faults.sigterm"],
    ["tests.faults.million_rows"],
    ["tests.faults.determinism"],
)
WHAT = {
    "test_bad_input": "bad input: config, data, models, studies, run folders; one line, exit code 2, nothing left",
    "test_fuzz": "fuzzing: rows, command lines, result.json (hypothesis; each test draws 150 examples or more)",
    "test_disk": "full and read-only disks (a real tmpfs)",
    "test_kills": "kills and SIGTERM, the short way",
    "test_memory": "out of memory in every kind of pass; a cap on the data path",
    "test_numbers": "NaN, infinity, a learning rate of 1e6; the others of the pack bitwise unaffected",
    "test_safety": "no code from data, no secret written or shown, terminals, umask",
    "test_determinism": "the same seed twice",
}


def run_all() -> None:
    """Measure: the scripts, then the tests of this folder, whose outcomes become results/tests.json."""
    for script in SCRIPTS:
        subprocess.run([sys.executable, "-m", *script], cwd=ROOT, check=True)
    run_tests()


def run_tests() -> None:
    report = RESULTS / "junit.xml"
    subprocess.run([sys.executable, "-m", "pytest", "tests/faults", "-q", f"--junit-xml={report}"], cwd=ROOT)
    write_result("tests", {"files": outcomes(report)})
    report.unlink()


def outcomes(report: Path) -> dict[str, dict[str, int]]:
    """{test file: {passed, failed, skipped}} of a JUnit report."""
    found: dict[str, dict[str, int]] = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):  # our own pytest wrote it
        counts = found.setdefault(case.attrib["classname"].rpartition(".")[2], {"passed": 0, "failed": 0, "skipped": 0})
        kinds = {child.tag for child in case}
        ended = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[ended] += 1
    return found


def table() -> str:
    """The table as Markdown; a figure that was never measured says so."""
    rows = [*_kills(), *_sigterm(), *_million(), *_determinism(), *_tests()]
    lines = ["| what | figures | made by |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _made(result: dict[str, Any]) -> str:
    made = result["made"]
    return f"{made['date']}, {made['cpus']} CPUs, Python {made['python']}"


def _kills() -> Iterator[tuple[str, str, str]]:
    command = "`python -m tests.faults.kills --times 100`"
    if (found := read_result("kills")) is None:
        yield "killed with -9 and continued", "not measured", command
        return
    by = lambda key: ", ".join(f"{name} {count}" for name, count in sorted(found[key].items()))  # noqa: E731
    yield (
        "killed with -9 and continued",
        f"{found['kills']} kills in {found['ends']} folders ({by('by_scenario')}); 0 files torn, 0 finished trials lost, "
        f"0 repeated; every folder ended as the uninterrupted one (bitwise; packs within their tolerance). "
        f"{found['in_processes_of_their_own']} of the kills hit processes of their own, the others forks of a warm one. "
        f"Moments: {by('by_moment')}. {_made(found)}",
        command,
    )


def _sigterm() -> Iterator[tuple[str, str, str]]:
    what, command = "SIGTERM in a step of 512 examples", "`python -m tests.faults.sigterm`"
    if (found := read_result("sigterm")) is None:
        yield what, "not measured", command
        return
    seconds = ", ".join(f"{name} {count}" for name, count in found["seconds"].items())
    yield what, f"seconds until all is saved and over: {seconds}. {_made(found)}", command


def _million() -> Iterator[tuple[str, str, str]]:
    command = "`python -m tests.faults.million_rows`"
    if (found := read_result("million_rows")) is None:
        yield "a million rows under a cap", "not measured", command
        return
    yield (
        "a million rows under a cap",
        f"{found['rows']:,} rows (parquet) read, checked and split with at most "
        f"{found['mib_above_start']} MiB of memory above the start, under a cap of {found['cap_mib']:,} MiB. {_made(found)}",
        command,
    )


def _determinism() -> Iterator[tuple[str, str, str]]:
    for device, flag in (("cpu", ""), ("cuda", " --device cuda")):
        command = f"python -m tests.faults.determinism{flag}"
        what = f"the same seed twice, {'CPU' if device == 'cpu' else 'GPU'}"
        if (found := read_result(f"determinism-{device}")) is None:
            yield what, "not measured", f"`{command}`"
            continue
        largest = found["largest_difference"]
        yield (
            what,
            f"metrics {'identical' if found['metrics_equal'] else 'not identical'}, weights "
            f"{'identical' if found['weights_equal'] else 'not identical'}; largest differences over {found['steps']} steps: "
            f"loss {largest['loss']:.2g} (relative), score {largest['score']:.2g}, accuracy {largest['accuracy']:.2g} "
            f"({found['device']}). {_made(found)}",
            f"`{' '.join([command, *found['overrides']])}`",
        )


def _tests() -> Iterator[tuple[str, str, str]]:
    found = read_result("tests") or {"files": {}}
    for name, what in WHAT.items():
        counts = found["files"].get(name)
        said = "not measured" if counts is None else ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        yield what, said, f"`pytest tests/faults/{name}.py`"


def write_table() -> None:
    """Put the table between the marks of README.md."""
    text = README.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{README} has lost its marks"
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure everything first")
    parser.add_argument("--tests", action="store_true", help="run the tests of this folder first")
    options = parser.parse_args()
    if options.run:
        run_all()
    elif options.tests:
        run_tests()
    write_table()


if __name__ == "__main__":
    main()
