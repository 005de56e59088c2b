"""Choose which rows are held out and how often each is drawn: pure functions of the rows and a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from falcon_qlora.common.errors import UserError

_HOLD_OUT, _DRAW = 1, 2


def is_fraction(eval_split: str) -> bool:
    """Whether `eval_split` is a fraction rather than the name of data.

    Raises:
        UserError: for a number that is not between 0 and 1.
    """
    try:
        fraction = float(eval_split)
    except ValueError:
        return False
    if not 0 < fraction < 1:
        raise UserError(
            f"--eval_split {eval_split}: a fraction lies between 0 and 1, for example 0.05; "
            "otherwise name a file, a hub id, or split:NAME"
        )
    return True


def hold_out(kept: np.ndarray, content: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose the held-out documents. Rows of equal content stay together, so that none is also trained on.

    Args:
        kept: bool ``[documents]``, those with something to train on.
        content: int64 ``[documents]``, the hash of each document's row.
        fraction: of the different rows to hold out: at least one row, and all but one at most.
        seed: of the choice, which does not depend on the order of the rows.

    Returns:
        bool ``[documents]``.

    Raises:
        UserError: if there are fewer than two different rows.
    """
    contents = np.unique(content[kept])
    if len(contents) < 2:
        raise UserError(
            f"--eval_split {fraction}: this needs at least 2 different rows, found {len(contents)}"
        )
    count = min(max(round(fraction * len(contents)), 1), len(contents) - 1)
    return np.isin(content, np.random.default_rng([seed, _HOLD_OUT]).permutation(contents)[:count])


def draw(source: np.ndarray, row: np.ndarray, weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Choose which documents an epoch has, and how often. Every epoch chooses anew, and as many rows.

    Args:
        source: ``[documents]``, ascending: the index of a document's source.
        row: int64 ``[documents]``, ascending: the index of a document's row, counted through all sources.
        weights: proportions in which rows of the sources are drawn; the total number of rows does not change.
            A source is repeated whole as often as its share allows, and the rest of the share is a random
            choice of its rows.
        seed: of that choice.
        epoch: from 0.

    Returns:
        int64 indexes of documents, source by source, ascending within each repetition.
    """
    total, there = len(np.unique(row)), np.unique(source).tolist()
    drawn: list[np.ndarray] = []
    for index in there:  # a source of which nothing is left has no share
        share = weights[index] / sum(weights[each] for each in there)
        documents = np.flatnonzero(source == index)
        rows = np.unique(row[documents])
        whole, rest = divmod(max(round(total * share), 1), len(rows))
        # Epoch 0 is left out, so that it draws what earlier releases drew for every epoch.
        entropy = [seed, _DRAW, index, *[epoch] * (epoch > 0)]
        some = np.random.default_rng(entropy).choice(rows, size=rest, replace=False)
        drawn += [documents] * whole + [documents[np.isin(row[documents], some)]]
    return np.concatenate([np.zeros(0, dtype=np.int64), *drawn])
