"""The packaged model: a small Falcon in 7B's layout with its own tokenizer, really trained.

``python -m tests.tiny_model build --out DIR`` rebuilds it.
"""

from __future__ import annotations

import json
from pathlib import Path


def tiny_path() -> Path:
    """The folder of the packaged model: ``config.json``, weights, tokenizer, held-out text and its record."""
    return Path(__file__).parent / "tiny"


def held_out_documents() -> dict[str, list[str]]:
    """Text that the packaged model was not trained on: ``{"documentation": [...], "generated": [...]}``."""
    documents: dict[str, list[str]] = json.loads((tiny_path() / "held_out.json").read_text())
    return documents
