"""Writes a quantized base in Transformers' own format, one tensor at a time, with a record of its origin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import write_json
from falcon_qlora.models.checkpoints import Checkpoint, FolderCheckpoint, raw_config
from falcon_qlora.models.fingerprint import content_hash, file_hash, fingerprints
from falcon_qlora.models.folder import (
    copy_tokenizer,
    parameter_shapes,
    published_config,
    write_generation_config,
)
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.prepared import Prepared, write_prepared
from falcon_qlora.models.quantize import fill_quantized_weight
from falcon_qlora.models.quantized_files import Sums, names_beside, tensors_of
from falcon_qlora.models.schemes import Scheme, declared
from falcon_qlora.models.sizes import weight_bytes
from falcon_qlora.models.tensor_files import write_tensors

_SHARD_BYTES = 5 * 10**9
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to quantize, and how.

    Attributes:
        checkpoint: the base, not quantized.
        revision: of it on the hub.
        tokenizer_folder: whose tokenizer files are copied; None to copy none.
        scheme: how its linears are stored.
        compute_dtype: that of the trainings, to which a weight is rounded before it is quantized.
        device: where it is quantized. Scales are rounded differently on CPUs and GPUs.
        shard_bytes: largest size of a weights file.
    """

    checkpoint: Checkpoint
    revision: str | None
    tokenizer_folder: Path | None
    scheme: Scheme
    compute_dtype: torch.dtype
    device: torch.device
    shard_bytes: int = _SHARD_BYTES

    @property
    def base_folder(self) -> Path | None:
        """The base's folder; None for random weights."""
        return self.checkpoint.folder if isinstance(self.checkpoint, FolderCheckpoint) else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base, which is that of what is not quantized."""
        raw = {} if self.base_folder is None else raw_config(self.base_folder)
        return _DTYPES.get(str(raw.get("dtype", raw.get("torch_dtype"))), self.compute_dtype)

    def needed_bytes(self) -> int:
        """Bytes needed on the disk, within a per cent."""
        return weight_bytes(
            self.checkpoint.config,
            self.scheme.mode,
            double_quantization=self.scheme.double_quantization,
            compute_bytes=self.dtype.itemsize,
        )


def write_base(request: Preparation, folder: Path, *, at_block: Callable[[int], None]) -> Prepared:
    """Write the quantized base into an empty folder; `at_block` takes the number of each block.

    Raises:
        UserError: if a tensor of the base is missing, or its files changed meanwhile.
    """
    checkpoint, scheme, dtype = request.checkpoint, request.scheme, request.dtype
    known = fingerprints(checkpoint.name, revision=request.revision)
    linears = {f"{name}.weight" for name in layout_of(checkpoint.config).expected_linears()}
    names = []
    for name in parameter_shapes(checkpoint.config):
        names += [name, *(names_beside(name, scheme) if name in linears else [])]
    sums = Sums()
    write_tensors(
        folder, names, _quantized(request, linears, at_block, sums), max_shard_bytes=request.shard_bytes
    )
    config = published_config(checkpoint.config, dtype)
    computed = str(request.compute_dtype).removeprefix("torch.")
    config["quantization_config"] = declared(
        scheme.mode, double_quantization=scheme.double_quantization, compute_dtype=computed
    )
    write_json(folder / "config.json", config)
    write_generation_config(folder, checkpoint.config, request.base_folder)
    if request.tokenizer_folder is not None:
        copy_tokenizer(folder, request.tokenizer_folder)
    content = content_hash(folder)
    if known != fingerprints(checkpoint.name, revision=request.revision) or not known or content is None:
        raise UserError(f"{checkpoint.name} changed while it was quantized. Nothing was kept: start again")
    prepared = Prepared(
        origin=checkpoint.name,
        revision=request.revision,
        fingerprints=known,
        settings={
            "quantize_mode": scheme.mode,
            "double_quantization": scheme.double_quantization,
            "compute_dtype": computed,
            "device": request.device.type,
        },
        content=content,
        sums=sums.values(),
        files={file.name: file_hash(file) for file in sorted(folder.iterdir())},
    )
    write_prepared(folder, prepared)
    return prepared


def _quantized(
    request: Preparation, linears: set[str], at_block: Callable[[int], None], sums: Sums
) -> Iterator[tuple[str, Tensor]]:
    checkpoint, scheme, computed = request.checkpoint, request.scheme, request.compute_dtype
    layout = layout_of(checkpoint.config)
    blocks = f"{layout.backbone}.{layout.blocks}."
    model = empty_model(
        checkpoint.config,
        dtype=computed,
        quantize_mode=scheme.mode,
        double_quantization=scheme.double_quantization,
    )
    shapes = parameter_shapes(checkpoint.config)
    for name, tensor in checkpoint.tensors(model, request.device, computed):
        assert isinstance(tensor, Tensor)
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{checkpoint.name}: {name} has the shape {list(tensor.shape)}, config.json asks for "
                f"{list(shapes[name])}"
            )
        if name.startswith(blocks):
            at_block(int(name.removeprefix(blocks).partition(".")[0]))
        stored = iter([(name, tensor)])
        if name in linears:
            layer = model.get_submodule(name.removesuffix(".weight"))
            # As a training quantizes it; the original's dtype is kept where that rounds nothing.
            exact = torch.promote_types(tensor.dtype, computed) == computed
            fill_quantized_weight(layer, tensor.to(request.device, tensor.dtype if exact else computed))
            stored = tensors_of(layer, name)
        for each, part in stored:
            sums.add(each, part)
            yield each, part
        if name in linears:
            layer.weight = None  # type: ignore[assignment]
