"""What is saved is PEFT's own format: plain transformers + PEFT give the same scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mathverify.config import RunConfig
from mathverify.engine.adapter_file import load_adapter, save_adapter
from mathverify.engine.evaluate import score
from mathverify.engine.model import PackedModel
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import Trial
from mathverify.errors import UserError

from .conftest import VERDICTS, Rows, llama

Config = Callable[..., RunConfig]


@pytest.fixture
def trial(model: PackedModel, rows: Rows, config: Config) -> Trial:
    trial = Trial.start(config(rslora=True, dropout=0.1), rows, VERDICTS, model)  # type: ignore[arg-type]
    trial.adapter.flat.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    return trial


def test_plain_peft_gives_the_same_scores(trial: Trial, model: PackedModel, rows: Rows, tmp_path: Path) -> None:
    from peft import PeftModel

    save_adapter(trial.adapter, tmp_path, "base")
    ours = score(model, [trial.adapter], rows, VERDICTS, TokenBudget(200))[0]  # type: ignore[arg-type]
    theirs = PeftModel.from_pretrained(llama(), tmp_path).eval()
    for i in range(len(rows)):
        with torch.no_grad():
            logits = theirs(torch.from_numpy(rows.ids(i).astype(np.int64))[None]).logits[0, -1]
        assert ours[i] == pytest.approx(float(logits[5] - logits[6]), abs=1e-5)


def test_what_peft_saves_can_be_read(model: PackedModel, rows: Rows, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        llama(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    theirs.save_pretrained(str(tmp_path))
    adapter = load_adapter(tmp_path, model.host.shapes, model.device)
    ours = score(model, [adapter], rows, VERDICTS, TokenBudget(200))[0]  # type: ignore[arg-type]
    with torch.no_grad():
        logits = theirs.eval()(torch.from_numpy(rows.ids(0).astype(np.int64))[None]).logits[0, -1]
    assert ours[0] == pytest.approx(float(logits[5] - logits[6]), abs=1e-5)


def test_saving_and_loading_keeps_every_bit(trial: Trial, model: PackedModel, tmp_path: Path) -> None:
    save_adapter(trial.adapter, tmp_path, "base")
    loaded = load_adapter(tmp_path, model.host.shapes, model.device)
    assert torch.equal(loaded.flat, trial.adapter.flat)
    assert loaded.lora == trial.adapter.lora


def test_an_adapter_of_another_base_is_refused(trial: Trial, model: PackedModel, tmp_path: Path) -> None:
    save_adapter(trial.adapter, tmp_path, "base")
    wider = {name: (inputs * 2, outputs) for name, (inputs, outputs) in model.host.shapes.items()}
    with pytest.raises(UserError, match="another base"):
        load_adapter(tmp_path, wider, model.device)


@pytest.mark.parametrize("text", ["{}", "not json", json.dumps({"peft_type": "LORA", "r": 4, "use_dora": True})])
def test_a_foreign_config_is_refused(text: str, model: PackedModel, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter"):
        load_adapter(tmp_path, model.host.shapes, model.device)
