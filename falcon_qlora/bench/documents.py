"""Data to measure on: made-up documents or texts of chosen lengths, or real rows packed and padded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from falcon_qlora.data.packing import Plan

Document = tuple[Any, Any]
"""Token ids ``[length]`` and, of the same length, 1 where a token is a target."""

# Mean and log-normal spread of OpenAssistant-guanaco's lengths, in Falcon's tokens.
UNEVEN_MEAN = 324
UNEVEN_LONGEST = 2048
_UNEVEN_SIGMA = 0.8
_SHORTEST = 4
_WORD = re.compile("Ġ[a-z]{2,12}")


def made_up(count: int, length: int, vocabulary: int, *, seed: int) -> list[Document]:
    """`count` documents of `length` random tokens, every token a target."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (count, length))
    return [(row, np.ones(length, dtype=bool)) for row in ids]


def same_rows(
    corpus: Any, *, tokens: int, max_length: int, batches: int, seed: int
) -> tuple[list[list[Document]], list[list[Document]]]:
    """The same rows as packed and as padded micro-batches of the same capacity.

    Args:
        corpus: tokenized documents.
        tokens: capacity of a micro-batch.
        max_length: longest length that a document is padded to.
        batches: how many packed micro-batches.
        seed: of the order.

    Returns:
        Micro-batches of as many whole documents as fit into `tokens`; and the same documents, in the same
        order, in micro-batches of ``tokens / max_length`` documents.
    """
    sequences = tokens // max_length
    plan = Plan(
        lengths=corpus.lengths,
        fingerprint=corpus.fingerprint,
        seed=seed,
        global_batch=sequences,
        max_length=max_length,
    )
    table = corpus.dataset.with_format("numpy", columns=["input_ids", "mask"])
    found = (table[plan.documents(step).tolist()] for step in range(batches))
    packed = [list(zip(each["input_ids"], each["mask"], strict=True)) for each in found]
    rows = [document for batch in packed for document in batch]
    padded = [rows[start : start + sequences] for start in range(0, len(rows), sequences)]
    return packed, padded


def uneven_mean(longest: int) -> float:
    """Mean tokens of a document of `uneven_lengths`."""
    return max(_SHORTEST, UNEVEN_MEAN * longest / UNEVEN_LONGEST)


def uneven_lengths(count: int, longest: int, *, seed: int) -> np.ndarray:
    """Lengths as uneven as guanaco's: log-normal, cut at `longest`, with mean 324 where `longest` is 2,048.

    They are the distribution's quantiles in random order, so that even few documents have its mean.

    Args:
        count: number of documents.
        longest: tokens; the mean scales with it.
        seed: of the order.

    Returns:
        ``[count]`` tokens.
    """
    places = np.array([NormalDist().inv_cdf((index + 0.5) / count) for index in range(count)])
    spread = np.exp(_UNEVEN_SIGMA * places)
    mean = uneven_mean(longest)

    def lengths(median: float) -> np.ndarray:
        return np.clip(np.rint(median * spread), _SHORTEST, longest).astype(np.int64)

    low, high = math.log(_SHORTEST / 4), math.log(longest)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(math.exp(middle)).mean() < mean else (low, middle)
    return np.random.default_rng(seed).permutation(lengths(math.exp(high)))


def write_texts(file: Path, tokenizer: Any, lengths: Sequence[int] | np.ndarray, *, seed: int) -> None:
    """Write a ``.jsonl`` with a ``text`` for each length, which counts the end token.

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
    """Words that are one token both at the start of a text and after a space, in a fixed order."""
    found = sorted(token[1:] for token in tokenizer.get_vocab() if _WORD.fullmatch(token))
    if found:
        alone, after = (tokenizer([f"{blank}{word}" for word in found])["input_ids"] for blank in ("", " "))
        found = [word for word, a, b in zip(found, alone, after, strict=True) if len(a) == len(b) == 1]
    if not found:
        raise ValueError("the tokenizer has no words of one token each")
    return found
