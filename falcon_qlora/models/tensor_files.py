"""Tensor files, one tensor at a time: reading them, and writing a model without holding it in memory.

It writes safetensors, and also reads the older torch files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
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
}
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
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: StoredTensor(file, str(each.get_dtype()), tuple(each.get_shape()))
                for name, each in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}. Copy or download it again") from None


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor. The file is opened for it alone: closing it releases the pages that were read.

    Raises:
        UserError: if the file is damaged.
    """
    if file.suffix == ".bin":
        return _open_torch_file(file)[name]
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
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
    """Write a model's tensors as they come, in any order, each straight to its place in its file.

    Args:
        folder: gets ``model.safetensors``, or numbered shards and their index.
        shapes: every tensor's name and shape, in the order in which they are stored.
        tensors: each of them once, on any device and in any floating dtype.
        dtype: what they are stored in.
        max_shard_bytes: a new file begins where the next tensor would make one larger.

    Returns:
        Name → `tensor_hash` of what was stored.

    Raises:
        UserError: if a tensor is missing, or has another shape.
    """
    places = _lay_out(folder, shapes, dtype, max_shard_bytes)
    hashes: dict[str, str] = {}
    for name, tensor in tensors:
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise UserError(f"{name} has the shape {list(tensor.shape)}, expected {list(shapes[name])}")
        content = _bytes_of(tensor.to(dtype))
        file, offset = places[name]
        with _named_in_errors(file), file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    missing = [name for name in shapes if name not in hashes]
    if missing:
        raise UserError(f"{len(missing)} of the model's tensors are missing, the first {missing[0]}")
    return {name: hashes[name] for name in shapes}


def _lay_out(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, tuple[Path, int]]:
    """Write the files' headers and the index; returns each tensor's file and offset."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = split_into_files(sizes, max_shard_bytes)
    places: dict[str, tuple[Path, int]] = {}
    for file_name, names in shards.items():
        file = folder / file_name
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            header[name] = {
                "dtype": _NAME_OF_DTYPE[str(dtype)],
                "shape": list(shapes[name]),
                "data_offsets": [end, end + sizes[name]],
            }
            end += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with _named_in_errors(file), file.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(start + end)
        offset = start
        for name in names:
            places[name] = (file, offset)
            offset += sizes[name]
    write_index(folder, shards, sum(sizes.values()))
    return places


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
