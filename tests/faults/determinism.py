"""The same command twice: how much two runs with one seed differ, on a CPU (nothing) and on a GPU.

python -m tests.faults.determinism                  on the CPU
python -m tests.faults.determinism --device cuda    on a GPU; more words are overrides of the run
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.commands import OUT, OwnProcess
from tests.faults.results import write_result
from tests.journeys.conftest import SMALL


def twice(device: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Two runs in processes of their own. Returns whether metrics and weights are equal, and the largest differences.

    loss: relative, over all steps. score: of log-odds, absolute, over all test rows. accuracy: of the test set.
    """
    from mathverify.records import read_predictions, read_record

    with tempfile.TemporaryDirectory() as work:
        folders = [Path(work) / name for name in ("first", "second")]
        for folder in folders:
            words = [
                *SMALL,
                f"device={device}",
                f"data.cache_dir='{work}/cache'",
                f"hydra.run.dir='{folder}'",
                *overrides,
            ]
            code = OwnProcess(words, Path(work)).ended(1800)
            assert code == 0, (Path(work) / OUT).read_text()[-3000:]
        records = [read_record(folder) for folder in folders]
        scores = [read_predictions(folder / "predictions.parquet").scores for folder in folders]
        weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders]
        losses = [_losses(folder) for folder in folders]
    tests = [record.metrics.test for record in records]
    assert tests[0] is not None
    assert tests[1] is not None
    return {
        "device": records[0].device,
        "overrides": list(overrides),
        "steps": len(losses[0]),
        "metrics_equal": records[0].metrics == records[1].metrics,
        "weights_equal": weights[0] == weights[1],
        "largest_difference": {
            "loss": float(np.max(np.abs(losses[0] - losses[1]) / np.abs(losses[0]))),
            "score": float(np.max(np.abs(scores[0] - scores[1]))),
            "accuracy": abs((tests[0].accuracy.value or 0.0) - (tests[1].accuracy.value or 0.0)),
        },
    }


def _losses(folder: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["train/loss"] for line in lines if "train/loss" in line])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    found = twice(options.device, options.overrides)
    write_result(f"determinism-{options.device.partition(':')[0]}", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
