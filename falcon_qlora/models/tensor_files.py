"""Tensor files, one tensor at a time: reading them, and writing a model without holding it in memory.

It writes safetensors, and also reads the older torch files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Keyed by a dtype's text, because files are listed where torch is not loaded yet.
_NAME_OF_DTYPE = {
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.uint8": "U8",
    "torch.int8": "I8",
}
_ALIGNMENT = 8  # bytes; readers view a file's memory as numbers of up to so many
_HEADER_OF_A_TENSOR = 160  # bytes at most, beside the name: dtype, shape and offsets
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file says of it; `dtype` as safetensors spells it (``BF16``)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """A file's tensors by name, without reading their data.

    Raises:
        UserError: if the file is missing, is cut short, or holds anything else.
    """
    if not file.is_file():
        raise UserError(f"{file} is not there")
    if file.suffix == ".bin":
        return {
            name: StoredTensor(file, _NAME_OF_DTYPE.get(str(each.dtype), str(each.dtype)), tuple(each.shape))
            for name, each in _open_torch_file(file).items()
        }
    with _damage(file), safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return {
            name: StoredTensor(file, str(each.get_dtype()), tuple(each.get_shape()))
            for name, each in slices.items()
        }


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor. The file is opened for it alone: closing it releases the pages that were read.

    Raises:
        UserError: if the file is damaged.
    """
    if file.suffix == ".bin":
        return _open_torch_file(file)[name]
    with _damage(file), safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


@contextlib.contextmanager
def opened_tensors(files: Iterable[Path]) -> Iterator[Callable[[Path, str], Tensor]]:
    """Within the block, files stay open for reads of many small tensors: views of them, valid in the block.

    Raises:
        UserError: if a file is damaged.
    """
    with contextlib.ExitStack() as stack:
        opened = {}
        for file in files:
            if file.suffix == ".bin":
                opened[file] = _open_torch_file(file).__getitem__
            else:
                with _damage(file):
                    opened[file] = stack.enter_context(safe_open(file, framework="pt")).get_tensor

        def read(file: Path, name: str) -> Tensor:
            with _damage(file):
                return opened[file](name)

        yield read


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}. Copy or download it again") from None


def _open_torch_file(file: Path) -> dict[str, Tensor]:
    import torch

    # Files from before PyTorch 1.6 cannot be read in part.
    mapped = zipfile.is_zipfile(file)
    try:
        content = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file} holds more than tensors, or is damaged; it was not opened") from None
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{file} is damaged: {error}. Copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a model's tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise UserError(f"{file} holds more than plain tensors ({str(name)[:40]!r}); it was not opened")
    return content


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, as they lie in a file."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def write_model(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write a model's tensors as they come, in any order and one dtype.

    Args:
        folder: as for `write_tensors`.
        shapes: every tensor's name and shape.
        tensors: each of them once, on any device and in any floating dtype.
        dtype: what they are stored in.
        max_shard_bytes: as for `write_tensors`.

    Returns:
        Name → `tensor_hash` of what was stored, in the order of `shapes`.

    Raises:
        UserError: if a tensor is missing, or has another shape.
    """
    hashes: dict[str, str] = {}

    def checked() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise UserError(f"{name} has the shape {list(tensor.shape)}, expected {list(shapes[name])}")
            stored = tensor.to(dtype).cpu()
            hashes[name] = tensor_hash(stored)
            yield name, stored

    write_tensors(folder, shapes, checked(), max_shard_bytes=max_shard_bytes)
    return {name: hashes[name] for name in shapes}


def write_tensors(
    folder: Path, names: Iterable[str], tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int
) -> None:
    """Write tensors as they come, each straight to its place in its file, so that none need be held.

    Args:
        folder: gets ``model.safetensors``, or numbered shards and their index.
        names: of all of them, in any order.
        tensors: each once, on any device.
        max_shard_bytes: a new file begins where the next tensor would make one larger.

    Raises:
        UserError: if a tensor is missing.
    """
    missing = dict.fromkeys(names)
    room = sum(len(json.dumps(name)) + _HEADER_OF_A_TENSOR for name in missing)
    shards: list[_Shard] = []
    with contextlib.ExitStack() as opened:
        for name, tensor in tensors:
            del missing[name]
            content = tensor.detach().cpu().contiguous()
            if not shards or (shards[-1].size and shards[-1].size + content.nbytes > max_shard_bytes):
                if shards:
                    shards[-1].finish()
                ending = f"-{len(shards) + 1:05}" if shards else ""
                shards.append(opened.enter_context(_Shard(folder / f"model{ending}.safetensors", room)))
            shards[-1].add(name, content)
        if shards:
            shards[-1].finish()
    if missing:
        raise UserError(f"{len(missing)} of the model's tensors are missing, the first {next(iter(missing))}")
    of = {}
    for number, shard in enumerate(shards, 1):
        last = f"model-{number:05}-of-{len(shards):05}" if len(shards) > 1 else "model"
        of[f"{last}.safetensors"] = list(shard.header)
        shard.file.rename(folder / f"{last}.safetensors")
    write_index(folder, of, sum(shard.size for shard in shards))


class _Shard:
    """A safetensors file whose header is written last, into room that is left for it.

    Tensors whose size is no multiple of the alignment are kept, and written behind the others.
    """

    def __init__(self, file: Path, room: int):
        self.file, self._room = file, room + -room % _ALIGNMENT
        self.header: dict[str, dict[str, object]] = {}
        self.size = 0
        self._written = 0
        self._odd: list[tuple[str, Tensor]] = []

    def __enter__(self) -> _Shard:
        with _named_in_errors(self.file):
            self._handle = self.file.open("wb", buffering=0)
            self._handle.seek(8 + self._room)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    def add(self, name: str, tensor: Tensor) -> None:
        self.size += tensor.nbytes
        if tensor.nbytes % _ALIGNMENT:
            self._odd.append((name, tensor.clone()))  # it may be a view of a larger one
        else:
            self._write(name, tensor)

    def finish(self) -> None:
        for name, tensor in sorted(self._odd, key=lambda each: -each[1].itemsize):
            self._write(name, tensor)
        self._odd.clear()
        text = json.dumps({"__metadata__": {"format": "pt"}, **self.header}, separators=(",", ":")).encode()
        assert len(text) <= self._room, "the header is larger than the room that was left for it"
        self._handle.seek(0)
        self._put(self._room.to_bytes(8, "little") + text.ljust(self._room))

    def _write(self, name: str, tensor: Tensor) -> None:
        self.header[name] = {
            "dtype": _NAME_OF_DTYPE[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [self._written, self._written + tensor.nbytes],
        }
        self._put(_bytes_of(tensor))
        self._written += tensor.nbytes

    def _put(self, content: memoryview | bytes) -> None:
        with _named_in_errors(self.file):
            while content:
                content = content[self._handle.write(content) :]


def split_into_files(sizes: Mapping[str, int], most_bytes: int) -> dict[str, list[str]]:
    """Split tensors into files, in order; none exceeds `most_bytes` unless one tensor alone does.

    Args:
        sizes: bytes of each tensor.
        most_bytes: of a file's tensors.
    """
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > most_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05}-of-{len(parts):05}.safetensors": names for n, names in enumerate(parts, 1)}


def write_index(folder: Path, files: Mapping[str, list[str]], total_bytes: int) -> None:
    """Write the index of several files; a single one needs none."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(folder / _INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


@contextlib.contextmanager
def _named_in_errors(file: Path) -> Iterator[None]:
    """Name the file in an OSError: a full disk's error does not say which file was being written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
