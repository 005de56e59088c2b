"""The methods, by the names that `--method` takes; a method exists only through this table."""

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
    """Name → setting, of all methods; for a shared setting, the first method's."""
    found: dict[str, Setting] = {}
    for method in METHODS.values():
        for each in settings_of(method):
            found.setdefault(each.name, dataclasses.replace(each, group=method.title))
    return found


def method_named(name: Any, where: object) -> type[Method]:
    """The method of this name in a file, which others may have written.

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
        where: where they come from, for messages.

    Raises:
        UserError: if there is no such method, or a setting is invalid.
    """
    return method_named(settings.get("method"), where).read(settings, where, by_flag=True)


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a folder's record is of a whole model rather than an adapter."""
    name = record.get("method")
    return isinstance(name, str) and name in METHODS and METHODS[name].is_whole
