"""Keep text of a row that reads like a special token, such as ``<|endoftext|>``, as text.

Before a template sees a row's text, such stretches are put between two marks, which stay with the text
through whatever the template does. The encoder removes the marks and tokenizes what stands between them as
text, so that only what a template writes itself becomes a special token. Transformers'
``apply_chat_template(sanitize_control_tokens=True)`` does the same. The marks are halves of surrogate pairs:
`clean` removes these from the text of rows, and JSON can hold them.
"""

from __future__ import annotations

import re
from typing import Any

_OPEN, _CLOSE = "\udc80", "\udc81"
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")


class SpecialText:
    """Marks text that reads like one of a tokenizer's special tokens.

    Args:
        tokenizer: whose special tokens they are.
    """

    def __init__(self, tokenizer: Any):
        added = tokenizer.added_tokens_decoder.values()
        tokens = {str(token.content) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._tokens = frozenset(token for token in tokens if not token.isspace())
        self._lengths = sorted({len(token) for token in self._tokens}, reverse=True)
        firsts = "".join(sorted({re.escape(token[0]) for token in self._tokens}))
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")
        self.end = str(tokenizer.eos_token)

    def mark(self, value: Any) -> Any:
        """`value`, a text or lists and dicts of texts, with marks around what reads like a special token."""
        if isinstance(value, dict):
            return {key: self.mark(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.mark(each) for each in value]
        return self._mark(value) if isinstance(value, str) else value

    def _mark(self, text: str) -> str:
        parts: list[str] = []
        position = 0
        # Special tokens may be thousands, but of few lengths: a set is faster than a pattern of them all.
        for found in self._first.finditer(text):
            start = found.start()
            ends = [start + length for length in self._lengths] if start >= position else []
            end = next((end for end in ends if text[start:end] in self._tokens), None)
            if end is not None:
                parts += [text[position:start], _OPEN, text[start:end], _CLOSE]
                position = end
        return "".join([*parts, text[position:]]) if parts else text


def clean(value: Any) -> Any:
    """`value` with lone halves of surrogate pairs, which JSON may hold, replaced by U+FFFD."""
    if isinstance(value, dict):
        return {clean(key): clean(each) for key, each in value.items()}
    if isinstance(value, list):
        return [clean(each) for each in value]
    if not isinstance(value, str):
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def is_marked(text: str) -> bool:
    """Whether `text` has marks."""
    return _OPEN in text or _CLOSE in text


def unmarked(text: str) -> str:
    """`text` without marks."""
    return text.replace(_OPEN, "").replace(_CLOSE, "") if is_marked(text) else text


def split(text: str) -> list[tuple[str, bool]]:
    """The stretches that marks separate, and whether each must stay text.

    A mark still separates if a template has cut off its partner.
    """
    if not is_marked(text):
        return [(text, False)]
    parts: list[tuple[str, bool]] = []
    position = 0
    for found in _MARKED.finditer(text):
        parts += [(text[position : found.start()], False), (found[1] or "", True)]
        position = found.end()
    return [(part, literal) for part, literal in [*parts, (text[position:], False)] if part]
