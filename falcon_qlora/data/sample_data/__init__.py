"""The sample data of the package: small instruction rows that the packaged model can really learn.

``instructions.jsonl`` holds Alpaca rows; ``prompts.json`` three prompts that are not among them, to be
answered before and after fine-tuning. ``python -m tests.sample_rows build`` wrote both.
"""

from __future__ import annotations

import json
from pathlib import Path


def path() -> Path:
    """The packaged instruction rows: a ``.jsonl`` file with `instruction`, `input` and `output`."""
    return Path(__file__).parent / "instructions.jsonl"


def prompts_path() -> Path:
    """The packaged prompts: a JSON list of three strings."""
    return Path(__file__).parent / "prompts.json"


def prompts() -> list[str]:
    """Three prompts that no packaged row answers."""
    texts: list[str] = json.loads(prompts_path().read_text(encoding="utf-8"))
    return texts
