"""Text in Markdown, which a hub shows as a page: what others wrote must be no markup, link or HTML in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from falcon_qlora.common.errors import printable

# Where it is markup in GitHub's and the hub's Markdown: an underscore is none between letters, and what
# looks like an address becomes a link by itself.
_MARKUP = re.compile(
    r"[\\`*\[\]<>|~&#$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|(?<=mailto):|(?<=xmpp):", re.I
)


def escaped(text: str) -> str:
    """`text` on one line of Markdown, where it is shown as it is."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def code(text: str) -> str:
    """`text` as code in a line of Markdown; not in a table, whose cells are escaped."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}" if text else ""


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of texts; a row with fewer cells than titles is filled up with empty ones."""
    padded = ([*row, *[""] * (len(titles) - len(row))] for row in rows)
    head, *lines = (f"| {' | '.join(map(escaped, cells))} |" for cells in (titles, *padded))
    return [head, "|" + "---|" * len(titles), *lines]
