"""The embedded base: a small Llama-architecture checkpoint that reads the arithmetic problems but can't verify.

Only its place is here; `mathverify.tiny.recipe` made it, `checkpoint/README.md` says how.
"""

from pathlib import Path


def path() -> Path:
    """The checkpoint folder (config, weights, tokenizer), ready for `from_pretrained`."""
    return Path(__file__).parent / "checkpoint"
