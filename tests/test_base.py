"""The base: from a folder, from the hub's own cache layout, and one clear line when it cannot be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from mathverify import tiny
from mathverify.base import (
    _has_room_for_two,
    load_base,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    weights_fingerprint,
)
from mathverify.config import Dtype, ModelConfig, RunConfig
from mathverify.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path(), tmp_path / "Modell für Müller 1"))


def local(folder: Path) -> RunConfig:
    return RunConfig(model=ModelConfig(name="hf", path=str(folder)))


def test_a_local_folder_loads_whatever_its_name(folder: Path) -> None:
    base = load_base(local(folder))
    assert base.device == torch.device("cpu")
    assert base.dtype is torch.float32
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert load_tokenizer(local(folder).model).encode("1")


def test_the_fingerprint_follows_the_weights_not_the_place(folder: Path) -> None:
    embedded = weights_fingerprint(ModelConfig())
    assert weights_fingerprint(local(folder).model) == embedded
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert weights_fingerprint(local(folder).model) != embedded


def broken(folder: Path, how: str) -> None:
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "pickle only":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        case "no tokenizer":
            for file in folder.glob("tokenizer*"):
                file.unlink()
        case "torn weights":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:5000])
        case "not a language model":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(
                json.dumps(config | {"model_type": "vit", "architectures": ["ViTModel"]})
            )
        case "config is not JSON":
            (folder / "config.json").write_text("{")


def load_both(config: RunConfig) -> None:
    load_tokenizer(config.model)
    load_base(config)


@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        ("no config", "config.json"),
        ("pickle only", "pickle"),
        ("no tokenizer", "tokenizer"),
        ("torn weights", "SafetensorError|torn|header|metadata"),
        ("not a language model", "ViT|vit"),
        ("config is not JSON", "config.json|JSON"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line_that_names_it(folder: Path, how: str, remedy: str) -> None:
    broken(folder, how)
    with pytest.raises(UserError, match=remedy) as caught:
        load_both(local(folder))
    assert "Modell für Müller 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(local(tmp_path / "nowhere").model)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UserError, match="CUDA devices"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.parametrize("choice", [Dtype.float32, Dtype.bfloat16, Dtype.float16])
def test_a_chosen_dtype_is_taken(choice: Dtype) -> None:
    assert str(resolve_dtype(choice, "cpu")) == f"torch.{choice.value}"


# The hub, as transformers itself talks to it. Its settings are read at import, so each case is a process of its own.


def load_from_hub(name: str, tmp_path: Path, **environment: str) -> str:
    program = (
        "import sys\n"
        "from mathverify.base import load_base, load_tokenizer\n"
        "from mathverify.config import ModelConfig, RunConfig\n"
        "from mathverify.errors import UserError\n"
        "config = RunConfig(model=ModelConfig(name='hf', path=sys.argv[1]))\n"
        "try:\n"
        "    load_tokenizer(config.model); load_base(config); print('loaded')\n"
        "except UserError as error: print(error)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    env |= environment
    done = subprocess.run([sys.executable, "-c", program, name], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr, "the hub's client is not to try every file again and again"
    assert len(done.stdout.strip().splitlines()) == 1
    return done.stdout.strip()


@pytest.mark.slow
def test_a_model_in_the_hubs_cache_layout_loads_without_network(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hf" / "hub" / "models--acme--small-llama"
    shutil.copytree(tiny.path(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert load_from_hub("acme/small-llama", tmp_path, HF_HUB_OFFLINE="1") == "loaded"


@pytest.mark.slow
def test_without_network_the_line_says_what_to_do(tmp_path: Path) -> None:
    said = load_from_hub("meta-llama/Llama-3.1-8B", tmp_path, HF_HUB_OFFLINE="1")
    for part in ("meta-llama/Llama-3.1-8B", "hf auth login", "accept the licence", "model.path="):
        assert part in said


class Hub(BaseHTTPRequestHandler):
    """A hub that refuses: gated models with 401, unknown ones with 404, as the real one words it."""

    def do_HEAD(self) -> None:
        self._refuse()

    def do_GET(self) -> None:
        self._refuse()

    def _refuse(self) -> None:
        gated = "gated" in self.path
        self.send_response(401 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to this model is restricted" if gated else "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "remedy"), [("acme/gated", "hf auth login`, accept the licence"), ("acme/unknown", "check the name")]
)
def test_what_the_hub_refuses_is_explained(name: str, remedy: str, hub: str, tmp_path: Path) -> None:
    assert remedy in load_from_hub(name, tmp_path, HF_ENDPOINT=hub)


def test_where_there_is_room_for_one_base_the_last_is_let_go_with_all_that_was_made_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mathverify.engine.model import adopt

    monkeypatch.setattr("mathverify.base._warm", {})
    monkeypatch.setattr("mathverify.base._has_room_for_two", lambda device: False)
    first = load_base(local(folder))
    assert adopt(first) is adopt(load_base(local(folder)))  # warm: nothing is made twice
    seen: list[weakref.ref[Any]] = [weakref.ref(first.model), weakref.ref(adopt(first))]
    del first
    load_base(RunConfig())
    assert [one() for one in seen] == [None, None]
    assert _has_room_for_two("cpu")
    assert not _has_room_for_two("cuda:0")
