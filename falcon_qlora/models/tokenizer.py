"""The tokenizer that goes with a model, and what identifies it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError, first_line, panics_as_errors
from falcon_qlora.common.files import disk_errors
from falcon_qlora.common.untrusted import read_json, read_text
from falcon_qlora.models.checkpoints import RANDOM, refuse_adapter
from falcon_qlora.models.layouts import MODEL_TYPES, PRESETS, layout_of_preset
from falcon_qlora.models.locate import is_on_hub, packaged_folder

_SETTINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# One class, as Transformers 4 and 5 call it, which needs no torch.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_CHAT_TEMPLATE = "chat_template.jinja"
_TEMPLATE_LIMIT_BYTES = 2**20


def load_tokenizer(
    model_name_or_path: str, *, tokenizer_name_or_path: str | None = None, revision: str | None = None
) -> Any:
    """Load the fast tokenizer that goes with a model, or another one.

    Args:
        model_name_or_path: as for `load_model`.
        tokenizer_name_or_path: another model, folder or hub id to take the tokenizer from.
        revision: of the model on the hub.

    Raises:
        UserError: if there is none, the hub cannot be reached, or it has no end token.
    """
    name = tokenizer_name_or_path or model_name_or_path
    folder = find_tokenizer(
        model_name_or_path, tokenizer_name_or_path=tokenizer_name_or_path, revision=revision
    )
    _check_files(folder)
    try:
        with panics_as_errors(f"loading {folder / 'tokenizer.json'}"):
            tokenizer = _class_for(folder).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            tokenizer("Try it out.", add_special_tokens=False)
    except Exception as error:  # tokenizers' errors have no class of their own, and odd values raise any
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{name} has no tokenizer.json: name a folder that has one with --tokenizer_name_or_path"
            ) from None
        reason = first_line(error)
        raise UserError(
            f"the tokenizer of {name} cannot be loaded: {reason}. Give a folder that holds a whole "
            "tokenizer.json (--tokenizer_name_or_path)"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{name} has no fast tokenizer (tokenizer.json), which the mask of answers needs")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end token, without which answers cannot end")
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files as Transformers does.

    Raises:
        OSError: naming the file that cannot be written.
    """
    with disk_errors(folder / "tokenizer.json"):
        tokenizer.save_pretrained(folder)


def _class_for(folder: Path) -> Any:
    """The class that `AutoTokenizer` finds for a folder, where that needs no torch; else `AutoTokenizer`."""
    config, tokenizer = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("config.json", "tokenizer_config.json")
    )
    is_plain = tokenizer.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in tokenizer
    if is_plain and config.get("model_type") in (None, *MODEL_TYPES):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _check_files(folder: Path) -> None:
    """Refuse malformed or oversized files, which Transformers would read unchecked."""
    for name in _SETTINGS:
        if (folder / name).exists():
            read_json(folder / name)
    if (folder / _CHAT_TEMPLATE).exists():
        read_text(folder / _CHAT_TEMPLATE, limit_bytes=_TEMPLATE_LIMIT_BYTES)


def find_tokenizer(
    model_name_or_path: str, *, tokenizer_name_or_path: str | None = None, revision: str | None = None
) -> Path:
    """The folder that holds the files of the tokenizer that `load_tokenizer` loads.

    Raises:
        UserError: if it is on the hub, and neither in the cache nor reachable.
    """
    name = tokenizer_name(model_name_or_path, tokenizer_name_or_path)
    if is_on_hub(name):
        from falcon_qlora.models.hub import fetch_tokenizer

        return fetch_tokenizer(name, revision=revision if tokenizer_name_or_path is None else None)
    folder = packaged_folder(name) or Path(name).expanduser()
    if tokenizer_name_or_path is None:
        refuse_adapter(folder)  # an adapter's own tokenizer would hide that there is no model
    return folder


def tokenizer_name(model_name_or_path: str, tokenizer_name_or_path: str | None) -> str:
    """The model, folder or hub id that the tokenizer is taken from."""
    name = tokenizer_name_or_path or model_name_or_path
    if name.startswith(RANDOM):
        # Random weights come without a tokenizer: take that of the model of this shape.
        preset = name.removeprefix(RANDOM).partition("?")[0]
        name = layout_of_preset(preset).tokenizers[preset] if preset in PRESETS else name
    return name


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides which tokens a text becomes, and of the end token."""
    backend = tokenizer.backend_tokenizer
    content = f"{backend.get_vocab_size()} {tokenizer.eos_token_id} {_without_limits(backend)}"
    return hashlib.sha256(content.encode()).hexdigest()


def check_vocabulary(tokenizer: Any, vocab_size: int, *, name: str, added: int = 0) -> None:
    """Refuse a tokenizer that gives ids the model has no embedding for.

    Args:
        tokenizer: its last `added` tokens are new, and the model is given embeddings for them.
        vocab_size: of the model as published.
        name: of the model, for messages.

    Raises:
        UserError: naming both sizes.
    """
    largest = max(len(tokenizer) - added - 1, tokenizer.eos_token_id)
    if largest >= vocab_size:
        raise UserError(
            f"{name}: the tokenizer has ids up to {largest}, the model only {vocab_size} embeddings: "
            "they do not belong together"
        )


def _without_limits(backend: Any) -> str:
    # Truncation and padding are settings that calls leave behind, not part of the tokenizer.
    if backend.truncation is None and backend.padding is None:
        return str(backend.to_str())
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return str(copy.to_str())
