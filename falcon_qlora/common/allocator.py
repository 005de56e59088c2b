"""The setting of PyTorch's CUDA allocator. Imports no torch."""

from __future__ import annotations

import os
import sys

# The second is the older name, which wins where both are set.
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SETTING = "expandable_segments:True"


def use_expandable_segments() -> None:
    """Let segments grow, so that micro-batches of different lengths share them; a user's setting stays."""
    if not any(name in os.environ for name in _VARIABLES):
        os.environ[_VARIABLES[0]] = _SETTING
        if "torch" in sys.modules:  # it read the variable when it was imported, as in a notebook
            sys.modules["torch"]._C._accelerator_setAllocatorSettings(_SETTING)
