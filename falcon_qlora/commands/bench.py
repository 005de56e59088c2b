"""``falcon-qlora bench``: variants of a training step against each other, in one process on one GPU.

With ``--gpus`` whole commands on several GPUs instead, see `commands.scaling`.
"""

from __future__ import annotations

import math
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.bench.records import append_csv, check_csv
from falcon_qlora.bench.scaling import NAMES
from falcon_qlora.bench.variants import VARIANTS, Pace, Variant, choose
from falcon_qlora.commands.bench_arguments import BenchArguments, names, numbers, said_of_broken
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import check_writable
from falcon_qlora.config import Configuration, parse

if TYPE_CHECKING:
    from falcon_qlora.bench.measure import Entry, Result

_DOCUMENT_TOKENS = 512
_BY_VARIANT = (
    "quantize_mode",
    "compute_dtype",
    "checkpointing",
    "kernels",
    "lora_dropout",
    "packing",
    "padding",
)
_WITH_GPUS = ("quantize_modes", "fixed", "global_tokens", "lengths", "whole_run")


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(
        argv,
        extra_arguments=BenchArguments,
        program="falcon-qlora bench",
        description="Measure variants of a training step against each other: speed, memory, ratios. "
        "Here --steps are the timed ones (10), and --max_length is a document's tokens (512).",
    )
    wanted: BenchArguments = configuration.extra
    if wanted.list_variants:
        print("\n".join(f"{variant.name:<30} {variant.what}" for variant in VARIANTS.values()))
        print("\n".join(["", "with --gpus:", *(f"{name:<30} {what}" for name, what in NAMES.items())]))
        return 0
    _check_files(wanted)
    if wanted.gpus is not None:
        from falcon_qlora.commands import scaling

        return scaling.run(configuration, _models(configuration), _say)
    for name in _WITH_GPUS:
        if name in configuration.explicit:
            raise UserError(f"--{name} is for --gpus; give both, such as --gpus 1,2")
    on_data = "dataset_name" in configuration.explicit
    chosen = None if wanted.variants is None else names("--variants", wanted.variants)
    variants = choose(chosen, on_data=on_data, against=wanted.against)
    if wanted.against == "litgpt":
        _check_litgpt()
    sizes = numbers("--tokens", wanted.tokens)
    pace = _pace(configuration, sizes)

    # Only now: a wrong flag is told at once.
    from falcon_qlora.terminal.library_logging import quiet_libraries

    quiet_libraries()
    for name in _BY_VARIANT:
        if configuration.explicit.get(name) == "flag":
            _say(f"--{name} is set by each variant; the flag changes nothing here")
    return _bench(configuration, variants, sizes, pace, on_data=on_data)


def _check_files(wanted: BenchArguments) -> None:
    if wanted.csv:
        check_csv(Path(wanted.csv))
    if wanted.plot:
        check_writable(Path(wanted.plot), "--plot")


def _bench(
    configuration: Configuration, variants: list[Variant], sizes: list[int], pace: Pace, *, on_data: bool
) -> int:
    import torch

    from falcon_qlora.bench.clock import GpuLog
    from falcon_qlora.bench.devices import product_ceiling
    from falcon_qlora.bench.measure import Bench
    from falcon_qlora.bench.settings import Settings
    from falcon_qlora.bench.table import Machine, markdown, points, rows
    from falcon_qlora.processes import devices
    from falcon_qlora.run_folder.environment import collect_environment

    wanted: BenchArguments = configuration.extra
    length = _document_tokens(configuration)
    device = devices.local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    settings = Settings(
        r=configuration.lora.lora_r,
        alpha=configuration.lora.lora_alpha,
        max_length=length,
        seed=configuration.run.seed,
    )
    # A time limit's SIGTERM leaves the table, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = GpuLog(device)
    results: list[Result] = []
    ceilings: dict[tuple[str, str], float | None] = {}
    try:
        for model in _models(configuration):
            entries = _entries(configuration, model, variants, sizes, pace, on_data=on_data)
            bench = Bench(model, entries, settings=settings, pace=pace, device=device, log=log, say=_say)
            for dtype in {variant.compute_dtype for variant in variants}:
                ceiling = product_ceiling(device, bench.config.hidden_size, sizes[0], dtype)
                ceilings[model, dtype] = ceiling
                devices.free_memory()
                if ceiling:
                    _say(f"{model}: a plain {dtype} product runs at {ceiling:,.3g} TFLOP/s")
            results += bench.run()
            if bench.interrupted:
                break
    finally:
        log.close()
    machine = Machine(
        commit=wanted.commit or (collect_environment()["commit"] or "")[:7],
        gpu=devices.name_of(device),
        driver=log.driver,
        torch=torch.__version__,
        ceilings=ceilings,
    )
    made = rows(results, machine)
    print(markdown(made), flush=True)
    if wanted.csv:
        append_csv(Path(wanted.csv), made)
    if wanted.plot:
        from falcon_qlora.terminal.charts import draw_speed_and_memory

        draw_speed_and_memory(
            points(made), Path(wanted.plot), title=f"{machine.gpu}, {length}-token documents"
        )
    broken = [result for result in results if (result.failure or "").startswith("failed:")]
    if broken:
        _say(said_of_broken(len(broken)))
    if bench.interrupted:
        return 130
    return 1 if broken else 0


