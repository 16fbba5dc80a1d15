"""What a second GPU of the same host brings: one run shared by both, and two packs side by side.

python -m tests.benchmarks.two_gpus --out OUT [--only PART ...] [--tiny]

One command writes OUT/two_gpus.json and prints the ratios: of two processes that torchrun starts the first does the work
alone while the second waits, then both do the same work. Base, lengths and configs are those of gpu.py: Llama-3.1-8B's
shape with random weights in NF4. --tiny: a small model, which runs without GPUs too (gloo), to try the command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mathverify.config import QuantizationKind, RunConfig
from mathverify.engine.budget import Lengths, peak_bytes, plan_budget
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.ranks import Joined, Ranks, place
from mathverify.engine.trial import Trial
from tests.benchmarks.gpu import VERDICTS, Row, Workload, base, clean, config, device, did, synchronize

WARM, RECORDED = 3, 150
"""Untimed steps; as many as RECORDED until most sizes of small passes have been recorded (engine/replay.py): a step is
fast when both processes replay theirs."""

COMPARED = 13
"""Steps whose losses are compared."""

SIXTEEN, SIXTY_FOUR = "one run, 16 examples a step", "one run, 64 examples a step"
PACKS = "two packs of 8 trials of batch 4"
RAW = "two_gpus_raw.json"
PARTS = {"sixteen": SIXTEEN, "sixty-four": SIXTY_FOUR, "packs": PACKS}


def new_pack(model: PackedModel, configs: list[RunConfig], rows: Workload, ranks: Ranks) -> Pack:
    clean()
    plan = plan_budget(model, configs, Lengths.of(rows.lengths), ranks.size)
    print(f"    process {place().rank}: {plan.text}", file=sys.stderr, flush=True)
    pack = Pack(model, TokenBudget(plan.tokens, plan.held), ranks)
    for own in configs:
        pack.add(Trial.start(own, rows, VERDICTS, model))  # type: ignore[arg-type]
    return pack


def take(pack: Pack, steps: int) -> tuple[int, list[float]]:
    """So many rounds: tokens of all of them, and the losses of the first trial."""
    tokens, losses = 0, []
    for _ in range(steps):
        if isinstance(pack.ranks, Joined) and pack.ranks.rank > 0:
            pack.ranks.hear()  # the leader's word to take a step
        reports = pack.step()
        tokens += sum(report.tokens for _, report in reports)
        losses.append(reports[0][1].loss)
    return tokens, losses


def timed(work: Callable[[], Any], ranks: Ranks) -> tuple[float, Any]:
    """Seconds from when all processes begin until all have ended."""
    synchronize()
    ranks.together(lambda: None)
    start = time.perf_counter()
    result = work()
    synchronize()
    ranks.together(lambda: None)
    return time.perf_counter() - start, result


def one_run(
    model: PackedModel, own: RunConfig, rows: Workload, steps: int, ranks: Ranks, warm: int = WARM
) -> dict[str, Any]:
    """A run that all processes share."""
    pack = new_pack(model, [own], rows, ranks)
    _, first = take(pack, warm)
    before = did(pack)
    seconds, (tokens, losses) = timed(lambda: take(pack, steps), ranks)
    peak = peak_bytes(device()) / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "step_s": seconds / steps,
        "tokens_per_s": tokens / seconds,
        "peak_gib": peak,
        "passes": {what: count - before[what] for what, count in did(pack).items()},
        "losses": [round(loss, 6) for loss in first + losses],
    }


def two_packs(model: PackedModel, rows: Workload, steps: int, ranks: Ranks) -> Row:
    """One pack for each of two processes, at the same time; for a process that is alone one after the other."""
    seconds, tokens = 0.0, 0
    mine = range(2) if ranks.size == 1 else [ranks.rank]
    for number in mine:
        pack = new_pack(model, [config(4, 1, seed=8 * number + i) for i in range(8)], rows, Ranks())
        take(pack, WARM)
        spent, (done, _) = timed(lambda pack=pack: take(pack, steps), ranks)  # type: ignore[misc]
        seconds, tokens = seconds + spent, tokens + done
        del pack
    total = ranks.sum(lambda: torch.tensor([float(tokens)]).double().numpy(), 1)[0]
    return {"seconds": seconds, "tokens_per_s": float(total) / seconds}


def work(options: argparse.Namespace) -> None:
    """All measurements, as one of the two processes."""
    ranks = Joined(place())
    ranks.use(device())
    rows = Workload(400 if options.tiny else 2000, 512 if options.tiny else 128256)
    model = base(options.tiny, QuantizationKind.nf4)
    measures: dict[str, Callable[[Ranks], dict[str, Any]]] = {
        SIXTEEN: lambda who: one_run(model, config(4, 4), rows, options.steps, who, options.recorded),
        SIXTY_FOUR: lambda who: one_run(model, config(16, 4), rows, options.steps, who),
        PACKS: lambda who: two_packs(model, rows, options.steps, who),
    }
    found: dict[str, dict[str, Any]] = {"one": {}, "two": {}}
    for name in (PARTS[part] for part in options.only):
        if ranks.rank == 0:
            found["one"][name] = measures[name](Ranks())
        clean()
        ranks.together(lambda: None)
        found["two"][name] = measures[name](ranks)
        if ranks.rank == 0:
            print(
                f"{name}: {found['one'][name]['tokens_per_s']:,.0f}, {found['two'][name]['tokens_per_s']:,.0f}",
                flush=True,
            )
            (options.out / RAW).write_text(json.dumps(found))
    if ranks.rank > 0:
        ranks.hear()  # that it is over
    ranks.leave()


def started(options: argparse.Namespace) -> dict[str, Any]:
    """The measurements of both processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m"]
    own = ["tests.benchmarks.two_gpus", "--work", "--out", str(options.out), "--steps", str(options.steps)]
    own += ["--recorded", str(options.recorded), *(["--tiny"] if options.tiny else []), "--only", *options.only]
    raw = options.out / RAW
    raw.unlink(missing_ok=True)
    subprocess.run([sys.executable, *launch, *own], check=True, timeout=options.timeout)
    found: dict[str, Any] = json.loads(raw.read_text())
    raw.unlink()
    return found


