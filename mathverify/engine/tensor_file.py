"""Tensors on disk as safetensors, written whole or not at all. What the tensors mean is their owner's business."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mathverify.files import replacing


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors (any device, any strides) to `path`.

    Raises:
        UserError: the disk or the permissions refuse; what was at `path` stands.
    """
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        try:
            save_file(plain, temporary, metadata)
            temporary.chmod(mode)  # as the user's umask has it; safetensors makes a file of its own for the owner only
        except SafetensorError as error:  # how safetensors spells a full disk
            raise OSError(str(error)) from error
