"""The methods, by the names that `--method` takes: what is not in this table does not exist elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.settings import Setting, settings_of
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.interface import Method
from falcon_qlora.methods.lora import Lora

METHODS: dict[str, type[Method]] = {method.name: method for method in (Lora, Adapter, AdapterV2, Full)}


def method_settings() -> dict[str, Setting]:
    """Name → setting, of all methods; one that several have is the first's."""
    found: dict[str, Setting] = {}
    for method in METHODS.values():
        for each in settings_of(method):
            found.setdefault(each.name, dataclasses.replace(each, group=method.title))
    return found


def method_named(name: Any, where: object) -> type[Method]:
    """The method that a file, which others may have written, calls so.

    Raises:
        UserError: if there is none.
    """
    if not isinstance(name, str) or name not in METHODS:
        told = str(name)[:40]
        raise UserError(f"{where}: the method {told!r} is not known{nearest(told, METHODS)}")
    return METHODS[name]


def method_from(settings: Mapping[str, Any], where: object) -> Method:
    """The method that a configuration names, with its settings.

    Args:
        settings: by flag, among others.
        where: whence they are, for messages.

    Raises:
        UserError: if there is no such method, or a setting cannot be.
    """
    return method_named(settings.get("method"), where).read(settings, where, by_flag=True)


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether what a folder's record is about is a whole model, no adapter."""
    name = record.get("method")
    return isinstance(name, str) and name in METHODS and METHODS[name].is_whole
