"""The optional kernel libraries: FlashAttention-4 and quack-kernels, for Hopper and later GPUs."""

from __future__ import annotations

import importlib.util
import os

import torch

from falcon_qlora.common.files import user_cache


def usable(module: str) -> bool:
    """Whether `module` is installed and this GPU is one of its; to be asked before it is imported.

    What the libraries compile for a GPU, some seconds a kernel and process, is kept for later runs in the
    user's own cache: by themselves one keeps nothing, and the other in a folder that all users share.
    Variables that are set already stay.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return False
    if importlib.util.find_spec(module) is None:
        return False
    compiled = user_cache("kernels")
    try:
        compiled.mkdir(parents=True, exist_ok=True)
    except OSError:
        return True
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(compiled / "flash_attention"))
    os.environ.setdefault("QUACK_CACHE_DIR", str(compiled / "quack"))
    return True
