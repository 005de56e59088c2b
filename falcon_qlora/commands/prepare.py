"""``falcon-qlora prepare``: download everything that a run needs from the network, ahead of it.

Sizes and free space are checked first. The small parts in which mistakes show (tokenizer, data) come next,
then the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from falcon_qlora.common.quantities import counted, gib
from falcon_qlora.config import Configuration, parse
from falcon_qlora.processes.watchdog import end_native_code_after
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading

if TYPE_CHECKING:
    from falcon_qlora.models.hub import Download

# The downloaded files, the rows as Arrow tables, and their tokens.
_COPIES_OF_A_DATA_SET = 3


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(argv, verb="prepare")
    # Only now, so that a wrong flag is reported at once.
    end_native_code_after(configuration.run.hang_minutes)
    say_loading()
    quiet_libraries()
    from falcon_qlora.commands.first_look import look_at_model, look_at_rows

    if configuration.run.adapter is None or "model_name_or_path" in configuration.explicit:
        look_at_model(configuration.model.model_name_or_path)
    look_at_rows(configuration.data, configuration.data.eval_split)
    from falcon_qlora.models.checkpoints import read_folder_config
    from falcon_qlora.models.locate import find_folder
    from falcon_qlora.models.tokenizer import check_vocabulary
    from falcon_qlora.terminal.console import console, note, patience, print_plain
    from falcon_qlora.training import rows, start_adapter

    start_adapter.adopt(configuration)
    settings, data = configuration.model, configuration.data
    name = settings.model_name_or_path
    for download in _downloads(configuration):
        print_plain(
            f"{download.kind} {download.repository}: {gib(download.total_bytes)}, "
            f"{gib(download.missing_bytes)} to download; "
            f"{gib(download.free_bytes, 1)} free in {download.cache}"
        )
        download.check_disk(copies=_COPIES_OF_A_DATA_SET if download.kind == "dataset" else 1)

    tokenizer = rows.load_tokenizer(configuration.model, configuration.method)
    if data.streaming:
        note("--streaming reads rows during training: rows from the hub will need the network then")
    else:
        with patience() as doing:
            corpus, held_out = rows.corpora(data, tokenizer, seed=configuration.run.seed, progress=doing)
        console().print(
            f"data: {counted(len(corpus.lengths), 'document')}, {counted(int(corpus.lengths.sum()), 'token')}"
            + (f"; held out {counted(len(held_out.lengths), 'document')}" if held_out is not None else "")
            + ", tokenized and cached"
        )

    if name.startswith("random:"):
        print_plain(f"model: {name} is made on the device, there is nothing to download")
    else:
        folder = find_folder(name, revision=settings.model_revision)
        size, added = read_folder_config(folder).vocab_size, configuration.method.new_token_count
        check_vocabulary(tokenizer, size, name=name, added=added)
        print_plain(f"model: {name} is in {folder}")
    console().print("ready: the same flags now train without a network (HF_HUB_OFFLINE=1)")
    return 0


def _downloads(configuration: Configuration) -> list[Download]:
    """The downloads from the hub; none if it cannot be reached, as the caches may hold everything."""
    from falcon_qlora.data.sources import HubSource, find_source
    from falcon_qlora.models.hub import Unreachable, plan_dataset, plan_model
    from falcon_qlora.models.locate import is_on_hub
    from falcon_qlora.terminal.console import note

    settings, data = configuration.model, configuration.data
    downloads = []
    try:
        if is_on_hub(settings.model_name_or_path):
            downloads.append(plan_model(settings.model_name_or_path, revision=settings.model_revision))
        if not data.streaming:
            sources = [find_source(name, split=data.dataset_train_split) for name in data.dataset_name]
            names = [source.name for source in sources if isinstance(source, HubSource)]
            downloads += [plan_dataset(name, config=data.dataset_config) for name in names]
    except Unreachable as error:
        note(f"{error}: going on with what the caches hold")
    return downloads
