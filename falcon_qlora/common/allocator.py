"""The setting of PyTorch's CUDA allocator, made before torch starts CUDA. Imports no torch."""

from __future__ import annotations

import os

# The second is the older name, which wins where both are set.
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_expandable_segments() -> None:
    """Let segments grow, so that micro-batches of different lengths share them; a user's setting stays."""
    if not any(name in os.environ for name in _VARIABLES):
        os.environ[_VARIABLES[0]] = "expandable_segments:True"
