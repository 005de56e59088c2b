"""The guide's page of flags, as the code has them: ``python -m tests.flags_page`` writes it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from falcon_qlora.commands.bench import BenchArguments
from falcon_qlora.commands.compare import CompareArguments
from falcon_qlora.commands.data import DataReportArguments
from falcon_qlora.commands.estimate import EstimateArguments
from falcon_qlora.commands.eval import EvalArguments
from falcon_qlora.commands.generate import GenerateArguments
from falcon_qlora.commands.merge import MergeArguments
from falcon_qlora.common.settings import Setting, settings_of
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.config.help import _shown
from falcon_qlora.config.parser import RECIPES, FalconParser
from falcon_qlora.config.verbs import VERBS

PAGE = Path(__file__).resolve().parents[1] / "falcon_qlora/guide/flags.md"
_OWN = {
    "data": DataReportArguments,
    "estimate": EstimateArguments,
    "generate": GenerateArguments,
    "eval": EvalArguments,
    "merge": MergeArguments,
    "compare": CompareArguments,
    "bench": BenchArguments,
}
_HEAD = """# Flags

<!-- Written by `python -m tests.flags_page`. -->

Every flag of `falcon-qlora train`, then what other commands add. Each command's `--help-all` has those
that it uses. Flags win over `--config FILE`, which wins over `--recipe NAME`; the defaults are those of
recipe `default`. A flag of true or false may stand alone.
"""


def text() -> str:
    """The page."""
    parser = FalconParser(LaunchArguments)
    defaults = parser.read_file(RECIPES / "default.yaml", "recipe default", rank=0).values
    groups: dict[str, list[Setting]] = {}
    for each in parser.settings.values():
        groups.setdefault(each.group, []).append(each)
    parts = [_HEAD]
    for group, settings in groups.items():
        parts.append(f"## {group}\n\n{_table(settings, defaults)}")
    for verb, arguments in _OWN.items():
        own = [each for each in settings_of(arguments) if each.name not in parser.settings]
        parts.append(f"## Of `{verb}` alone\n\n{VERBS[verb].summary.capitalize()}.\n\n{_table(own, {})}")
    return "\n".join(parts)


def _table(settings: Iterable[Setting], defaults: dict[str, object]) -> str:
    rows = ["| flag | default | what it sets |", "|---|---|---|"]
    for each in settings:
        names = [flag for flag in (*each.flags, *each.flags_off) if "-" not in flag.lstrip("-")]
        default = defaults.get(each.name, each.default)
        shown = "" if default in (None, []) else f"`{_shown(default)}`"
        what, *choices = each.help.split("\n")
        if choices:
            told = (choice.partition(": ")[::2] for choice in choices)
            what += " " + "; ".join(f"`{name}`: {meaning}" for name, meaning in told) + "."
        elif each.choices:
            what += f" One of {', '.join(f'`{choice}`' for choice in each.choices)}."
        flags = ", ".join(f"`{name}`" for name in names)
        rows.append(f"| {flags} | {shown} | {what.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