def _entries(
    configuration: Configuration,
    model: str,
    variants: list[Variant],
    sizes: list[int],
    pace: Pace,
    *,
    on_data: bool,
) -> list[Entry]:
    from falcon_qlora.bench import rows
    from falcon_qlora.bench.measure import LARGEST_BATCHES, Entry
    from falcon_qlora.models.locate import open_checkpoint

    length = _document_tokens(configuration)
    entries = []
    if on_data:
        corpus = _corpus(configuration, model, length)
        for tokens in sizes:
            packed, padded = rows.same_rows(
                corpus,
                tokens=tokens,
                max_length=length,
                batches=pace.steps_a_round,
                seed=configuration.run.seed,
            )
            for variant in variants:
                batches = packed if variant.padding is None else padded
                entries.append(Entry(variant=variant, tokens=tokens, batches=batches, whole=True))
        return entries
    vocabulary = open_checkpoint(model).config.vocab_size
    count = max(2 * max(sizes) // length, max(LARGEST_BATCHES))
    documents = rows.made_up(count, length, vocabulary, seed=configuration.run.seed)
    for variant in variants:
        # The peers' way has one batch size; ours is measured at every size.
        for tokens in sizes[:1] if variant.engine != "ours" else sizes:
            batches = rows.in_batches(documents, tokens // length)
            if variant.largest_batch:
                batches = [documents]
            entries.append(Entry(variant=variant, tokens=tokens, batches=batches))
    return entries


def _corpus(configuration: Configuration, model: str, length: int) -> Any:
    from falcon_qlora.models.locate import open_checkpoint
    from falcon_qlora.models.tokenizer import check_vocabulary
    from falcon_qlora.training import rows

    configuration.model.model_name_or_path = model
    configuration.data.max_length = length
    tokenizer = rows.load_tokenizer(configuration)
    check_vocabulary(tokenizer, open_checkpoint(model).config.vocab_size, name=model)
    corpus, _ = rows.corpora(configuration, tokenizer)
    return corpus


def _document_tokens(configuration: Configuration) -> int:
    return configuration.data.max_length if "max_length" in configuration.explicit else _DOCUMENT_TOKENS


def _models(configuration: Configuration) -> list[str]:
    wanted: BenchArguments = configuration.extra
    if wanted.models is None:
        given = "model_name_or_path" in configuration.explicit
        return [configuration.model.model_name_or_path if given else "random:falcon-7b"]
    models: list[str] = []
    for word in wanted.models:
        # A comma followed by name=value belongs to the overrides of random:falcon-7b?a=1,b=2.
        models += [model for model in re.split(r",(?!\w+=)", word) if model]
    if not models:
        raise UserError("--models: names none")
    return list(dict.fromkeys(models))


def _pace(configuration: Configuration, sizes: list[int]) -> Pace:
    wanted: BenchArguments = configuration.extra
    warmup = 3 if wanted.warmup is None else wanted.warmup
    for name, value in (("rounds", wanted.rounds), ("warmup", warmup)):
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    length = _document_tokens(configuration)
    for tokens in sizes:
        if tokens % length:
            raise UserError(
                f"--tokens {tokens}: a micro batch holds whole documents of {length} tokens (--max_length)"
            )
    steps = configuration.run.max_steps if "max_steps" in configuration.explicit else 10
    minutes = math.inf if wanted.minutes is None else wanted.minutes
    return Pace(rounds=min(wanted.rounds, steps), steps=steps, warmup=warmup, minutes=minutes)


def _check_litgpt() -> None:
    from falcon_qlora.bench.settings import is_installed

    if not is_installed("litgpt"):
        raise UserError(
            "--against litgpt: LitGPT is not installed; pip install litgpt, or leave the flag out"
        )


def _say(message: str) -> None:
    # The table alone goes to standard output.
    print(f"- {message}", file=sys.stderr, flush=True)
