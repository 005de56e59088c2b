"""Import modules on first use that other libraries import at once and seldom use.

In a training, torch's compiler, its sharded tensors and torchvision are such: without them the libraries load
in half the time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Of `torch._dynamo`, for its compiler alone: they mark functions, and places in them, or forget what it knew.
MARKS = (
    "allow_in_graph",
    "assume_constant_result",
    "clear_lru_cache",
    "disable",
    "disallow_in_graph",
    "graph_break",
)
# Modules that Transformers and torch import and seldom use → the names that they look up there at once.
LATE = {
    "torch._dynamo": (*MARKS, "TransformGetItemToIndex", "eval_frame", "trace_rules"),
    "torch.distributed._composable": ("fully_shard",),
    "torch.distributed.checkpoint": ("HuggingFaceStorageReader", "HuggingFaceStorageWriter"),
    "torch.distributed.fsdp": (
        "CPUOffloadPolicy",
        "FSDPModule",
        "FullyShardedDataParallel",
        "MixedPrecisionPolicy",
        "fully_shard",
    ),
    "torch.distributed.tensor": (
        "DTensor",
        "Partial",
        "Replicate",
        "Shard",
        "_StridedShard",
        "compute_local_shape_and_global_offset",
        "distribute_tensor",
    ),
    "torchaudio": (),
    "torchvision": ("InterpolationMode", "VideoReader", "functional", "io", "pil_to_tensor"),
    "transformers.distributed.expert_parallel": ("apply_expert_parallelism",),
    "transformers.distributed.tensor_parallel": (
        "apply_tensor_parallelism",
        "gather_state_dict_for_save",
        "get_kv_heads_per_rank",
        "verify_tp_plan",
    ),
}


class _Later:
    """Stands in for something in a module that is not imported yet; calling it imports the module.

    Args:
        module: the module's name.
        path: names from the module to it.
    """

    def __init__(self, module: str, *path: str):
        self._of, self._path = module, path

    def _real(self) -> Any:
        return functools.reduce(getattr, self._path, import_module(_revealed(self._of)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._of == "torch._dynamo" and self._path[-1] in MARKS:
            return _as_it_is(*args)
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(self._of, *self._path, name)

    def __instancecheck__(self, instance: Any) -> bool:
        if isinstance(sys.modules.get(self._of), OnUse | None):
            return False  # it is not imported, so there is no instance of it
        return isinstance(instance, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)


class OnUse(ModuleType):
    """Stands in for a module, which is imported only when something of it is used.

    Args:
        name: the module's name.
        wanted: names that importing modules look up or import before they use anything.
    """

    def __init__(self, name: str, wanted: Sequence[str]):
        super().__init__(name)
        self._wanted = wanted

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__, self) is self:  # or it is just being made
            if name in self._wanted:
                return _Later(self.__name__, name)
            if name.startswith("__"):  # `inspect` asks every module for these
                raise AttributeError(name)
        return getattr(import_module(_revealed(self.__name__)), name)


def _as_it_is(function: Any = None, *args: Any) -> Any:
    return _as_it_is if function is None else function


def _revealed(module: str) -> str:
    """The module's name, with nothing standing in for it or the packages around it any more."""
    parts = module.split(".")
    names = [".".join(parts[: length + 1]) for length in range(len(parts))]
    root = next((name for name in names if isinstance(sys.modules.get(name), OnUse)), None)
    for name in list(sys.modules) if root else ():
        if (name == root or name.startswith(f"{root}.")) and isinstance(sys.modules[name], OnUse):
            del sys.modules[name]
    _Finder.modules = {name: names for name, names in _Finder.modules.items() if name != root}
    return module


class _StandIn(Loader):
    """Loads an `OnUse` for a module of `LATE`, or for a module inside it."""

    def __init__(self, wanted: Sequence[str]):
        self._wanted = wanted

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return OnUse(spec.name, self._wanted)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder(MetaPathFinder):
    modules: dict[str, tuple[str, ...]] = {}

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for name, wanted in cls.modules.items():
            if fullname.startswith(f"{name}.") or (fullname == name and PathFinder.find_spec(name, path)):
                return ModuleSpec(fullname, _StandIn(wanted), is_package=True)
        return None


def put_off() -> None:
    """Have the modules of `LATE` imported on first use, in a process that compiles nothing with Dynamo."""
    _Finder.modules = {name: wanted for name, wanted in LATE.items() if name not in sys.modules}
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
