"""The doctor: says what the machine has, never a secret, and does not wait for a network that is not there."""

from __future__ import annotations

import http.server
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mathverify import doctor
from mathverify.config import ModelConfig
from tests.tokens.small import byte_level

SECRET = "hf_thisIsASecretThatMustNotShow"


@pytest.fixture
def service() -> Iterator[str]:
    """A loopback server that answers everything with 401, as the hub and W&B may."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:{SECRET}@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network and no login of the machine's own."""
    for name in (
        "WANDB_API_KEY",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def run(monkeypatch: pytest.MonkeyPatch, **tokenizer: str | None) -> int:
    made = byte_level(**tokenizer)  # type: ignore[arg-type]
    monkeypatch.setattr("mathverify.base.load_tokenizer", lambda config: made)
    return doctor.main(["prompt.max_length=256"])


def test_a_sound_machine_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    out = capsys.readouterr().out
    for expected in ("torch", "transformers", "GPU", "verdict", "tokens: sound", "cannot be reached"):
        assert expected in out


def test_a_faulty_tokenizer_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, template="<s> <s> $A") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "puts 2 BOS tokens" in line


def test_bad_overrides_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["prompt.max_lenght=3"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "max_lenght" in line


def test_services_that_answer_are_said_to_and_secrets_are_not_shown(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", service)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", service)
    found = dict(doctor.network())
    assert found == {"hub": "127.0.0.1 answers; logged in", "W&B": "127.0.0.1 answers; logged in"}


def test_a_login_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert dict(doctor.network())["W&B"].endswith("; logged in")


def test_a_host_that_never_answers_costs_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT_SECONDS", 0.2)

    def slow(*args: object, **kwargs: object) -> io.BytesIO:
        time.sleep(30)
        return io.BytesIO()

    monkeypatch.setattr("urllib.request.urlopen", slow)
    start = time.monotonic()
    assert "no answer in time" in dict(doctor.network())["hub"]
    assert time.monotonic() - start < 5


def test_help_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--help"]) == 0
    assert "python -m mathverify.doctor" in capsys.readouterr().out


def test_the_model_named_is_the_one_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ModelConfig] = []

    def load(config: ModelConfig) -> object:
        asked.append(config)
        return byte_level()

    monkeypatch.setattr("mathverify.base.load_tokenizer", load)
    assert doctor.main(["model=hf", "model.path=/somewhere"]) == 0
    assert asked[0].path == "/somewhere"
