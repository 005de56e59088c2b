"""Ranks that train together have the same data, base, tokenizer, settings and packages, or none trains."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import falcon_qlora
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import Configuration
from falcon_qlora.config.paths import PLACES
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.models.fingerprint import model_fingerprint, shown
from falcon_qlora.models.locate import open_checkpoint
from falcon_qlora.models.tokenizer import tokenizer_fingerprint
from falcon_qlora.processes import agreement, devices, ranks
from falcon_qlora.run_folder.environment import package_versions
from falcon_qlora.training.rows import TrainingData, row_settings

_SHOWN = 60
_DIGITS = 16  # of a hash: it has to show an accident


def check_alike(configuration: Configuration, data: TrainingData, tokenizer: Any) -> None:
    """Compare what all processes train with, in one exchange; every process calls this.

    Files may lie elsewhere on each node: what is in them is compared. Missing files of the base are fetched.

    Raises:
        UserError: naming the hosts, and what differs.
    """
    if ranks.world_size() == 1:
        return
    everyone = agreement.met_by_main((socket.gethostname(), _facts(configuration, data, tokenizer)))
    agreement.from_main_process(lambda: _refuse(differences(everyone)))


def _refuse(told: Sequence[str]) -> None:
    if told:
        raise UserError("the ranks are not alike, so nothing was trained. Give all of them the same:", *told)


def differences(everyone: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """What is not alike, a line each.

    Args:
        everyone: of each rank its host, and its facts: a name → the value, of which the beginning is shown. A
            fact that a rank does not give is not compared.
    """
    first_host, first = everyone[0]
    found: dict[tuple[str, str], dict[str, None]] = {}
    for rank, (host, facts) in enumerate(everyone):
        for name, value in facts.items():
            if name in first and value != first[name]:
                which = host if host != first_host else f"rank {rank} on {host}"
                found.setdefault((name, value), {})[which] = None
    return [
        f"  {name}: {first[name][:_SHOWN]} on {first_host}, {value[:_SHOWN]} on {', '.join(hosts)}"
        for (name, value), hosts in found.items()
    ]


def _facts(configuration: Configuration, data: TrainingData, tokenizer: Any) -> dict[str, str]:
    facts = {
        "tokenizer": tokenizer_fingerprint(tokenizer)[:_DIGITS],
        "template": str(data.record["template_fingerprint"])[:_DIGITS],
        "falcon-qlora's code": _code(),
        "python": platform.python_version(),
        "dtype": str(devices.compute_dtype(configuration.model.compute_dtype)).removeprefix("torch."),
        **package_versions(),
    }
    for name, record in (("data", data.record), ("held-out data", data.record.get("held_out") or {})):
        if "fingerprint" in record:
            facts[name] = f"{record['documents']:,} documents, {record['fingerprint'][:_DIGITS]}"
    if ranks.local_process_index() == 0:  # once on each node, whose ranks read the same files
        facts |= _files(configuration)
    settings = {name: value for name, value in configuration.resolved().items() if name not in PLACES}
    return facts | {f"--{name}": json.dumps(value, default=str) for name, value in settings.items()}


def _files(configuration: Configuration) -> dict[str, str]:
    """What is in the base's files, and in those of a stream."""
    model, found = configuration.model, {}
    open_checkpoint(model.model_name_or_path, revision=model.model_revision)
    told = model_fingerprint(model.model_name_or_path, revision=model.model_revision)
    if told is not None:
        found["base model"] = shown(told)
    if configuration.data.streaming:
        sources = RowSettings(**row_settings(configuration.data)).sources()
        described = json.dumps([source.describe() for source in sources], sort_keys=True, default=str)
        found["data"] = hashlib.sha256(described.encode()).hexdigest()[:_DIGITS]
    return found


def _code() -> str:
    digest, package = hashlib.sha256(), Path(falcon_qlora.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:_DIGITS]
