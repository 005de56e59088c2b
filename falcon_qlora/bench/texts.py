"""Rows of text that become documents of chosen lengths, so that a benchmark needs no data set."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

# OpenAssistant-guanaco's, in Falcon's tokens; the spread is that of a log-normal distribution.
UNEVEN_MEAN = 324
UNEVEN_LONGEST = 2048
_UNEVEN_SIGMA = 0.8
_SHORTEST = 4
_WORD = re.compile("Ġ[a-z]{2,12}")


def even_lengths(count: int, tokens: int) -> np.ndarray:
    """``[count]``, every document of as many tokens."""
    return np.full(count, tokens, dtype=np.int64)


def uneven_lengths(count: int, longest: int, *, seed: int) -> np.ndarray:
    """Lengths as uneven as guanaco's: log-normal, cut at `longest`, of mean 324 where `longest` is 2,048.

    The quantiles of the distribution in a drawn order, so that few documents have its mean too.

    Args:
        count: of documents.
        longest: tokens; the mean goes with it.
        seed: of the order.

    Returns:
        ``[count]`` tokens.
    """
    places = np.array([NormalDist().inv_cdf((index + 0.5) / count) for index in range(count)])
    spread = np.exp(_UNEVEN_SIGMA * places)
    mean = max(_SHORTEST, UNEVEN_MEAN * longest / UNEVEN_LONGEST)

    def lengths(median: float) -> np.ndarray:
        return np.clip(np.rint(median * spread), _SHORTEST, longest).astype(np.int64)

    low, high = math.log(_SHORTEST / 4), math.log(longest)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(math.exp(middle)).mean() < mean else (low, middle)
    return np.random.default_rng(seed).permutation(lengths(math.exp(high)))


def write_texts(file: Path, tokenizer: Any, lengths: Sequence[int] | np.ndarray, *, seed: int) -> None:
    """Write a ``.jsonl`` with a ``text`` for each length, of so many tokens with the end token.

    Args:
        file: to write.
        tokenizer: Falcon's, or another that splits words byte by byte.
        lengths: tokens of each document, at least 2.
        seed: of the words.

    Raises:
        ValueError: if the tokenizer has no words that stay one token each.
    """
    words = _words(tokenizer)
    generator = np.random.default_rng(seed)
    with file.open("w", encoding="utf-8") as opened:
        for length in lengths:
            chosen = generator.integers(0, len(words), int(length) - 1)
            opened.write(json.dumps({"text": " ".join(words[index] for index in chosen)}) + "\n")


def _words(tokenizer: Any) -> list[str]:
    """Words that are one token both at the start of a text and after a blank, in a fixed order."""
    found = sorted(token[1:] for token in tokenizer.get_vocab() if _WORD.fullmatch(token))
    if found:
        alone, after = (tokenizer([f"{blank}{word}" for word in found])["input_ids"] for blank in ("", " "))
        found = [word for word, a, b in zip(found, alone, after, strict=True) if len(a) == len(b) == 1]
    if not found:
        raise ValueError("the tokenizer has no words of one token each")
    return found
