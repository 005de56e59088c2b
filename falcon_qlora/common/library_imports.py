"""Import libraries without their side effects, whichever module imports them first.

On some CPUs, bitsandbytes asks the package `kernels` for a kernel from the network while it is imported. That
kernel would compute other bits; where there is none, bitsandbytes warns. It also wraps functions in
`torch.compile` that no device with kernels of its own calls, which makes PyTorch load its compiler: seconds.
Transformers prints a line on every process if WANDB_MODE is offline. Transformers and TRL each list all
installed packages, which takes a second or two where there are many. TRL imports W&B even if nothing reports
to it, and Transformers imports part of SciPy for losses of object detection.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from types import ModuleType
from typing import Any

ASKS = "bitsandbytes.backends.cpu.ops"
COMPILES = "bitsandbytes.backends.default.ops"
PRINTS = "transformers.integrations.integration_utils"
LISTS = ("transformers.utils.import_utils", "trl.import_utils")
# Module → the library that it imports and seldom uses, and the name that it looks up there at once.
EARLY = {
    "trl.trainer.base_trainer": ("wandb", "run"),
    "transformers.loss.loss_utils": ("scipy.optimize", "linear_sum_assignment"),
}


class _Alone(SourceFileLoader):
    """Loads `ASKS` as if the package `kernels` were not installed."""

    def exec_module(self, module: ModuleType) -> None:
        logger = logging.getLogger(ASKS)
        level, hub_kernels = logger.level, sys.modules.get("kernels", ...)
        logger.setLevel(logging.CRITICAL)
        sys.modules["kernels"] = None  # type: ignore[assignment]  # importing it raises ImportError
        try:
            super().exec_module(module)
        finally:
            logger.setLevel(level)
            if hub_kernels is ...:
                del sys.modules["kernels"]
            else:
                sys.modules["kernels"] = hub_kernels  # type: ignore[assignment]


class _Uncompiled(SourceFileLoader):
    """Loads `COMPILES` without `torch.compile`; its functions then stay uncompiled."""

    def exec_module(self, module: ModuleType) -> None:
        torch: Any = sys.modules["torch"]  # which bitsandbytes has imported by now
        compile_ = torch.compile
        torch.compile = None
        try:
            super().exec_module(module)
        finally:
            torch.compile = compile_


class _Silent(SourceFileLoader):
    """Loads `PRINTS` and drops what it prints."""

    def exec_module(self, module: ModuleType) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().exec_module(module)


class _AskedOnce(SourceFileLoader):
    """Loads `LISTS`, which share one list of the installed packages."""

    _list: Callable[[], Any] | None = None

    def exec_module(self, module: ModuleType) -> None:
        from importlib import metadata

        listing = metadata.packages_distributions
        if _AskedOnce._list is None:
            _AskedOnce._list = functools.cache(listing)
        metadata.packages_distributions = _AskedOnce._list
        try:
            super().exec_module(module)
        finally:
            metadata.packages_distributions = listing


class _OnUse(ModuleType):
    """Stands in for a module, which is imported only when something of it is used.

    Args:
        name: the module's name.
        wanted: names that the importing module looks up or imports before it uses anything.
    """

    def __init__(self, name: str, wanted: Sequence[str]):
        super().__init__(name)
        self._wanted = wanted

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:  # the modules that import it are still being loaded
            if name in self._wanted:
                return functools.partial(_call, self.__name__, name)
            if name.startswith("__"):  # `inspect` asks every module for these
                raise AttributeError(name)
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def _call(module: str, function: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(import_module(module), function)(*args, **kwargs)


class _Late(SourceFileLoader):
    """Loads a module of `EARLY` with a stand-in for the library that it imports."""

    def exec_module(self, module: ModuleType) -> None:
        name, *wanted = EARLY[module.__name__]
        spec = None
        with contextlib.suppress(ModuleNotFoundError):
            spec = find_spec(name)
        if name in sys.modules or spec is None:
            return super().exec_module(module)
        later = sys.modules[name] = _OnUse(name, wanted)
        later.__spec__ = spec  # others check it to see whether the library is installed
        try:
            super().exec_module(module)
        finally:
            if sys.modules.get(name) is later:
                del sys.modules[name]


_LOADERS: dict[str, type[SourceFileLoader]] = {
    ASKS: _Alone,
    COMPILES: _Uncompiled,
    PRINTS: _Silent,
    **dict.fromkeys(LISTS, _AskedOnce),
    **dict.fromkeys(EARLY, _Late),
}


class _Finder(PathFinder):
    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = super().find_spec(fullname, path, target) if fullname in _LOADERS else None
        if found is None or found.origin is None:
            return None
        return spec_from_file_location(
            fullname, found.origin, loader=_LOADERS[fullname](fullname, found.origin)
        )


def install() -> None:
    """Have Python load these modules this way. Imports nothing; modules already imported stay as they are."""
    sys.meta_path.insert(0, _Finder)
