"""What each quantization of a trained base changes: loss, gradient and scores against the same base in float32.

python -m tests.benchmarks.numerics       prints a table; the embedded model, on the CPU

Random weights of a large shape (tests/benchmarks/gpu.py) exaggerate: nothing in them is redundant.
"""

from __future__ import annotations

import numpy as np
import torch

from mathverify import entry
from mathverify.config import QuantizationKind
from mathverify.engine.evaluate import score
from mathverify.engine.pack import Pack
from mathverify.engine.trial import Trial
from mathverify.prepare import prepare

STEPS = 8


def measured(kind: QuantizationKind) -> tuple[float, torch.Tensor, np.ndarray]:
    """Mean loss and summed gradient over the first steps' examples, and validation scores, at one same adapter."""
    config = entry.compose([f"quantization={kind.value}", "device=cpu", "data.train_rows=800", "data.test_rows=100"])
    bench = prepare(config)
    trial = Trial.start(config, bench.stores["train"], bench.verdicts, bench.model)
    noise = torch.randn(trial.adapter.flat.shape, generator=torch.Generator().manual_seed(1))
    trial.adapter.flat.data.add_(noise / 100)
    pack, losses, total = Pack(bench.model, bench.budget), [], torch.zeros_like(trial.adapter.grad)
    for trial.step in range(STEPS):
        losses += pack._passes([trial], trial.segments(0))
        total += trial.adapter.grad
    found = score(bench.model, [trial.adapter], bench.stores["validation"], bench.verdicts, bench.budget)[0]
    return sum(losses) / STEPS, total, found


def main() -> None:
    loss, gradient, scores = measured(QuantizationKind.none)
    print(f"float32: loss {loss:.5f} over {STEPS * 16} examples\n")
    print("| base | loss difference | gradient cosine | correlation of 500 scores |\n|---|---|---|---|")
    for kind in (QuantizationKind.int8, QuantizationKind.fp8, QuantizationKind.nf4, QuantizationKind.fp4):
        own_loss, own_gradient, own_scores = measured(kind)
        cosine = torch.nn.functional.cosine_similarity(own_gradient, gradient, dim=0)
        correlation = np.corrcoef(scores, own_scores)[0, 1]
        print(f"| {kind.value} | {own_loss - loss:+.5f} | {cosine:.4f} | {correlation:.4f} |", flush=True)


if __name__ == "__main__":
    main()
