"""``falcon-qlora params``: how many parameters the model has, and how many a method trains.

Arithmetic on the model's configuration: nothing is loaded, and no GPU is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from falcon_qlora.commands.train import LaunchArguments
from falcon_qlora.config import parse

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedConfig

    from falcon_qlora.methods.interface import Method


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(
        argv,
        extra_arguments=LaunchArguments,  # the words of `train` do, also where they change no count
        program="falcon-qlora params",
        description="Count the model's parameters and those that a method trains, without loading anything.",
    )
    # Only now: a wrong flag is told at once.
    from falcon_qlora.terminal.library_logging import quiet_libraries

    quiet_libraries()

    from falcon_qlora.methods.interface import trainable_count
    from falcon_qlora.terminal.console import console
    from falcon_qlora.training.method import configured_method
    from falcon_qlora.training.preflight import read_config

    config, method = read_config(configuration), configured_method(configuration)
    trainable = trainable_count(method, config)
    console().print(f"Model: {configuration.model.model_name_or_path}", markup=False, highlight=False)
    console().print(_of_model(config))
    console().print(f"\nTrained: {method.describe()}", markup=False, highlight=False)
    console().print(_of_method(method, config))
    console().print()
    # For scripts: apart from the tables, and as it is on every terminal.
    print(f"trainable_parameters={trainable}")
    return 0


def _of_model(config: PreTrainedConfig) -> Table:
    from falcon_qlora.models.layouts import layout_of

    table = _table()
    for kind, count in layout_of(config).base_parameter_kinds().items():
        table.add_row(kind, f"{count:,}")
    table.add_section()
    total, head = layout_of(config).parameter_count(), config.vocab_size * config.hidden_size
    if config.tie_word_embeddings:
        table.add_row("together, the embedding being the output head too", f"{total:,}")
        table.add_row("with the output head counted apart", f"{total + head:,}")
    else:
        table.add_row("together", f"{total:,}")
    return table


def _of_method(method: Method, config: PreTrainedConfig) -> Table:
    from falcon_qlora.models.layouts import layout_of

    table = _table()
    groups = method.parameter_groups(config)
    for group in groups:
        table.add_row(group.kind + (" (the base's own)" if group.of_base else ""), f"{group.count:,}")
    table.add_section()
    trained = sum(group.count for group in groups)
    table.add_row("trained", f"{trained:,}")
    table.add_row("of the base's, %", f"{100 * trained / layout_of(config).parameter_count():.4f}")
    return table


def _table() -> Table:
    from rich.table import Table

    table = Table(show_edge=False)
    table.add_column("parameters")
    table.add_column("count", justify="right")
    return table
