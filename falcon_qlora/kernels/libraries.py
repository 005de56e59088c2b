"""The optional kernel libraries, FlashAttention-4 and quack-kernels, which are for Hopper and later GPUs."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from falcon_qlora.common.errors import first_line
from falcon_qlora.common.files import user_cache

FLASH_ATTENTION_4, QUACK = "flash-attn-4", "quack-kernels"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Loaded(Generic[_T]):
    """An optional library, as this process found it.

    Attributes:
        part: what is used of it; None where it is not installed, does not support the GPU, or failed.
        failure: of a library that is installed and supports the GPU: its name and its error, in one line.
    """

    part: _T | None = None
    failure: str | None = None


def load(library: str, use: Callable[[], _T]) -> Loaded[_T]:
    """Import a library and try it. Any error of it is a result.

    Args:
        library: its name, that of the distribution.
        use: imports it, and runs what it is for once: a part that is missing may show only there.
    """
    try:
        return Loaded(use())
    except Exception as error:
        told = f"{type(error).__name__}: {first_line(error, limit=200)}"
        return Loaded(failure=f"{library} failed: {told}")


def usable(library: str) -> bool:
    """Whether `library` is installed and supports this GPU; to be called before it is imported.

    Also sets the libraries' cache variables, unless already set. Compiling takes seconds per kernel and
    process; the user's own cache keeps the results for later runs. By default, one library keeps nothing, and
    the other uses a folder shared by all users.
    """
    if not have_gpu() or not is_installed(library):
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


def have_gpu() -> bool:
    """Whether this process's GPU is one that the libraries support."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def is_installed(library: str) -> bool:
    """Whether a distribution of this name is installed, complete or not."""
    # The distribution, not the module: FlashAttention-2 has a module of the same name.
    try:
        importlib.metadata.distribution(library)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
