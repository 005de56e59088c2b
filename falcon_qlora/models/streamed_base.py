"""A frozen base whose blocks' weights come to the device when they run, and lie elsewhere meanwhile.

Where they lie is a `Storage`: parts on the other processes (`sharded_base`), or CPU memory (`host_base`). It
keeps each block's bytes as they are stored: NF4's packed words and scales, int8 rows and scales, or 16-bit
weights. One fetch makes a block whole, forward and again backward, the next block's while this one runs.
Embedding, head, norms, biases, a mixer's own small tensors and the adapter stay on the device.

Every tensor of every linear is, for good, a view of one of two buffers, even blocks of the first and odd ones
of the second. So products, LoRA and bitsandbytes' own layers read a weight as if it were local, and only when
they may read it is decided here.

With two buffers the block that is fetched ahead overwrites the one before the current: its kernels are in the
queue, and the fetches' stream waits for them. So a fetch has a whole block's time. Where a forward pass ends,
the first two blocks that the backward pass needs are still there, and so for the next forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from falcon_qlora.models.activations import blocks_of
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.quantize import put_stored, stored, stored_form

_ALIGNMENT = 256  # bytes: of every tensor, and of every part
_ON_MODEL = "_streamed_base"


class Storage(Protocol):
    """Where the blocks' bytes lie while they are not on the device.

    Attributes:
        is_shared: whether a process keeps a part of them; else each keeps all, alike.
    """

    is_shared: bool

    def room(self, index: int) -> int:
        """Bytes of a buffer that a block is fetched into."""

    def put(self, index: int, start: int, tensor: Tensor) -> None:
        """Keep bytes ``[count]``, which begin at `start` of a block's."""

    def fetch(self, index: int, into: Tensor) -> Any:
        """Launch a block's way to the device, on the current stream.

        Returns:
            On the CPU, what to wait for before it is read; None if it is there.
        """


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


class _SideStream:
    """Launches fetches beside the computation, and orders them with it; the host waits for nothing."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # ahead of the products
        self._arrived = [torch.cuda.Event(), torch.cuda.Event()]

    def run(self, place: int, fetch: Callable[[], Any]) -> None:
        # The kernels that read the block now in this buffer have been launched before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            fetch()
            self._arrived[place].record(self._stream)

    def wait(self, place: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[place])


class _OnCpu:
    """The same where there are no streams: a fetch is done, or in the hands of a collective's thread."""

    def __init__(self) -> None:
        self._arriving: list[Any] = [None, None]

    def run(self, place: int, fetch: Callable[[], Any]) -> None:
        self.wait(place)  # for one that was fetched ahead and not needed
        self._arriving[place] = fetch()

    def wait(self, place: int) -> None:
        if self._arriving[place] is not None:
            self._arriving[place].wait()
            self._arriving[place] = None


class StreamedBase:
    """The frozen weights of a model's blocks, two of which are on the device at a time.

    Args:
        model: from `empty_model`; each linear is given to `take` once it is filled, then `finish` is called.
        device: of this process.
        dtype: of weights that are not quantized.
        storage: makes where they lie, from the sizes of the blocks in bytes and the device.

    Attributes:
        storage: where they lie.
        buffers: the two on the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype,
        storage: Callable[[Sequence[int], torch.device], Storage],
    ):
        self._model = model
        self._places: dict[nn.Module, tuple[int, dict[str, _Place]]] = {}
        sizes = []
        for index, block in enumerate(blocks_of(model)):
            end = 0
            for name in layout_of(model.config).linears.values():
                linear = block.get_submodule(name)
                places = {}
                for part, (kind, shape) in stored_form(linear, dtype).items():
                    places[part] = _Place(end, kind, shape)
                    end = aligned(places[part].end)
                self._places[linear] = index, places
            sizes.append(end)
        self._count = len(sizes)
        self.storage = storage(sizes, device)
        rooms = [self.storage.room(index) for index in range(self._count)]
        self.buffers = [
            torch.zeros(max(rooms[place::2], default=0), dtype=torch.uint8, device=device) for place in (0, 1)
        ]
        self._firsts: list[Any] = []  # a linear of each block
        self._held: list[int | None] = [None, None]  # the block in each buffer, or on its way there
        self._current: int | None = None
        self._backwards = False
        self._queue = _SideStream(device) if device.type == "cuda" else _OnCpu()

    def take(self, linear: nn.Module) -> None:
        """Store a block's filled linear, and have the linear read from a buffer."""
        if linear not in self._places:
            return  # of no block
        index, places = self._places.pop(linear)
        for name, tensor in stored(linear).items():
            place = places[name]
            if (tensor.dtype, tuple(tensor.shape)) != (place.dtype, place.shape):
                raise RuntimeError(
                    f"{name} of {type(linear).__name__} is {tensor.dtype} {list(tensor.shape)}, not "
                    f"{place.dtype} {list(place.shape)}"
                )
            self.storage.put(index, place.start, tensor.reshape(-1).view(torch.uint8))
        memory = self.buffers[index % 2]
        put_stored(linear, {name: place.within(memory) for name, place in places.items()})

    def finish(self) -> None:
        """Fetch each block when it is run from now on."""
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
        return any(0 <= address - each.data_ptr() < each.numel() for each in self.buffers)

    def fetch(self, index: int) -> None:
        """Make a block whole, for what is read outside of a forward pass."""
        self.start(index)
        self._queue.wait(index % 2)

    def each_block(self) -> Iterator[Tensor]:
        """The bytes of each block on the device; what is launched on them is launched before the next."""
        for index in range(self._count):
            self.fetch(index)
            yield self.buffers[index % 2][: self.storage.room(index)]

    def start(self, index: int) -> None:
        """Have a block on its way to its buffer, if it is not there."""
        place = index % 2
        if self._held[place] == index:
            return
        self._held[place] = index
        into = self.buffers[place][: self.storage.room(index)]
        self._queue.run(place, partial(self.storage.fetch, index, into))

    def _before_forward(self, index: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.holds(self._firsts[index].weight):
            raise RuntimeError("the model was copied or moved, and its weights are where no fetch puts them")
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
        """Have what is launched from here on find this block, and start to fetch the next."""
        self.fetch(index)
        self._current = index
        following = index - 1 if self._backwards else index + 1
        if 0 <= following < self._count:
            self.start(following)


def streamed_base_of(model: nn.Module) -> StreamedBase | None:
    """The base whose blocks come to the device, of a model as it is or inside PEFT's wrapper; else None."""
    return getattr(causal_lm_in(model), _ON_MODEL, None)


def replicated(model: nn.Module) -> Iterator[Tensor]:
    """What every process holds alike: `held_for_good`, and an unshared base's blocks, each until the next."""
    yield from held_for_good(model)
    base = streamed_base_of(model)
    if base is not None and not base.storage.is_shared:
        yield from base.each_block()


def held_for_good(model: nn.Module) -> Sequence[Tensor]:
    """The parameters and buffers that this process holds whole on its device."""
    base = streamed_base_of(model)
    held = [*model.parameters(), *model.buffers()]
    return held if base is None else [each for each in held if not base.holds(each)]


def aligned(size: int) -> int:
    """Bytes from one tensor's start to the next one's."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
