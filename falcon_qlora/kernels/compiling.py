"""Compiles a step's Triton kernels side by side, before the first step needs them one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from falcon_qlora.processes.cores import usable_cores

_MOST_AT_ONCE = 16


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Within the block, Triton's kernels are compiled and not launched; at its end all of them are ready.

    What they would have written is whatever was in memory: run nothing within it whose result is used. A
    kernel that cannot be compiled raises at its first launch, as it does without this.
    """
    from triton.runtime import JITFunction
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    run = JITFunction.run
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, usable_cores())) as threads:
        mode = AsyncCompileMode(threads, ignore_errors=True)

        def only_compile(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
            token = active_mode.set(mode)  # autograd's own threads have another context
            try:
                return run(self, *args, warmup=True, **kwargs)
            finally:
                active_mode.reset(token)

        JITFunction.run = only_compile
        try:
            yield
        finally:
            JITFunction.run = run
            for kernel in mode.future_kernels.values():
                kernel.result(ignore_errors=True)
