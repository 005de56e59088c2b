"""Import libraries without their side effects, whichever module imports them first.

On some CPUs, bitsandbytes asks the package `kernels` for a kernel from the network while it is imported. That
kernel would compute other bits; where there is none, bitsandbytes warns. It also wraps functions in
`torch.compile` that no device with kernels of its own calls, which makes PyTorch load its compiler: seconds.
Transformers prints a line on every process if WANDB_MODE is offline. Transformers and TRL list all installed
packages to find one, which takes a second or two where there are many; Transformers also reads the files of
all its models. TRL imports W&B even if nothing reports to it, and Transformers imports part of SciPy for
losses of object detection.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from falcon_qlora.common.late_imports import OnUse

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


class _Distributions(dict[str, list[str]]):
    """Package → the distributions that hold it; all are listed only for a package of another name."""

    _all: dict[str, list[str]] | None = None

    def __missing__(self, package: str) -> list[str]:
        from importlib import metadata

        try:
            self[package] = [metadata.distribution(package).name]
        except metadata.PackageNotFoundError:
            if self._all is None:
                self._all = dict(metadata.packages_distributions())
            self[package] = self._all[package]
        return self[package]

    def get(self, package: str, default: Any = None) -> Any:
        try:
            return self[package]
        except KeyError:
            return default


class _AsksForOne(SourceFileLoader):
    """Loads `LISTS`, with a list of packages that looks up single ones, and with `_remembered`."""

    _distributions = _Distributions()

    def exec_module(self, module: ModuleType) -> None:
        from importlib import metadata

        listing = metadata.packages_distributions
        metadata.packages_distributions = lambda: self._distributions  # type: ignore[assignment]
        try:
            super().exec_module(module)
        finally:
            metadata.packages_distributions = listing
        if hasattr(module, "define_import_structure"):
            vars(module)["define_import_structure"] = _remembered(module.define_import_structure)


def _remembered(define: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' `define_import_structure`, which reads the files of all models to learn what is in them.

    For an installed release, whose files do not change, the result is kept in the user's cache.
    """

    def defined(module_path: Any, prefix: str | None = None) -> Any:
        folder = Path(module_path)
        folder = folder.parent if folder.is_file() else folder
        is_installed = any(folder.parents[1].glob("transformers-*.dist-info"))
        if folder.name != "models" or not is_installed:
            return define(module_path, prefix=prefix)
        from falcon_qlora.common.errors import UserError
        from falcon_qlora.common.files import user_cache, write_text

        key = _hash(f"{folder} {folder.stat().st_mtime_ns} {prefix}")
        try:
            kept = user_cache("libraries") / f"{key[:32]}.json"
        except UserError:  # whatever needs the cache will say so
            return define(module_path, prefix=prefix)
        with contextlib.suppress(OSError, ValueError):
            checksum, text = kept.read_text(encoding="utf-8").split("\n", 1)
            if checksum == _hash(text):
                return {
                    frozenset(needs): {name: set(has) for name, has in of.items()}
                    for needs, of in json.loads(text)
                }
        found = define(module_path, prefix=prefix)
        plain = [[[*needs], {name: [*has] for name, has in of.items()}] for needs, of in found.items()]
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(plain)
            write_text(kept, f"{_hash(text)}\n{text}")
        return found

    return defined


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _Late(SourceFileLoader):
    """Loads a module of `EARLY` with a stand-in for the library that it imports."""

    def exec_module(self, module: ModuleType) -> None:
        name, *wanted = EARLY[module.__name__]
        spec = None
        with contextlib.suppress(ModuleNotFoundError):
            spec = find_spec(name)
        if name in sys.modules or spec is None:
            return super().exec_module(module)
        later = sys.modules[name] = OnUse(name, wanted)
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
    **dict.fromkeys(LISTS, _AsksForOne),
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
