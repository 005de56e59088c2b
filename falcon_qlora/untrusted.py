"""Reading what others may have written: small, plain, inside its folder, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from falcon_qlora.errors import UserError

# Beyond any configuration, index or tokenizer that a model comes with.
JSON_LIMIT_BYTES = 2**26


def read_json(file: Path, *, limit_bytes: int = JSON_LIMIT_BYTES, not_finite: bool = False) -> dict[str, Any]:
    """The JSON object that `file` holds.

    Args:
        limit_bytes: refuse a larger one.
        not_finite: let numbers be ``NaN`` and ``Infinity``, as Python writes them.

    Raises:
        UserError: if it is not there, too large, not UTF-8, not JSON, or not an object.
    """
    try:
        size = file.stat().st_size
        if size > limit_bytes:
            raise UserError(f"{file} has {size:,} bytes, which no such file needs; it was not read.")
        refuse = None if not_finite else _no_such_number
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise UserError(f"{file} is not there.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not valid: it holds a JSON {type(content).__name__}, not an object.")
    return content


def _no_such_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def file_beside(named_in: Path, name: Any) -> Path:
    """The file called `name` in the folder of `named_in`, which names it.

    Raises:
        UserError: if it is anything but a file name, such as a path that leads out of the folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise UserError(
            f"{named_in} names {str(name)!r}, which is not a file of its own folder; it was not opened."
        )
    return named_in.parent / name
