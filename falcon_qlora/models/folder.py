"""A merged or prepared model's folder, in the form of the published models.

vLLM, llama.cpp and Transformers of any release can read it. Not all of them can read what Transformers 5
would write itself: its tokenizer class, and for Falcon-7B a number of key/value heads that llama.cpp takes
literally.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from falcon_qlora.common.files import write_json
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.models.checkpoints import parameter_reader
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.tensor_files import tensor_hash

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


def parameter_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of the stored tensors; a head tied to the embedding is not stored."""
    tied, model = layout_of(config).tied, empty_model(config, dtype=torch.float32)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if name not in tied}


def altered_tensors(folder: Path, config: PreTrainedConfig, hashes: Mapping[str, Any]) -> Iterator[str]:
    """Names of the tensors in a model's folder whose bytes do not match `hashes`."""
    read = parameter_reader(folder, config)
    return (name for name in parameter_shapes(config) if tensor_hash(read(name)) != hashes.get(name))


def write_configuration(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    write_json(folder / "config.json", published_config(config, dtype))


def published_config(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` in the names and the form of the published models."""
    record = layout_of(config).published_config()
    if config.pad_token_id is not None:
        record["pad_token_id"] = config.pad_token_id
    record |= {"torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    record["transformers_version"] = transformers.__version__
    return dict(sorted(record.items()))


def write_generation_config(folder: Path, config: PreTrainedConfig, base: Path | None) -> None:
    """Write the base model's, if it has one; else one with the configuration's bos and eos tokens."""
    source = base / "generation_config.json" if base is not None else None
    record: dict[str, Any] = {"_from_model_config": True}
    record |= {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    if source is not None and source.is_file():
        record = read_json(source)
    write_json(folder / "generation_config.json", record)


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
