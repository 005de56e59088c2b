"""Which tokenizer goes with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from falcon_qlora.errors import UserError
from falcon_qlora.models.checkpoints import RANDOM, packaged_folder

# Random weights come without a tokenizer: take the one of the shape's namesake.
_TOKENIZER_OF_PRESET = {
    "falcon-rw-1b": "tiiuae/falcon-rw-1b",
    "falcon-7b": "tiiuae/falcon-7b",
    "falcon-11b": "tiiuae/falcon-11B",
    "falcon-40b": "tiiuae/falcon-40b",
    "falcon-180b": "tiiuae/falcon-180B",
}


def tokenizer_of(model_name_or_path: str) -> str | Path:
    """The folder or hub id that holds the tokenizer of a model named as for `load_model`."""
    if model_name_or_path.startswith(RANDOM):
        preset = model_name_or_path.removeprefix(RANDOM).partition("?")[0]
        return _TOKENIZER_OF_PRESET.get(preset, model_name_or_path)
    return packaged_folder(model_name_or_path) or model_name_or_path


def check_vocabulary(tokenizer: Any, vocab_size: int, *, name: str) -> None:
    """Refuse a tokenizer that gives ids the model has no embedding for, or that has no end token.

    Raises:
        UserError: naming both sizes.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end token, without which answers cannot end")
    largest = max(len(tokenizer) - 1, tokenizer.eos_token_id)
    if largest >= vocab_size:
        raise UserError(
            f"{name}: the tokenizer has ids up to {largest}, the model only {vocab_size} embeddings: "
            "they do not belong together"
        )
