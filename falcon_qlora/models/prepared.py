"""The record in a folder that ``prepare --output_dir`` wrote: of which model it is, and what its bytes are.

Transformers ignores the file. By its fingerprints adapters of the original open on the prepared base, and
the other way round; by its sums a load finds what was changed since, and by its own checksum what was changed
in the record. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import write_json
from falcon_qlora.common.record_files import PREPARED, check_format
from falcon_qlora.common.untrusted import read_json

FORMAT = 2  # 1: without a checksum of the record itself

_CHECKSUM = "sha256"  # of the record's other values


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a prepared folder says of itself.

    Attributes:
        origin: name of the model that was quantized.
        revision: of it on the hub, as it was asked for.
        fingerprints: of the original, of every form; the first is the current one.
        settings: how it was quantized: the values of the flags, and on which kind of device.
        content: `content_hash` of the folder as it was written.
        sums: name of a stored tensor → `Sums.of` its bytes.
        files: name of a file in the folder → `file_hash` of it; None from releases that did not record it.
    """

    origin: str
    revision: str | None
    fingerprints: Sequence[str]
    settings: Mapping[str, Any]
    content: str
    sums: Mapping[str, int]
    files: Mapping[str, str] | None = None


def write_prepared(folder: Path, prepared: Prepared) -> None:
    """Write the record into the folder."""
    record = {"format": FORMAT, **asdict(prepared)}
    write_json(folder / PREPARED, {**record, _CHECKSUM: _checksum(record)})


def _checksum(record: Mapping[str, Any]) -> str:
    told = {name: value for name, value in record.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_prepared(folder: Path | None) -> Prepared | None:
    """The record of a folder; None where it has none.

    Raises:
        UserError: if the file is damaged, or was changed since it was written.
    """
    file = None if folder is None else folder / PREPARED
    if file is None or not file.is_file():
        return None
    record = read_json(file)
    check_format(record, str(file), FORMAT)
    kinds = {"origin": str, "fingerprints": list, "settings": dict, "content": str, "sums": dict}
    fits = all(isinstance(record.get(name), kind) for name, kind in kinds.items())
    fits = fits and isinstance(record.get("revision"), str | None)
    fits = fits and isinstance(record.get("files"), dict | None)
    fits = (
        fits and len(record["fingerprints"]) > 0 and all(isinstance(n, str) for n in record["fingerprints"])
    )
    if not fits or not all(type(each) is int for each in record["sums"].values()):
        raise UserError(f"{file} is damaged: it is not what prepare writes. Prepare the base again")
    if record.get("format", 1) > 1 and record.get(_CHECKSUM) != _checksum(record):
        raise changed_since(folder, PREPARED)
    known: dict[str, Any] = {each.name: record.get(each.name) for each in fields(Prepared)}
    return Prepared(**known)


def changed_since(name: object, what: str) -> UserError:
    """The error for a prepared folder that is not as it was written; `what` says where."""
    return UserError(
        f"{name}: {what} is not as prepare wrote it, so the folder was changed or damaged since: prepare it "
        "again"
    )
