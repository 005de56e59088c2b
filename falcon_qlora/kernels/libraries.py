"""The optional kernel libraries: FlashAttention-4 and quack-kernels, for Hopper and later GPUs."""

from __future__ import annotations

import importlib.util
import os

import torch

from falcon_qlora.common.files import user_cache


def usable(module: str) -> bool:
    """Whether `module` is installed and supports this GPU; to be called before it is imported.

    Also sets the libraries' cache variables, unless already set. Compiling takes seconds per kernel and
    process; the user's own cache keeps the results for later runs. By default, one library keeps nothing, and
    the other uses a folder shared by all users.
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