def apart(one: list[float], two: list[float]) -> float:
    """The largest relative difference of two runs' losses over their first steps; later ones drift apart."""
    return max(abs(a - b) / abs(a) for a, b in zip(one[:COMPARED], two[:COMPARED], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small model, on CPUs if there are no GPUs")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each measurement")
    parser.add_argument("--recorded", type=int, default=RECORDED, help="untimed steps before small passes are timed")
    parser.add_argument("--timeout", type=float, default=580.0, help="seconds for everything")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    if torch.cuda.device_count() < 2 and not (options.tiny and torch.cuda.device_count() == 0):
        sys.exit(f"error: this host has {torch.cuda.device_count()} GPUs, two are needed (none: --tiny)")
    options.out.mkdir(parents=True, exist_ok=True)
    found = started(options)
    one, two = found["one"], found["two"]
    ratios = {name: two[name]["tokens_per_s"] / one[name]["tokens_per_s"] for name in one}
    losses = {name: apart(alone["losses"], two[name]["losses"]) for name, alone in one.items() if "losses" in alone}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": gpus or "cpu",
        "torch": torch.__version__,
        "command": "python -m tests.benchmarks.two_gpus " + " ".join(sys.argv[1:]),
        "one_gpu": one,
        "two_gpus": two,
        "ratios": ratios,
        "largest_relative_loss_difference": losses,
    }
    (options.out / "two_gpus.json").write_text(json.dumps(report, indent=1))
    print(f"{report['date']}, {report['device']}, torch {report['torch']}")
    for name, ratio in ratios.items():
        kinds = [f"{found[name]['tokens_per_s']:,.0f}" for found in (one, two)]
        print(f"{name:36s} {' -> '.join(kinds)} tokens/s  {ratio:.2f}x")
    for name, difference in losses.items():
        print(f"{name:36s} losses differ by at most {difference:.1e} (relative)")


if __name__ == "__main__":
    main()
