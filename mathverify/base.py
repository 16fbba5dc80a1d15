"""The frozen base: model, tokenizer and quantization, loaded once per process and kept warm. No training here."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mathverify.config import Dtype, ModelConfig, QuantizationConfig, QuantizationKind, RunConfig
from mathverify.errors import UserError
from mathverify.hub import cache_damage, mending, nobody_asked_in_vain

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Base:
    """A frozen causal LM on one device.

    model: in evaluation mode, no parameter requires a gradient. dtype: of activations and of unquantised weights.
    fingerprint: hex digest that changes with the weights' origin (see `weights_fingerprint`). quantization: how the
    decoder's linears are to be stored; FP8 is made from dense weights by the engine. views: what was made of it for as
    long as it is warm, by type.
    """

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    quantization: QuantizationKind = QuantizationKind.none
    views: dict[type, Any] = field(default_factory=dict, repr=False, compare=False)


_warm: dict[str, Base] = {}


def load_base(config: RunConfig) -> Base:
    """The base that `config` names, from memory if it is warm.

    On a CPU every base that this process has loaded stays warm, on a GPU the last one.

    Raises:
        UserError: the model cannot be found, reached, read, or put on the device as asked.
    """
    import torch

    device = resolve_device(config.device)
    dtype = resolve_dtype(config.model.dtype, device)
    key = repr((config.model, config.quantization, device, dtype))
    if key not in _warm:
        _refuse_impossible(config.quantization, device)
        if not _has_room_for_two(device):
            _let_go()
        model = _load_model(config.model, config.quantization, device, dtype)
        model.requires_grad_(False).eval()
        kind = config.quantization.kind
        _warm[key] = Base(model, torch.device(device), dtype, weights_fingerprint(config.model), kind)
    return _warm[key]


def _has_room_for_two(device: str) -> bool:
    return not device.startswith("cuda")


def _let_go() -> None:
    """No base stays warm: whatever is prepared next is planned in all of the memory."""
    import torch

    _warm.clear()
    gc.collect()  # a base and its views know each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        UserError: it cannot be found, reached or read.
    """
    from transformers import AutoTokenizer

    with _Explaining(config), _asking_the_hub(config):
        return AutoTokenizer.from_pretrained(model_path(config), revision=config.revision, trust_remote_code=False)


def model_path(config: ModelConfig) -> str:
    """Hub name or local folder of the base; the embedded one's folder for `tiny`."""
    if config.path:
        return str(Path(config.path).expanduser()) if config.path.startswith("~") else config.path
    from mathverify.tiny import path

    return str(path())


def resolve_device(name: str) -> str:
    """`auto` -> the first CUDA device if there is one, else the CPU.

    Raises:
        UserError: a CUDA device is named that is not there.
    """
    import torch

    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0) if name.partition(":")[2].isdigit() or ":" not in name else -1
        if not 0 <= index < torch.cuda.device_count():
            raise UserError(
                f"device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices, use device=auto"
            )
        return f"cuda:{index}"
    return name


def resolve_dtype(choice: Dtype, device: str) -> torch.dtype:
    """`auto` -> bfloat16 where the GPU has it, float16 on older GPUs, float32 on the CPU."""
    import torch

    match choice:
        case Dtype.float32:
            return torch.float32
        case Dtype.bfloat16:
            return torch.bfloat16
        case Dtype.float16:
            return torch.float16
        case Dtype.auto if device == "cpu":
            return torch.float32
        case Dtype.auto:
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _asking_the_hub(config: ModelConfig) -> AbstractContextManager[None]:
    """Within, transformers may ask the hub about this model, if the hub answers; nobody is asked about a folder."""
    return nullcontext() if Path(model_path(config)).is_dir() else nobody_asked_in_vain()


def weights_fingerprint(config: ModelConfig) -> str:
    """Identity of the base's weights without reading all of them.

    A local folder: SHA-256 over config.json and, for each weights file, its name, size, first and last MiB.
    A hub name: SHA-256 over name and resolved commit.
    """
    folder = Path(model_path(config))
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(f"{config.path}@{_hub_commit(config)}".encode())
        return digest.hexdigest()[:16]
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, file.stat().st_size - _EDGE_BYTES))
            digest.update(stream.read(_EDGE_BYTES))
    return digest.hexdigest()[:16]


def _hub_commit(config: ModelConfig) -> str:
    """The commit that the cache holds for this name; the revision as written when it cannot be told."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(config.path), "config.json", revision=config.revision)
    return Path(found).parent.name if isinstance(found, str) else (config.revision or "main")


def _load_model(
    config: ModelConfig, quantization: QuantizationConfig, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if config.path is None or not sys.stderr.isatty():
        logging.disable_progress_bar()  # a bar is for a load that takes a while, and for a terminal
    with _Explaining(config), _asking_the_hub(config):
        _refuse_adapter(config)
        found: Any = AutoModelForCausalLM.from_pretrained(
            model_path(config),
            revision=config.revision,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_bitsandbytes_config(quantization, dtype),
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,
            output_loading_info=True,
        )
        model: PreTrainedModel = found[0]
        _refuse_unfit_weights(config, model, report=found[1])
        return model


def _refuse_adapter(config: ModelConfig) -> None:
    """transformers would load the adapter's own base and the adapter into it, and train on top of that."""
    if (Path(model_path(config)) / "adapter_config.json").is_file():
        raise UserError(
            f"model.path = {model_path(config)}: holds an adapter (adapter_config.json), not a base: "
            "give the folder of the base that it was trained on"
        )


