"""Libraries imported without what they do on the side, whoever imports them first.

bitsandbytes asks on some CPUs, while it is imported, the package `kernels` for a kernel from the network,
which would compute other bits, and warns where there is none. And it wraps in `torch.compile` what no device
with kernels of its own calls, for which PyTorch loads its compiler: seconds. Transformers prints a line on
every process where WANDB_MODE is offline. Transformers and TRL list all packages that are installed, each for
itself, which takes a second or two where there are many. TRL imports W&B whoever reports to it, and
Transformers part of SciPy for losses of object detection.
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
# Module → what it imports and seldom uses, and what it looks for in that at once.
EARLY = {
    "trl.trainer.base_trainer": ("wandb", "run"),
    "transformers.loss.loss_utils": ("scipy.optimize", "linear_sum_assignment"),
}


class _Alone(SourceFileLoader):
    """Loads `ASKS`: there is no package `kernels`."""

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
    """Loads `COMPILES`, which takes its functions as they are where they cannot be compiled."""

    def exec_module(self, module: ModuleType) -> None:
        torch: Any = sys.modules["torch"]  # which bitsandbytes has imported by now
        compile_ = torch.compile
        torch.compile = None
        try:
            super().exec_module(module)
        finally:
            torch.compile = compile_


class _Silent(SourceFileLoader):
    """Loads `PRINTS`."""

    def exec_module(self, module: ModuleType) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().exec_module(module)


class _AskedOnce(SourceFileLoader):
    """Loads `LISTS`."""

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
    """Stands for a module in those that have imported it, which is imported when something of it is used.

    Args:
        name: of the module.
        wanted: names of functions and values that are looked for, or taken out, before anything is used.
    """

    def __init__(self, name: str, wanted: Sequence[str]):
        super().__init__(name)
        self._wanted = wanted

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:  # those that import it are being loaded
            if name in self._wanted:
                return functools.partial(_call, self.__name__, name)
            if name.startswith("__"):  # asked of every module, by `inspect`
                raise AttributeError(name)
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def _call(module: str, function: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(import_module(module), function)(*args, **kwargs)


class _Late(SourceFileLoader):
    """Loads those of `EARLY`."""

    def exec_module(self, module: ModuleType) -> None:
        name, *wanted = EARLY[module.__name__]
        spec = None
        with contextlib.suppress(ModuleNotFoundError):
            spec = find_spec(name)
        if name in sys.modules or spec is None:
            return super().exec_module(module)
        later = sys.modules[name] = _OnUse(name, wanted)
        later.__spec__ = spec  # by which others tell whether it is installed
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
    """Have Python load those modules so. Imports nothing; what is imported already stays as it is."""
    sys.meta_path.insert(0, _Finder)
