"""Kernels are tested where the machine has a GPU on it, anywhere else under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

# Triton reads it when a kernel is defined, its own ones included: before anything imports it.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    if reason is None:
        return
    for item in items:
        if "tests/kernels/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return None
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.cdiv, InterpretedFunction):
        return "Triton was imported before its interpreter was asked for: set TRITON_INTERPRET=1"
    return None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned(unwritten_memory_is_nan: None) -> None:
    """No kernel reads what nothing wrote."""


@pytest.fixture(autouse=True, scope="session")
def rounded_to_nearest() -> Iterator[None]:
    """Round in the interpreter as GPUs do: by itself it cuts bits off, carrying none into the exponent."""
    if torch.cuda.is_available() or _why_not() is not None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            tensor = torch.from_numpy(np.array(data)).bfloat16()
            return tensor.view(torch.int16).numpy().view(np.uint16)
        if source == tl.float32 and target == tl.float8e4nv:
            return torch.from_numpy(np.array(data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, mode)

    def dot_of_values(builder: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        """The interpreter's own multiplies bfloat16's bits as if they were whole numbers."""
        if a.dtype.scalar == b.dtype.scalar == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle((m.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
                for m in (a, b)
            )
        return dot(builder, a, b, d, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_values)
        yield
