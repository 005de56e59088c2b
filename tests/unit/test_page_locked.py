"""Memory that is locked for a GPU: when it is unlocked, on which GPU, and what a refusal leaves."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from falcon_qlora.common.errors import UserError
from falcon_qlora.models.host_base import HostCopy
from falcon_qlora.processes.page_locked import PageLocked

GPU = torch.device("cuda", 1)


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


class Runtime:
    """Stands for CUDA's; `unlocked` has for each address whether its memory was there, and the GPU."""

    def __init__(self) -> None:
        self.current, self.status = 0, 0
        self.last_errors: dict[int, int] = {}  # by thread, where its next kernel fails
        self.locked: list[int] = []
        self.unlocked: list[tuple[bool, int]] = []

    def register(self, address: int, size: int, flags: int) -> int:
        assert self.current == 1
        if self.status:
            self.last_errors[threading.get_ident()] = self.status
        else:
            self.locked.append(address)
        return self.status

    def unregister(self, address: int) -> None:
        self.locked.remove(address)
        self.unlocked.append((is_mapped(address), self.current))

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    cudart = SimpleNamespace(cudaHostRegister=made.register, cudaHostUnregister=made.unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", made.on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def test_memory_is_unlocked_before_it_goes_on_the_gpu_it_was_locked_for(runtime: Runtime) -> None:
    base = HostCopy([2**25, 2**25], GPU)
    assert len(runtime.locked) == 2
    del base
    gc.collect()
    assert runtime.unlocked == [(True, 1)] * 2
    assert not runtime.locked


def test_a_base_that_cannot_be_locked_is_told_with_the_rank(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.status = 2
    with pytest.raises(
        UserError, match=r"^--offload_base: 64\.0 MiB of CPU memory are needed, and it cannot"
    ):
        HostCopy([2**25, 2**25], GPU)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=rf"^--offload_base: rank 1 on {socket.gethostname()}: 64\.0 MiB"):
        HostCopy([2**25, 2**25], GPU)


def test_what_is_locked_outlives_the_tensor(runtime: Runtime) -> None:
    memory = PageLocked(GPU)
    memory.new(2**25)
    assert is_mapped(runtime.locked[0])


def test_a_refusal_fails_no_kernel_and_unlocks_what_was_locked_before(runtime: Runtime) -> None:
    memory = PageLocked(GPU)
    memory.new(4096)
    runtime.status = 2
    with pytest.raises(MemoryError, match=r"cannot be page-locked \(CUDA error 2\)"):
        memory.new(4096)
    assert runtime.last_errors
    assert threading.get_ident() not in runtime.last_errors
    del memory
    assert runtime.unlocked == [(True, 1)]
