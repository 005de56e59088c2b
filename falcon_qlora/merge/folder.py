"""A merged model's folder: weights, configuration and tokenizer as Falcon's published checkpoints have them.

vLLM, llama.cpp and Transformers of any release read these; what Transformers 5 would write itself they do
not all read (its tokenizer class, and for Falcon-7B a number of key/value heads that llama.cpp takes at its
word).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import FalconConfig

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import free_bytes, try_to_write, write_json
from falcon_qlora.common.quantities import gib
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.tensor_files import write_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_CONFIG_KEYS = (
    "activation",
    "alibi",
    "attention_dropout",
    "bias",
    "bos_token_id",
    "eos_token_id",
    "ffn_hidden_size",
    "hidden_dropout",
    "hidden_size",
    "initializer_range",
    "layer_norm_epsilon",
    "max_position_embeddings",
    "multi_query",
    "new_decoder_architecture",
    "num_attention_heads",
    "num_hidden_layers",
    "parallel_attn",
    "tie_word_embeddings",
    "vocab_size",
)


def parameter_shapes(config: FalconConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of what a folder of this model holds; a head tied to the embedding is not stored."""
    shapes = {name: tuple(p.shape) for name, p in empty_model(config, dtype=torch.float32).named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def write_weights(
    folder: Path,
    config: FalconConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write the model's tensors; returns name → hash, see `write_model`."""
    return write_model(
        folder, parameter_shapes(config), tensors, dtype=dtype, max_shard_bytes=max_shard_bytes
    )


def write_configuration(folder: Path, config: FalconConfig, dtype: torch.dtype) -> None:
    write_json(folder / "config.json", published_config(config, dtype))


def published_config(config: FalconConfig, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` in the names and the form of the published Falcons."""
    record: dict[str, Any] = {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}
    record |= {name: getattr(config, name) for name in _CONFIG_KEYS}
    if config.new_decoder_architecture:
        # Only there: it is read as the number of key/value heads, which in the other layouts it is not.
        record["num_kv_heads"] = config.num_kv_heads
        record["num_ln_in_parallel_attn"] = config.num_ln_in_parallel_attn
    if config.pad_token_id is not None:
        record["pad_token_id"] = config.pad_token_id
    if not config.alibi:
        rope = dict(config.rope_parameters)
        record["rope_theta"] = rope.pop("rope_theta", 10000.0)
        if rope.get("rope_type", "default") != "default":
            record["rope_scaling"] = rope
    record["torch_dtype"] = str(dtype).removeprefix("torch.")
    record["use_cache"] = True
    record["transformers_version"] = transformers.__version__
    return dict(sorted(record.items(), key=lambda item: item[0]))


def write_generation_config(folder: Path, config: FalconConfig, base: Path | None) -> None:
    """The base model's, where it has one; else what its configuration says of beginning and end."""
    source = base / "generation_config.json" if base is not None else None
    if source is not None and source.is_file():
        write_json(folder / "generation_config.json", read_json(source))
        return
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
        },
    )


def copy_tokenizer(folder: Path, source: Path) -> None:
    """Copy the tokenizer's files, under a class that every release of Transformers knows."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    file = folder / "tokenizer_config.json"
    if file.is_file():
        settings = read_json(file)
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings.pop("backend", None)
            write_json(file, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


def shard_bytes(size: str) -> int:
    """Bytes of ``5GB`` or ``500MB``, where a GB is 10^9.

    Raises:
        UserError: for anything else.
    """
    number, unit = size.strip().upper()[:-2], size.strip().upper()[-2:]
    scale = {"KB": 10**3, "MB": 10**6, "GB": 10**9}.get(unit)
    if scale is None or not number.strip().isdigit() or int(number) < 1:
        raise UserError(f"--max_shard_size {size}: expected a size such as 5GB or 500MB")
    return int(number) * scale


def check_disk(out: Path, needed: int) -> None:
    """Refuse a merge that the disk of `out` has no room for.

    Raises:
        UserError: saying how much is missing.
    """
    free = free_bytes(out)
    if needed > free:
        raise UserError(
            f"--out {out}: the merge needs {gib(needed)} there, {gib(free)} are free. Free "
            "some, name a folder on another disk, or with --base 16bit or dequantized make one merge instead "
            "of two to compare."
        )


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace what the user may want to keep.

    Raises:
        UserError: if `out` is there, unless `overwrite` and it holds a merge or nothing; or if it could not
            be made there.
    """
    try:
        try_to_write(out.parent)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from None
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"--out {out}: it is there already. Name another folder, or replace it (--overwrite)")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "certificate.json").is_file()):
        raise UserError(f"--out {out}: holds something else than a merge, which --overwrite does not replace")
