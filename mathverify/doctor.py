"""Is this machine ready? `python -m mathverify.doctor [model=... prompt=...]`: token doctor, GPU, versions, network.

Checks and reports; changes nothing, loads no weights and prints no secret. Exit code 2 if the tokenizer is unfit.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import os
import platform
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from mathverify.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "datasets",
    "pyarrow",
    "optuna",
    "hydra-core",
    "wandb",
)
TIMEOUT_SECONDS = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the doctor on command-line overrides; returns the exit code, 0 or 2."""
    from rich.console import Console

    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nOverrides are those of mathverify.train, e.g. model=llama31_8b prompt=with_solution.")
        return 0
    console = Console()
    _print_machine(console)
    try:
        _print_tokens(console, arguments)
    except UserError as error:
        from mathverify.entry import report

        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        return report(error)
    return 0


def _print_machine(console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("what", "found", title="machine", title_justify="left")
    for what, found in [*devices(), *versions(), *network()]:
        table.add_row(what, Text(found))
    console.print(table)


def _print_tokens(console: Console, overrides: Sequence[str]) -> None:
    from mathverify.base import load_tokenizer
    from mathverify.entry import compose
    from mathverify.tokens import examine

    config = compose(overrides)
    console.print(examine(load_tokenizer(config.model), config.prompt, config.train.loss).render())
    console.print("tokens: sound")


def devices() -> list[tuple[str, str]]:
    """(device, name and memory) of each GPU, or one line saying that there is none."""
    import torch

    if not torch.cuda.is_available():
        return [("GPU", f"none that torch can use; {os.cpu_count()} CPU cores")]
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if gpu.major >= 8 else "fp16 only, no bf16"
        found.append((f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {bf16}"))
    return found


def versions() -> list[tuple[str, str]]:
    """(library, installed version) of what a run depends on."""
    found = [("python", platform.python_version())]
    for name in LIBRARIES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def network() -> list[tuple[str, str]]:
    """(service, whether it answers and whether there is a login) for the hub and W&B; takes at most a few seconds."""
    from huggingface_hub import constants, get_token

    hub = f"{_reachable(constants.ENDPOINT)}; {_login(get_token() is not None, 'hf auth login')}"
    if constants.HF_HUB_OFFLINE:
        hub += "; HF_HUB_OFFLINE is set, so it is not asked"
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return [("hub", hub), ("W&B", f"{_reachable(base)}; {_login(_has_wandb_key(base), 'wandb login')}")]


def _login(known: bool, remedy: str) -> str:
    return "logged in" if known else f"not logged in ({remedy})"


def _has_wandb_key(base: str) -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(base).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable(url: str) -> str:
    """Whether the host answers HTTP in time; names the host only, since a URL may hold a password."""
    target = urlsplit(url)
    host = target.hostname or "?"
    answer: list[str] = []
    # In a thread, because looking a name up knows no timeout; a daemon, so that a hanging one does not outlive main.
    asking = threading.Thread(target=lambda: answer.append(_ask(target, host)), daemon=True)
    asking.start()
    asking.join(TIMEOUT_SECONDS + 1.0)
    return f"{host} {answer[0] if answer else 'cannot be reached (no answer in time)'}"


def _ask(target: SplitResult, host: str) -> str:
    try:
        port = f":{target.port}" if target.port else ""
        request = urllib.request.Request(f"{target.scheme or 'https'}://{host}{port}/", method="HEAD")
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        # A refusal by the service is an answer; one by a gateway in between is not.
        return f"cannot be reached (HTTP {error.code})" if error.code in (407, 502, 503, 504) else "answers"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return f"cannot be reached ({type(reason).__name__ if isinstance(reason, Exception) else 'no connection'})"
    return "answers"


if __name__ == "__main__":
    sys.exit(main())