def _refuse_unfit_weights(config: ModelConfig, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """transformers fills what the files lack with random numbers; and a NaN would end every trial at its first step."""
    import torch

    where = f"model.path = {model_path(config)}"
    lacking = sorted(report.get("missing_keys") or ())
    if lacking:
        raise UserError(
            f"{where}: its weights lack {len(lacking)} of the model's tensors (the first is {lacking[0]}): "
            "give the whole checkpoint that belongs to its config.json"
        )
    for name, ours, theirs in sorted(report.get("mismatched_keys") or (), key=str)[:1]:
        raise UserError(
            f"{where}: {name} has the size {tuple(ours)} in its weights and {tuple(theirs)} by its config.json: "
            "give the config.json that belongs to them"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} holds numbers that are not finite: download or save the checkpoint again")


def _bitsandbytes_config(quantization: QuantizationConfig, dtype: torch.dtype) -> Any:
    if quantization.kind in (QuantizationKind.none, QuantizationKind.fp8):
        return None
    from transformers import BitsAndBytesConfig

    if quantization.kind is QuantizationKind.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind.value,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _refuse_impossible(quantization: QuantizationConfig, device: str) -> None:
    if quantization.kind is not QuantizationKind.none and device != "cpu":
        import torch

        capability = torch.cuda.get_device_capability(device)
        if quantization.kind is QuantizationKind.fp8 and capability < (9, 0):
            raise UserError(
                f"quantization = fp8 needs a GPU of compute capability 9.0 (Hopper) or newer, this one has "
                f"{capability[0]}.{capability[1]}: use quantization=nf4 or none"
            )
        if capability < (6, 0):
            raise UserError(
                f"quantization = {quantization.kind.value} needs a GPU of compute capability 6.0 or newer: "
                "use quantization=none or device=cpu"
            )


def _loggings() -> tuple[Any, Any]:
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    return hub, transformers


class _Explaining:
    """Turns what transformers and the hub raise for a missing, gated or unreadable model into one line."""

    def __init__(self, config: ModelConfig) -> None:
        self.where = f"model.path = {model_path(config)}"
        self.config = config

    def __enter__(self) -> None:
        # What matters of their reports is told as an error, in one line.
        self._verbosity = [(library, library.get_verbosity()) for library in _loggings()]
        for library, _ in self._verbosity:
            library.set_verbosity(CRITICAL)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for library, before in self._verbosity:
            library.set_verbosity(before)
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(f"{self.where}: {self._explain(error)}") from error

    def _explain(self, error: Exception) -> str:
        text = " ".join(f"{type(link).__name__}: {link}" for link in _chain(error))
        local = Path(model_path(self.config))
        unknown = "RepositoryNotFound" in text or " 404 " in text
        if "GatedRepo" in text or (not unknown and (" 401 " in text or " 403 " in text)):
            return (
                "this model is gated: run `hf auth login`, accept the licence on the model's page, "
                "or give a local copy with model.path=FOLDER"
            )
        if local.is_dir():
            return self._explain_folder(local, text, error)
        if local.is_absolute() or self.config.path in (None, "") or str(self.config.path).startswith("."):
            return "no such folder: give a folder with config.json, *.safetensors and the tokenizer's files"
        if unknown:
            return "the hub has no model of this name, or it is private: check the name, or run `hf auth login`"
        if "HFValidationError" in text:
            return "neither a folder that is there nor a name on the hub: give FOLDER or owner/name"
        if (damage := cache_damage(str(self.config.path), "model", self.config.revision)) is not None:
            return f"{damage}: {mending(str(self.config.path), 'model')}, or give a local copy with model.path=FOLDER"
        if _is_offline(text):
            return (
                "the hub cannot be reached and the model is not in the local cache: connect once to download it "
                "(gated models: `hf auth login` and accept the licence), or give a local copy with model.path=FOLDER"
            )
        return _first_line(error)

    def _explain_folder(self, local: Path, text: str, error: Exception) -> str:
        if not (local / "config.json").is_file():
            return "the folder has no config.json: give the folder of a transformers checkpoint"
        if not any(local.glob("*.safetensors")):
            return (
                "the folder has no *.safetensors file; weights in pickle form (*.bin, *.pt) are not read: convert them "
                "with transformers' save_pretrained"
            )
        if "tokenizer" in text.casefold() and not any(local.glob("tokenizer*")):
            return "the folder has no tokenizer files: copy tokenizer.json and tokenizer_config.json beside the weights"
        if "SafetensorError" in text:
            return (
                f"its weights cannot be read ({_first_line(error)}): copy or download the model's *.safetensors again"
            )
        return _first_line(error)


def _is_offline(text: str) -> bool:
    signs = (
        "offline",
        "ConnectionError",
        "ConnectError",
        "couldn't connect",
        "LocalEntryNotFound",
        "Max retries",
        "timed out",
    )
    return os.environ.get("HF_HUB_OFFLINE") == "1" or any(sign in text for sign in signs)


def _chain(error: BaseException | None) -> list[BaseException]:
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[0][:300]}"
