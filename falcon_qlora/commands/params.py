"""``falcon-qlora params``: how many parameters the model has, and how many a method trains.

This is arithmetic on the model's configuration: no weights are loaded, and no GPU is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from falcon_qlora.config import parse
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading

if TYPE_CHECKING:
    from rich.table import Table


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(argv, verb="params")
    from falcon_qlora.models.locate import is_on_hub

    if is_on_hub(configuration.model.model_name_or_path):  # else no library is loaded
        say_loading()
        quiet_libraries()
    from falcon_qlora.models.layouts import layout_of
    from falcon_qlora.models.locate import find_outline
    from falcon_qlora.terminal.console import aside, console, print_plain
    from falcon_qlora.training import start_adapter

    with aside():
        start_adapter.adopt(configuration)
    settings, method = configuration.model, configuration.method
    config = find_outline(settings.model_name_or_path, revision=settings.model_revision)
    layout, groups = layout_of(config), method.parameter_groups(config)
    total = layout.parameter_count()
    trained = sum(group.count for group in groups)
    whole = total + sum(group.count for group in groups if not group.of_base)  # as the start of a run says
    totals = {"together": f"{total:,}"}
    if config.tie_word_embeddings:
        head = config.vocab_size * config.hidden_size
        totals = {"together, the embedding being the output head too": f"{total:,}"}
        totals["with the output head counted apart"] = f"{total + head:,}"
    print_plain(f"Model: {configuration.model.model_name_or_path}")
    console().print(_table(layout.base_parameter_kinds(), totals))
    console().print(f"\nTrained: {method.describe()}")
    kinds = {group.kind + " (the base's own)" * group.of_base: group.count for group in groups}
    share = {"trained": f"{trained:,}", "of all": f"{trained / whole:.2%}"}
    console().print(_table(kinds, share))
    console().print()
    # For scripts: outside the tables, and the same on every terminal.
    print(f"trainable_parameters={trained}")
    return 0


def _table(counts: dict[str, int], totals: dict[str, str]) -> Table:
    from rich.table import Table

    table = Table(show_edge=False)
    table.add_column("parameters")
    table.add_column("count", justify="right", no_wrap=True)
    for kind, count in counts.items():
        table.add_row(kind, f"{count:,}")
    table.add_section()
    for label, total in totals.items():
        table.add_row(label, total)
    return table
