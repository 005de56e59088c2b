"""``falcon-qlora prepare``: download everything that a run needs from the network, ahead of it.

Sizes and free space are checked first: of what is downloaded, not of the tokens of local rows. The small
parts in which mistakes show (tokenizer, data) come next, then the weights. With ``--output_dir`` it quantizes
the base into a folder instead, and reads no rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import quoted
from falcon_qlora.common.quantities import counted, sized
from falcon_qlora.common.stores import is_address
from falcon_qlora.config import Configuration, parse
from falcon_qlora.config.arguments import DataArguments, LaunchArguments
from falcon_qlora.config.parser import FalconParser
from falcon_qlora.config.verbs import VERBS
from falcon_qlora.processes.watchdog import end_native_code_after
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading

if TYPE_CHECKING:
    from falcon_qlora.models.hub import Download
    from falcon_qlora.models.prepare import Preparation

# The downloaded files, the rows as Arrow tables, and their tokens.
_COPIES_OF_A_DATA_SET = 3


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(argv, verb="prepare")
    if configuration.explicit.get("output_dir") == "flag":
        return _quantize(configuration)
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
    taken = 0
    for download in _downloads(configuration):
        print_plain(
            f"{download.kind} {download.repository}: {sized(download.total_bytes)}, "
            f"{sized(download.missing_bytes)} to download; "
            f"{sized(download.free_bytes, 1)} free in {download.cache}"
        )
        copies = _COPIES_OF_A_DATA_SET if download.kind == "dataset" else 1
        taken += download.check_disk(copies=copies, taken=taken)

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
    print_plain(f"ready: the same flags now train {_how(configuration)}{_unless_refused(argv)}")
    return 0


def _how(configuration: Configuration) -> str:
    """How training comes by its rows from now on."""
    data = configuration.data
    if data.streaming and (streamed := _on_hub(data)):
        return f"with the rows of {', '.join(streamed)} from the hub, which needs the network"
    return "without a network (HF_HUB_OFFLINE=1)"


def _unless_refused(argv: list[str]) -> str:
    """Which of the given flags only training will look at."""
    unused = VERBS["prepare"].unused(FalconParser(LaunchArguments).read_flags(argv), ())
    told = ", ".join(f"--{name}" for name in unused)
    return f", if train takes {told}: not looked at here" if unused else ""


def _on_hub(data: DataArguments) -> list[str]:
    """The sets on the hub whose rows are read, each once: to train on, and to evaluate on."""
    from falcon_qlora.data.selection import is_fraction
    from falcon_qlora.data.sources import HubSource, find_source

    names, held_out, split = [*data.dataset_name], data.eval_split, data.dataset_train_split
    if held_out is not None and not (held_out.startswith("split:") or is_fraction(held_out)):
        names.append(held_out)
    # A single file has no splits.
    sources = (find_source(name, split="train" if Path(name).is_file() else split) for name in names)
    return [*dict.fromkeys(source.name for source in sources if isinstance(source, HubSource))]


def _quantize(configuration: Configuration) -> int:
    """Write the quantized base to ``--output_dir``, completely or not at all."""
    from falcon_qlora.commands.first_look import look_at_model
    from falcon_qlora.merge.out import BASE, check_disk, check_out, new_folder

    name, out = configuration.model.model_name_or_path, Path(str(configuration.run.output_dir))
    if is_address(str(configuration.run.output_dir)):
        raise UserError(
            f"--output_dir {configuration.run.output_dir}: a base is prepared into a folder, not a URL"
        )
    if configuration.model.quantize_mode == "16bit":
        raise UserError(
            "prepare --output_dir quantizes a base: give -q 4bit or 8bit, or use the base as it is"
        )
    check_out(out, overwrite=configuration.run.overwrite, kind=BASE)
    look_at_model(name)
    end_native_code_after(configuration.run.hang_minutes)
    say_loading()
    quiet_libraries()
    from falcon_qlora.models.prepare import write_base
    from falcon_qlora.terminal.console import note, print_plain, progress

    request = _preparation(configuration)
    if request.tokenizer_folder is None:
        note(
            f"{name} has no tokenizer of its own, and none is copied: name one with --tokenizer_name_or_path"
        )
    check_out(out, overwrite=configuration.run.overwrite, kind=BASE)  # libraries took their time to load
    check_disk(out, request.needed_bytes(), BASE)
    blocks = request.checkpoint.config.num_hidden_layers
    with (
        progress() as say,
        new_folder(out, overwrite=configuration.run.overwrite, kind=BASE) as folder,
    ):
        write_base(request, folder, at_block=lambda n: say(f"quantizing {name}: block {n + 1} of {blocks}"))
    print_plain(f"wrote {out}/ ({request.scheme.words}); train on it: -m {quoted(str(out))}")
    return 0


def _preparation(configuration: Configuration) -> Preparation:
    from falcon_qlora.models.load import check_mode_runs_on, check_shapes_quantize_on, check_unchanged
    from falcon_qlora.models.locate import open_checkpoint
    from falcon_qlora.models.prepare import Preparation
    from falcon_qlora.models.schemes import Scheme
    from falcon_qlora.models.tokenizer import find_tokenizer
    from falcon_qlora.processes import devices

    settings = configuration.model
    name, tokenizer = settings.model_name_or_path, settings.tokenizer_name_or_path
    device = devices.local_device()
    dtype = devices.compute_dtype(settings.compute_dtype, device)
    check_mode_runs_on(settings.quantize_mode, dtype, device)
    checkpoint = open_checkpoint(name, revision=settings.model_revision)
    check_unchanged(checkpoint)
    if checkpoint.scheme is not None:
        raise UserError(
            f"{name} is quantized already ({checkpoint.scheme.words}): train on it with -m as it is"
        )
    check_shapes_quantize_on(checkpoint.config, settings.quantize_mode, device)
    has_one = tokenizer is not None or not name.startswith("random:")
    return Preparation(
        checkpoint=checkpoint,
        revision=settings.model_revision,
        tokenizer_folder=find_tokenizer(
            name, tokenizer_name_or_path=tokenizer, revision=settings.model_revision
        )
        if has_one
        else None,
        scheme=Scheme(mode=settings.quantize_mode, double_quantization=settings.double_quantization),
        compute_dtype=dtype,
        device=device,
    )


def _downloads(configuration: Configuration) -> list[Download]:
    """The downloads from the hub; none if it cannot be reached, as the caches may hold everything."""
    from falcon_qlora.models.hub import Unreachable, plan_dataset, plan_model
    from falcon_qlora.models.locate import is_on_hub
    from falcon_qlora.terminal.console import note

    settings, data = configuration.model, configuration.data
    downloads = []
    try:
        if is_on_hub(settings.model_name_or_path):
            downloads.append(plan_model(settings.model_name_or_path, revision=settings.model_revision))
        if not data.streaming:
            downloads += [plan_dataset(name, config=data.dataset_config) for name in _on_hub(data)]
    except Unreachable as error:
        note(f"{error}: going on with what the caches hold")
    return downloads
