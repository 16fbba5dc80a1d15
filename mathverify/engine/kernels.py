"""Optional faster kernels for the base's own layers (not its linears). Results stay the same to rounding."""

from __future__ import annotations

import importlib.util
from typing import Any

from mathverify.engine.model import PackedModel


def use_liger(model: PackedModel) -> bool:
    """Put Liger's fused normalisation, rotary embedding and SwiGLU into a CUDA model.

    Returns:
        Whether it was done: the base runs through transformers' modules, liger-kernel is installed (the `gpu` extra),
        the device is CUDA, and Liger knows the architecture.
    """
    if model.fast is not None:
        return False  # decoder.py brings its own
    if model.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    base: Any = model.base.model
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)
    if apply is None:
        return False
    if getattr(base, "uses_liger", False):
        return True
    base.uses_liger = True
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=base)
    return True
