"""New tokens: as a user names them, in a tokenizer, and as PEFT records their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import is_count, read_text

_FILE, _FILE_LIMIT_BYTES = ".txt", 2**20
_MOST_ROWS, _LARGEST_ID = 2**16, 2**24


def named_tokens(words: Sequence[str]) -> list[str]:
    """The tokens that these words name: the words themselves, or the lines of a single .txt file.

    Raises:
        UserError: if the file cannot be read or is empty.
    """
    if len(words) != 1 or not words[0].endswith(_FILE):
        return list(words)
    file = Path(words[0]).expanduser()
    if not file.is_file():
        raise UserError(f"--new_tokens {file}: there is no such file")
    lines = [line for line in read_text(file, limit_bytes=_FILE_LIMIT_BYTES).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--new_tokens {file}: the file is empty; expected one token a line")
    return lines


def check_tokens(tokens: Sequence[str]) -> None:
    """Refuse what cannot be a new token.

    Raises:
        UserError: naming the first one.
    """
    if len(tokens) > _MOST_ROWS:
        raise UserError(f"--new_tokens: {len(tokens):,} are too many; at most {_MOST_ROWS:,}")
    seen: set[str] = set()
    for token in tokens:
        if not token or " " in token or not token.isprintable():
            raise UserError(
                f"--new_tokens: {token[:80]!r} is empty, or has white space or control characters in it"
            )
        if token in seen:
            raise UserError(f"--new_tokens: {token!r} is named twice")
        seen.add(token)


def add_to(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Make `tokens` special tokens of a tokenizer: found anywhere in a text, and never split.

    Raises:
        UserError: if it has one of them already.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise UserError(
                f"--new_tokens: {token!r} is a token of this tokenizer already (id {known[token]}), with an "
                "embedding of its own. Leave it out: it can be used as it is"
            )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True
    )


def rows_in(settings: Any, where: Path) -> tuple[tuple[int, ...], bool]:
    """The ids of PEFT's ``trainable_token_indices``, and whether an untied head is trained too.

    Args:
        settings: a list of ids, or one for the embedding and one for the head by their names.
        where: the file, for messages.

    Raises:
        UserError: if they are not ids, or the two lists differ.
    """
    of_both = isinstance(settings, dict)
    lists = list(settings.values()) if of_both else [settings]
    if of_both and any(str(name).rpartition(".")[2] == "lm_head" for name in settings) != (len(lists) == 2):
        lists = []
    if not lists or any(each != lists[0] for each in lists):
        raise UserError(
            f"{where}: trainable_token_indices are supported for the embedding, or for embedding and head "
            "with the same tokens"
        )
    ids = lists[0]
    are_ids = isinstance(ids, list) and all(is_count(each, least=0, most=_LARGEST_ID) for each in ids)
    if not are_ids or not 1 <= len(ids) <= _MOST_ROWS or len(set(ids)) != len(ids):
        raise UserError(f"{where}: trainable_token_indices are {str(ids)[:80]}; expected ids, each once")
    return tuple(ids), len(lists) == 2


def grown(ids: Sequence[int], vocabulary: int) -> int:
    """How many embeddings a model with `vocabulary` of them needs, to have one for each of `ids`.

    Raises:
        UserError: if some of the added ones would be untrained.
    """
    beyond = sorted(each for each in ids if each >= vocabulary)
    if beyond != list(range(vocabulary, vocabulary + len(beyond))):
        raise UserError(
            f"rows of tokens {beyond[0]} to {beyond[-1]} were trained, but the base's embeddings end at "
            f"{vocabulary - 1}; is it another base?"
        )
    return vocabulary + len(beyond)
