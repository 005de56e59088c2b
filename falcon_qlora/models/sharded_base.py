"""A frozen base whose blocks' weights are shared out over the processes, for adapters on large models.

Of a block's linears each process keeps an equal part of the bytes, as they are stored: NF4's packed words and
scales, int8 rows and scales, or 16-bit weights. One all-gather of bytes makes a block whole, forward and
again backward, the next block's while this one runs. Embedding, head, norms, biases, a mixer's own small
tensors and the adapter stay replicated.

PyTorch's `fully_shard` is not used: it shards parameters, which bitsandbytes' scales are not, and allocates
what it gathers each time. Here every tensor of every linear is, for good, a view of one of two buffers, even
blocks of the first and odd ones of the second. So products, LoRA and bitsandbytes' own layers read a weight
as if it were local, and only when they may read it is decided here.

With two buffers the block that is gathered ahead overwrites the one before the current: its kernels are in
the queue, and the gather's stream waits for them. Where a forward pass ends, the first two blocks that the
backward pass needs are still there, and so for the next forward pass.

All processes must take part in every gather, in one order. It follows from the order of forward and backward
passes, which is the same on all. What the main process alone does with the model is for `alone`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from falcon_qlora.models.activations import blocks_of
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.quantize import put_stored, stored, stored_form
from falcon_qlora.processes import agreement, ranks

T = TypeVar("T")

_ALIGNMENT = 256  # bytes: of every tensor, and of every part
_ON_MODEL = "_sharded_base"
# The older name warns in releases that have the newer.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its block's bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def within(self, memory: Tensor) -> Tensor:
        return memory[self.start : self.end].view(self.dtype).view(self.shape)


class ShardedBase:
    """The frozen weights of a model's blocks, of which this process keeps its part.

    Args:
        model: from `empty_model`; each linear is given to `take` once it is filled, then `finish` is called.
        device: of this process.
        dtype: of weights that are not quantized.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype):
        processes = dist.get_world_size()
        self._model, self._device = model, device
        self._places: dict[nn.Module, tuple[int, dict[str, _Place]]] = {}
        parts = []
        for index, block in enumerate(blocks_of(model)):
            end = 0
            for name in layout_of(model.config).linears.values():
                linear = block.get_submodule(name)
                places = {}
                for part, (kind, shape) in stored_form(linear, dtype).items():
                    places[part] = _Place(end, kind, shape)
                    end = _aligned(places[part].end)
                self._places[linear] = index, places
            parts.append(_aligned(-(-end // processes)))
        self._parts = [torch.zeros(size, dtype=torch.uint8, device=device) for size in parts]
        self._buffers = [
            torch.zeros(processes * max(parts[place::2], default=0), dtype=torch.uint8, device=device)
            for place in (0, 1)
        ]
        self._firsts: list[Any] = []  # a linear of each block
        self._held: list[int | None] = [None, None]  # the block in each buffer, or on its way there
        self._current: int | None = None
        self._backwards = False
        self._leads = False
        self._arriving: list[Any] = [None, None]  # on the CPU
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # ahead of the products
            self._arrived = [torch.cuda.Event(), torch.cuda.Event()]

    def take(self, linear: nn.Module) -> None:
        """Keep this process's part of a block's filled linear, and have the linear read from a buffer."""
        if linear not in self._places:
            return  # of no block
        index, places = self._places.pop(linear)
        part = self._parts[index]
        begin = ranks.process_index() * len(part)
        for name, tensor in stored(linear).items():
            place = places[name]
            if (tensor.dtype, tuple(tensor.shape)) != (place.dtype, place.shape):
                raise RuntimeError(
                    f"{name} of {type(linear).__name__} is {tensor.dtype} {list(tensor.shape)}, not "
                    f"{place.dtype} {list(place.shape)}"
                )
            first, last = max(place.start, begin), min(place.end, begin + len(part))
            if first < last:
                own = tensor.reshape(-1).view(torch.uint8)[first - place.start : last - place.start]
                part[first - begin : last - begin] = own
        memory = self._buffers[index % 2]
        put_stored(linear, {name: place.within(memory) for name, place in places.items()})

    def finish(self) -> None:
        """Gather each block when it is run from now on."""
        assert not self._places, "not every linear was taken"
        setattr(self._model, _ON_MODEL, self)
        name = next(iter(layout_of(self._model.config).linears.values()))
        for index, block in enumerate(blocks_of(self._model)):
            self._firsts.append(block.get_submodule(name))
            block.register_forward_pre_hook(partial(self._before_forward, index))
            block.register_forward_hook(partial(self._after_forward, index))

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of the buffers: what it reads as changes with the block in them."""
        address = tensor.data_ptr()
        return any(0 <= address - each.data_ptr() < each.numel() for each in self._buffers)

    def gather(self, index: int) -> None:
        """Make a block whole, for what is read outside of a forward pass; all processes call this."""
        self._start(index)
        self._wait(index)

    def _before_forward(self, index: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.holds(self._firsts[index].weight):
            raise RuntimeError("the model was copied or moved, and its weights are where no gather puts them")
        # A recomputation, in the backward pass, is of the block that is there.
        self._backwards &= index == self._current
        self._use(index)

    def _after_forward(self, index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(partial(self._before_backward, index))

    def _before_backward(self, index: int, grad: Tensor) -> None:
        self._backwards = True
        self._use(index)

    def _use(self, index: int) -> None:
        """Have what is launched from here on find this block, and start to gather the next."""
        self._start(index)
        self._wait(index)
        self._current = index
        following = index - 1 if self._backwards else index + 1
        if 0 <= following < len(self._parts):
            self._start(following)

    def _start(self, index: int) -> None:
        place = index % 2
        if self._held[place] == index:
            return
        if self._leads:
            agreement.announce(index)
        part = self._parts[index]
        whole = self._buffers[place][: dist.get_world_size() * len(part)]
        if self._device.type != "cuda":
            self._wait(place)  # for one that was gathered ahead and not needed
            self._held[place] = index
            self._arriving[place] = _all_gather(whole, part, async_op=True)
            return
        self._held[place] = index
        # The kernels that read the block now in this buffer have been launched before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _all_gather(whole, part)
            self._arrived[place].record(self._stream)

    def _wait(self, index: int) -> None:
        """Have what is launched from here on wait for the last gather into this block's buffer."""
        place = index % 2
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_event(self._arrived[place])
        elif self._arriving[place] is not None:
            self._arriving[place].wait()
            self._arriving[place] = None

    @contextmanager
    def lead(self) -> Iterator[None]:
        """See `leading`."""
        self._leads = True
        try:
            yield
        finally:
            self._leads = False
            agreement.announce(None)

    def follow(self) -> None:
        """See the function `follow`."""
        while (index := agreement.listen()) is not None:
            self._start(index)


def sharded_base_of(model: nn.Module) -> ShardedBase | None:
    """The base whose blocks are shared out, of a model as it is or inside PEFT's wrapper; else None."""
    return getattr(causal_lm_in(model), _ON_MODEL, None)


@contextmanager
def leading(model: nn.Module) -> Iterator[None]:
    """On the main process: a context in which it runs the model alone, any number of times.

    Each other process calls `follow` meanwhile. Nothing happens if the base is not shared out.
    """
    base = sharded_base_of(model)
    if base is None:
        yield
        return
    with base.lead():
        yield


def follow(model: nn.Module) -> None:
    """On the other processes: give the main process the parts that it needs until it leaves `leading`."""
    base = sharded_base_of(model)
    if base is not None:
        base.follow()


def alone(model: nn.Module, work: Callable[[], T]) -> T | None:
    """Have the main process do work that runs the model; return None on the others, whose parts it needs."""
    if not ranks.is_main_process():
        follow(model)
        return None
    with leading(model):
        return work()


def replicated(model: nn.Module) -> Sequence[Tensor]:
    """The parameters and buffers that every process holds whole."""
    base = sharded_base_of(model)
    held = [*model.parameters(), *model.buffers()]
    return held if base is None else [each for each in held if not base.holds(each)]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
