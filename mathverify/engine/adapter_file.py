"""A trained adapter on disk in PEFT's format: adapter_config.json and adapter_model.safetensors.

Written and read without PEFT, whose import takes longer than a small run's evaluation; a test loads what is written
here with plain transformers + PEFT and compares scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mathverify.config import LoraConfig
from mathverify.engine.lora import Adapter, targets
from mathverify.engine.tensor_file import save_tensors
from mathverify.errors import UserError
from mathverify.files import write_atomic

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(adapter: Adapter, folder: Path, base_path: str) -> None:
    """Write `adapter` (float32, at its own rank) into `folder`, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in adapter.pairs.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(_peft_config(adapter.lora, base_path), indent=2).encode())


def load_adapter(folder: Path, shapes: dict[str, tuple[int, int]], device: torch.device) -> Adapter:
    """Read an adapter that was saved here or by PEFT.

    Args:
        shapes: {linear name: (in, out)} of the base (AdapterHost.shapes).

    Raises:
        UserError: a file is missing or unreadable, the adapter is not plain LoRA, or it is another base's.
    """
    config = _read_config(folder / CONFIG)
    lora = LoraConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout", 0.0)),
        target_modules=list(config["target_modules"]),
        rslora=bool(config.get("use_rslora", False)),
    )
    adapter = Adapter({name: shapes[name] for name in targets(shapes, lora)}, lora, 0, device)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}): give an adapter in PEFT's format") from error
    for name, pair in adapter.pairs.items():
        for letter, parameter in zip("AB", pair, strict=True):
            key = f"{_PREFIX}{name}.lora_{letter}.weight"
            if key not in tensors or tensors[key].shape != parameter.shape:
                found = tuple(tensors[key].shape) if key in tensors else "nothing"
                raise UserError(
                    f"{folder / WEIGHTS}: {key} is {found}, this base needs {tuple(parameter.shape)}: "
                    "the adapter belongs to another base"
                )
            parameter.data.copy_(tensors[key])
    return adapter


def _peft_config(lora: LoraConfig, base_path: str) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}): give the folder of an adapter in PEFT's format") from error
    plain_lora = isinstance(config, dict) and config.get("peft_type") == "LORA" and isinstance(config.get("r"), int)
    if not plain_lora or config.get("use_dora") or config.get("bias", "none") != "none":
        raise UserError(f"{file}: not a plain LoRA adapter (DoRA and trained biases are not supported)")
    return config
