"""Reading what others may have written: small, plain, inside its folder, or refused with a reason."""

from __future__ import annotations

import contextlib
import json
import stat
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from falcon_qlora.common.errors import UserError, one_line

# Beyond any configuration, index or tokenizer that a model comes with.
JSON_LIMIT_BYTES = 2**26
# Beyond any settings, which YAML takes its time for.
YAML_LIMIT_BYTES = 2**18


def read_text(file: Path, *, limit_bytes: int = JSON_LIMIT_BYTES, may_be_pipe: bool = False) -> str:
    """The text that `file` holds.

    Args:
        file: what to read.
        limit_bytes: a larger one is not read.
        may_be_pipe: the user has named it, and waits for it as for any other.

    Raises:
        UserError: if it is not there, no file, too large or not UTF-8.
    """
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode) and not (may_be_pipe and stat.S_ISFIFO(about.st_mode)):
            raise UserError(f"{file} is not a file")
        if about.st_size > limit_bytes:
            raise UserError(
                f"{file} is too large ({about.st_size:,} bytes; limit {limit_bytes:,}); it was not read"
            )
        with file.open("rb") as opened:
            content = opened.read(limit_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"{file} is not there") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # of a name that none can have
        raise UserError(f"{str(file)!r} cannot be read: {error}") from None
    if len(content) > limit_bytes:  # of a pipe, whose size nobody knows
        raise UserError(f"{file} is too large (limit {limit_bytes:,} bytes)")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid: not text in UTF-8 ({error.reason})") from None


def read_json(file: Path, *, limit_bytes: int = JSON_LIMIT_BYTES, not_finite: bool = False) -> dict[str, Any]:
    """The JSON object that `file` holds.

    Args:
        limit_bytes: refuse a larger one.
        not_finite: let numbers be ``NaN`` and ``Infinity``, as Python writes them.

    Raises:
        UserError: if it is not there, no file, too large, not UTF-8, not JSON, or not an object.
    """
    text = read_text(file, limit_bytes=limit_bytes)
    try:
        content = json.loads(text, parse_constant=None if not_finite else _no_such_number)
        if "\\u" in text:
            # Halves of characters cannot be written again; bytes of a path that are no UTF-8 can.
            json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not valid: it holds a JSON {type(content).__name__}, not an object")
    return content


def read_yaml(file: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds; {} for an empty one.

    Raises:
        UserError: as `read_json`; and for a key given twice, or an alias.
    """
    return parse_yaml(read_text(file, limit_bytes=YAML_LIMIT_BYTES), str(file))


def parse_yaml(text: str, origin: str) -> dict[Any, Any]:
    """The mapping in `text`; {} for none.

    Args:
        text: YAML.
        origin: whence it is, for messages.

    Raises:
        UserError: if it is anything else; and for a key given twice, or an alias.
    """
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{origin}{line}: not valid YAML: {one_line(error.problem)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: of dates and numbers that are none.
        raise UserError(f"{origin}: not valid YAML: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{origin}: expected lines of `setting: value`, found a {type(content).__name__}")
    return content


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here that is an error.

    So is an alias: a few lines of them stand for more than fits any memory.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor}: aliases are not read; write it out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def is_count(value: Any, *, least: int = 0, most: int | None = None) -> bool:
    """Whether `value` is a whole number from `least` to `most`; True and False are none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= least and (most is None or value <= most)


def is_number(value: Any) -> bool:
    """Whether `value` is a number that a float can hold: finite, and neither True nor False."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # whole numbers of any length are read from JSON
    )


def _no_such_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def leads_out(file: Path, folder: Path) -> bool:
    """Whether `file` of a folder is a link to what is not of the folder.

    In the hub's cache the files of a snapshot are links to those beside the snapshots.
    """
    if not file.is_symlink():
        return False
    root = next((each.parent for each in folder.absolute().parents if each.name == "snapshots"), folder)
    try:
        return not file.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link to itself
        return True


def refuse_links(folder: Path) -> None:
    """Refuse a folder whose files are others' by a link: what is read of it, or copied, must be its own.

    Folders in it may be links: checkpoints lie on another disk at times.

    Raises:
        UserError: naming the first.
    """
    for file in sorted(folder.iterdir()):
        if leads_out(file, folder) and not file.is_dir():
            raise UserError(
                f"{file} is a link that leads out of {folder}; nothing was read. Put a copy in its place"
            )


@contextlib.contextmanager
def of_a_run(folder: Path) -> Iterator[None]:
    """Turn what goes wrong where the figures of a run's files are used into a `UserError` that names it."""
    refuse_links(folder)
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        told = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{folder}: its files are not valid ({told}); run it again") from None


def file_beside(named_in: Path, name: Any) -> Path:
    """The file called `name` in the folder of `named_in`, which names it.

    Raises:
        UserError: if it is anything but a file name, such as a path that leads out of the folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise UserError(
            f"{named_in} names {str(name)!r}, which is not a file of its own folder; it was not opened"
        )
    return named_in.parent / name
