"""A base whose blocks' weights are shared out over the processes, for adapters on large models.

Of a block's bytes each process keeps an equal part, and one all-gather makes it whole: `streamed_base` says
when. PyTorch's `fully_shard` is not used: it shards parameters, which bitsandbytes' scales are not, and
allocates what it gathers each time.

All processes must take part in every gather, in one order. It follows from the order of forward and backward
passes, which is the same on all. What the main process alone does with the model is for `alone`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from falcon_qlora.models.streamed_base import StreamedBase, aligned, streamed_base_of
from falcon_qlora.processes import agreement, ranks

T = TypeVar("T")

# The older name warns in releases that have the newer.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Parts:
    """This process's part of each block's bytes; a `Storage`.

    Args:
        sizes: of the blocks, in bytes.
        device: of this process.

    Attributes:
        parts: of each block, uint8.
        leads: whether the main process runs the model alone, and tells the others what it gathers.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device):
        processes = dist.get_world_size()
        self.parts = [
            torch.zeros(aligned(-(-size // processes)), dtype=torch.uint8, device=device) for size in sizes
        ]
        self.leads = False
        self.is_shared = True

    def room(self, index: int) -> int:
        return dist.get_world_size() * len(self.parts[index])

    def put(self, index: int, start: int, tensor: Tensor) -> None:
        part = self.parts[index]
        begin = ranks.process_index() * len(part)
        first, last = max(start, begin), min(start + len(tensor), begin + len(part))
        if first < last:
            part[first - begin : last - begin] = tensor[first - start : last - start]

    def fetch(self, index: int, into: Tensor) -> Any:
        if self.leads:
            agreement.announce(index)
        return _all_gather(into, self.parts[index], async_op=not into.is_cuda)


def sharded_base_of(model: nn.Module) -> StreamedBase | None:
    """The base whose blocks are shared out, of a model as it is or inside PEFT's wrapper; else None."""
    base = streamed_base_of(model)
    return base if base is not None and isinstance(base.storage, Parts) else None


@contextmanager
def leading(model: nn.Module) -> Iterator[None]:
    """On the main process: a context in which it runs the model alone, any number of times.

    Each other process calls `follow` meanwhile. Nothing happens if the base is not shared out.
    """
    base = sharded_base_of(model)
    if base is None:
        yield
        return
    assert isinstance(base.storage, Parts)
    base.storage.leads = True
    try:
        yield
    finally:
        base.storage.leads = False
        agreement.announce(None)


def follow(model: nn.Module) -> None:
    """On the other processes: give the main process the parts that it needs until it leaves `leading`."""
    base = sharded_base_of(model)
    while base is not None and (index := agreement.listen()) is not None:
        base.start(index)


def alone(model: nn.Module, work: Callable[[], T]) -> T | None:
    """Have the main process do work that runs the model; return None on the others, whose parts it needs."""
    if not ranks.is_main_process():
        follow(model)
        return None
    with leading(model):
        return work()
