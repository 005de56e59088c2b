"""How new modules get their first weights: not at all, or drawn on the CPU wherever they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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


class DrawnOnHost(TorchFunctionMode):
    """Within the block, `torch.nn.init` draws with the CPU's generator for tensors elsewhere; on this thread.

    So modules can be made where they will lie, with the numbers that they would have had on the CPU. Moving
    them there takes longer than drawing: every one is fresh memory. Here all share one piece of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory = torch.empty(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", None) != "torch.nn.init":
            return func(*args, **kwargs)
        tensor, *others = args or [kwargs.pop("tensor")]
        if tensor.device.type == "cpu":
            return func(tensor, *others, **kwargs)
        drawn = self._like(tensor)
        func(drawn, *others, **kwargs)
        with torch.no_grad():
            return tensor.copy_(drawn)

    def _like(self, tensor: Tensor) -> Tensor:
        if self._memory.dtype != tensor.dtype or self._memory.numel() < tensor.numel():
            self._memory = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
        return self._memory[: tensor.numel()].view(tensor.shape)
