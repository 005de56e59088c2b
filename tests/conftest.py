"""What holds for every test: no network, nothing of the user's own settings, one thread a process."""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any library is imported; the processes that tests start inherit it.
_SCRATCH = Path(tempfile.mkdtemp(prefix="falcon-qlora-tests-"))
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",
    "XDG_CACHE_HOME": str(_SCRATCH / "cache"),
    "HF_HOME": str(_SCRATCH / "huggingface"),
    "TOKENIZERS_PARALLELISM": "false",
    "NETRC": str(_SCRATCH / "netrc"),
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_CONFIG_DIR": str(_SCRATCH / "wandb"),
    "WANDB_CACHE_DIR": str(_SCRATCH / "wandb"),
    "WANDB_DATA_DIR": str(_SCRATCH / "wandb"),
}
for _name in (
    "WANDB_API_KEY",
    "WANDB_DIR",
    "WANDB_ENTITY",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_LOG_MODEL",
    "WANDB_NAME",
    "WANDB_PROJECT",
    "WANDB_RESUME",
    "WANDB_RUN_ID",
    "HF_TOKEN",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RESTART_COUNT",
):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, its own ones included: before anything imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    # What the imports made stays. Every run collects garbage, and took a second each time to look through it.
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_unconfigure(config: pytest.Config) -> None:
    import shutil

    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill what ``torch.empty`` and its like give with NaN, and whole numbers with the largest there is.

    It is PyTorch's own switch, for tests of code that writes its outputs itself: results that depend on what
    was in memory before are then wrong in every run.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """What a test does to signals ends with it: processes that later tests start inherit what is ignored."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Let sockets of the tests reach this machine alone."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(str(address[0])):
            raise OSError(f"a test tried to reach {address[0]}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


def _is_local(host: str) -> bool:
    if host in ("localhost", "", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False
