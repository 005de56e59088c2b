"""The help pages: the flags people use, and all of them."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from falcon_qlora.common.settings import Setting
from falcon_qlora.config.parser import FalconParser, recipe_names

COMMON = (
    "model_name_or_path quantize_mode dataset_name dataset_format template train_on max_length eval_split "
    "method lora_r lora_alpha lora_dropout recipe adapter config output_dir resume num_train_epochs "
    "max_steps per_device_train_batch_size global_batch_size report_to seed learning_rate"
).split()
_FLAG_COLUMN = 42


def print_help(
    parser: FalconParser, defaults: dict[str, Any], program: str, description: str, *, everything: bool
) -> None:
    """Print the flags people use, or every flag, in groups, each with its default."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    lines = [f"{program} [flags]", "", description, ""]
    groups: dict[str, list[Setting]] = {}
    for setting in parser.settings.values():
        if everything or setting.name in COMMON or setting.name in parser.extra_names:
            groups.setdefault(setting.group, []).append(setting)
    for group, settings in groups.items():
        lines.append(f"{group}:")
        for setting in settings:
            lines += _describe(setting, defaults.get(setting.name, setting.default), width, everything)
        lines.append("")
    lines += [
        f"Recipes: {', '.join(recipe_names())}.",
        "Flags win over --config, which wins over --recipe, which wins over the default recipe.",
    ]
    if not everything:
        lines.append("--help-all shows every flag.")
    print("\n".join(lines))


def _describe(setting: Setting, default: Any, width: int, everything: bool) -> list[str]:
    flags = [flag for flag in setting.flags if not flag.startswith("--")]
    long = (*setting.flags, *setting.flags_off) if everything else setting.flags
    flags += [flag for flag in long if flag.startswith("--") and "-" not in flag[2:]]
    text = setting.help
    if setting.choices:
        text += f" One of {', '.join(str(choice) for choice in setting.choices)}."
    if default not in (None, []):
        text += f" (default: {_shown(default)})"
    return _two_columns(", ".join(flags), text, width)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _two_columns(left: str, right: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(right, max(width - _FLAG_COLUMN - 2, 30)) or [""]
    left = f"  {left}"
    if len(left) >= _FLAG_COLUMN:
        return [left, *(" " * _FLAG_COLUMN + line for line in wrapped)]
    return [left.ljust(_FLAG_COLUMN) + wrapped[0], *(" " * _FLAG_COLUMN + line for line in wrapped[1:])]
