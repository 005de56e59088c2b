"""New modules without random weights, for weights that are loaded next."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Undrawn(TorchFunctionMode):
    """Within the block, `torch.nn.init` leaves tensors as they are in memory; on this thread alone.

    Drawing LoRA's matrices takes seconds. On the meta device, drawing and `torch.arange` would load torch's
    compiler, which takes longer.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        if func is torch.arange and "device" not in kwargs:
            return func(*args, **kwargs, device="cpu")
        return func(*args, **kwargs)
