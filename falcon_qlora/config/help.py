"""The help pages: a command's common flags (``--help``) and all of its flags (``--help-all``)."""

from __future__ import annotations

import re
import shutil
import textwrap
from dataclasses import replace
from typing import Any

from falcon_qlora.common.settings import Setting, settings_of
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.config.parser import RECIPES, FalconParser, recipe_names
from falcon_qlora.config.verbs import Verb

COMMON = frozenset(
    "model_name_or_path quantize_mode compute_dtype dataset_name dataset_format template train_on max_length "
    "packing eval_split method lora_r lora_alpha lora_dropout recipe adapter config output_dir overwrite "
    "resume num_train_epochs max_steps per_device_train_batch_size global_batch_size checkpointing report_to "
    "seed learning_rate gpus".split()
)
_LAUNCH = {each.name for each in settings_of(LaunchArguments)}
_DESCRIPTION = re.compile(r"^# description: (.+)$", re.M)
_FLAG_COLUMN = 38


def print_help(parser: FalconParser, defaults: dict[str, Any], verb: Verb, *, everything: bool) -> None:
    """Print a command's common flags, or all of them, in groups, each with its default."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 110)
    examples = [f"  falcon-qlora {verb.name} {words}" for words in verb.examples]
    lines = [f"falcon-qlora {verb.name} [flags]", ""]
    lines += textwrap.wrap(f"{verb.summary[0].upper()}{verb.summary[1:]}. {verb.more}".rstrip(), width)
    lines += ["", "Examples, which need no network:", *examples, ""]
    uses = verb.uses()
    groups: dict[str, list[Setting]] = {}
    for setting in parser.settings.values():
        own = setting.name in parser.extra_names
        if not own and setting.name not in uses:
            continue
        if setting.name in verb.means:
            _, *choices = setting.help.split("\n")
            setting = replace(setting, help="\n".join([verb.means[setting.name], *choices]))
        if everything or setting.name in COMMON or (own and setting.name not in _LAUNCH):
            groups.setdefault(setting.group, []).append(setting)
    for group, settings in groups.items():
        lines.append(f"{group}:")
        for setting in settings:
            default = None if setting.name in verb.means else defaults.get(setting.name, setting.default)
            lines += _describe(setting, default, width, everything)
        lines.append("")
    if verb.name == "train":
        lines.append("Recipes (--recipe), laid over the default one:")
        for name in recipe_names():
            found = _DESCRIPTION.search((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
            lines += _two_columns(name, found[1] if found else "", width, column=20)
        lines.append("")
    lines.append("Flags win over --config, which wins over --recipe (train --help has the list).")
    lines += [] if everything else ["--help-all shows every flag."]
    print("\n".join(lines))


def _describe(setting: Setting, default: Any, width: int, everything: bool) -> list[str]:
    flags = [flag for flag in setting.flags if not flag.startswith("--")]
    long = (*setting.flags, *setting.flags_off) if everything else (f"--{setting.name}",)
    flags += [flag for flag in long if flag.startswith("--") and "-" not in flag[2:]]
    text, *choices = setting.help.split("\n")
    if setting.choices and not choices:
        text += f" One of {', '.join(str(choice) for choice in setting.choices)}."
    if default not in (None, []):
        text += f" (default: {_shown(default)})"
    lines = _two_columns(", ".join(flags), text, width)
    told = [choice.partition(": ")[::2] for choice in choices]
    column = max((len(name) for name, _ in told), default=0) + 2
    for name, meaning in told:
        lines += _two_columns("", f"{name.ljust(column)}{meaning}", width, hanging=column)
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _two_columns(
    left: str, right: str, width: int, *, column: int = _FLAG_COLUMN, hanging: int = 0
) -> list[str]:
    margin, left = " " * column, f"  {left}"
    room = max(width - column, 30)
    wrapped = textwrap.wrap(right, room, subsequent_indent=" " * hanging, drop_whitespace=True) or [""]
    if len(left) >= column:
        return [left, *(margin + line for line in wrapped)]
    return [left.ljust(column) + wrapped[0], *(margin + line for line in wrapped[1:])]
