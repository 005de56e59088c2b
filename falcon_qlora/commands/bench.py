"""``falcon-qlora bench``: compare variants of a training step, in one process on one GPU.

With ``--gpus`` it measures whole commands on several GPUs instead: see `commands.scaling`.
"""

from __future__ import annotations

import functools
import math
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from falcon_qlora.bench import say, scaling
from falcon_qlora.bench.tables import append_csv, check_csv
from falcon_qlora.bench.variants import VARIANTS, Pace, Variant, choose
from falcon_qlora.commands.first_look import look_at_model, look_at_rows
from falcon_qlora.commands.words import names, numbers
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import check_writable
from falcon_qlora.common.quantities import counted
from falcon_qlora.common.settings import setting, settings_of
from falcon_qlora.config import Configuration, parse
from falcon_qlora.config.parser import refuse
from falcon_qlora.methods.lora import Lora
from falcon_qlora.processes.watchdog import end_native_code_after
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading

if TYPE_CHECKING:
    from falcon_qlora.bench.measure import Result

_DOCUMENT_TOKENS = 512
_WITH_GPUS = "quantize_modes fixed global_tokens lengths whole_run".split()


@dataclass(kw_only=True)
class BenchArguments:
    """What is compared, how long, and where the figures go."""

    _argument_group_name = "Benchmark"

    models: list[str] | None = setting(
        None, "Models, also with commas between; unset: --model_name_or_path, else random:falcon-7b."
    )
    variants: list[str] | None = setting(
        None, "What to compare, in the table's order, also with commas between; unset: the usual."
    )
    list_variants: bool = setting(False, "Show the variants there are, and end.")
    tokens: list[str] = setting(["8192"], "Tokens of a micro batch, one or several.")
    whole_run: bool = setting(
        False,
        "With --gpus: time whole runs of 200 --steps of 16,384 --tokens, with their saves, to the adapter "
        "on disk, with cold and warm caches.",
    )
    rounds: int = setting(5, "How often every variant has its turn.", least=1)
    warmup: int | None = setting(
        None, "Untimed steps before the timed ones; unset: 3, with --gpus 10.", least=0
    )
    gpus: list[str] | None = setting(
        None,
        "Run the real command on so many GPUs, one after the other (1,2,4,8), 20 timed --steps each, and on "
        "each of these GPUs alone, whose sum is the measure. --variants are then ours, ours-fp8.",
    )
    quantize_modes: list[str] | None = setting(None, "With --gpus: how bases are stored, one or several.")
    fixed: Literal["work", "global"] = setting(
        "work",
        "With --gpus: each GPU has the same work on any number of them, or a step has --global_tokens over "
        "all.",
    )
    global_tokens: int = setting(131072, "Of a step with --fixed global.")
    lengths: Literal["even", "uneven"] = setting(
        "even", "With --gpus and made-up rows: documents of --max_length tokens, or uneven as guanaco's."
    )
    minutes: float | None = setting(
        None, "Begin no further round of a model, with --gpus no further row, after this long.", least=0
    )
    csv: str | None = setting(None, "Append a row a variant to this CSV.")
    plot: str | None = setting(
        None, "PNG of tokens/s against peak memory; with --gpus of samples/s over GPUs."
    )
    commit: str | None = setting(None, "For the record, where this is no checkout.")


def main(argv: list[str], *, whole_runs: Any = scaling.whole_runs) -> int:
    """Run the command and return its exit status.

    Args:
        argv: the words after ``falcon-qlora bench``.
        whole_runs: does what ``--whole_run`` asks for.
    """
    configuration = parse(argv, verb="bench", extra_arguments=BenchArguments)
    end_native_code_after(configuration.run.hang_minutes)
    wanted: BenchArguments = configuration.extra
    if wanted.list_variants:
        print("\n".join(f"{variant.name:<30} {variant.what}" for variant in VARIANTS.values()))
        commands = (f"{name:<30} {command.what}" for name, command in scaling.COMMANDS.items())
        print("\n".join(["", "with --gpus:", *commands]))
        return 0
    refuse(_idle(configuration))
    if wanted.csv:
        check_csv(Path(wanted.csv))
    if wanted.plot:
        check_writable(Path(wanted.plot), "--plot")
    models = _models(configuration)
    for model in models:
        look_at_model(model)
    if "max_length" not in configuration.explicit:
        configuration.data.max_length = _DOCUMENT_TOKENS
    if wanted.gpus is not None:
        from falcon_qlora.commands.scaling import run

        _look_at_rows(configuration)
        return run(configuration, models, whole_runs)
    lora = _lora(configuration)
    chosen = None if wanted.variants is None else names("--variants", wanted.variants)
    variants = choose(chosen, on_data="dataset_name" in configuration.explicit)
    sizes = numbers("--tokens", wanted.tokens)
    pace = _pace(configuration, sizes)
    _look_at_rows(configuration)

    # Only now, so that a wrong flag is reported at once.
    say_loading(aside=True)
    quiet_libraries()
    return _bench(configuration, lora, models, variants, sizes, pace)


def _idle(configuration: Configuration) -> list[str]:
    """What is wrong with flags that would change nothing."""
    wanted, given = configuration.extra, configuration.explicit
    if wanted.gpus is None:
        with_gpus = [name for name in _WITH_GPUS if name in given]
        return [f"--{name} is a setting of --gpus: give that too, such as --gpus 1,2" for name in with_gpus]
    faults = []
    if "rounds" in given:
        faults.append("--rounds does nothing with --gpus, which measures every row once: drop it")
    if "global_tokens" in given and wanted.fixed != "global":
        faults.append(
            f"--global_tokens does nothing with --fixed {wanted.fixed}: give --fixed global, or drop it"
        )
    if "lengths" in given and "dataset_name" in given:
        faults.append("--lengths does nothing with --dataset_name, whose rows have their own: drop it")
    return faults


def _look_at_rows(configuration: Configuration) -> None:
    if "dataset_name" in configuration.explicit:
        look_at_rows(configuration.data, None)


def status_of(failures: Sequence[str | None]) -> int:
    """The exit status for rows that failed for these reasons; also prints how many broke, or that all did."""
    broken = sum((failure or "").startswith("failed:") for failure in failures)
    nothing = bool(failures) and all(failures)
    if broken:
        say(f"{counted(broken, 'row')} failed; see the table")
    elif nothing:
        say("nothing was measured; the table says why")
    return 1 if broken or nothing else 0


def _lora(configuration: Configuration) -> Lora:
    """The method, whose rank and scale hold for all variants; its other settings must be the defaults.

    Raises:
        UserError: naming another method or setting that was asked for.
    """
    lora, explicit = configuration.method, configuration.explicit
    if not isinstance(lora, Lora):
        raise UserError(f"--method {lora.name}: the variants are of LoRA; --gpus measures the other methods")
    faults: list[str] = []
    for each in settings_of(Lora):
        of_recipe = explicit.get(each.name, "recipe ").startswith("recipe ")
        is_free = each.name in ("lora_r", "lora_alpha", "lora_dropout")
        if not (is_free or of_recipe or getattr(lora, each.field) == each.default):
            faults.append(
                f"--{each.name}: the variants train plain LoRA on all linears; --gpus measures it with the "
                "other settings"
            )
    refuse(faults)
    return lora


def _bench(
    configuration: Configuration,
    lora: Lora,
    models: list[str],
    variants: list[Variant],
    sizes: list[int],
    pace: Pace,
) -> int:
    import torch

    from falcon_qlora.bench.devices import product_ceiling
    from falcon_qlora.bench.machine import GpuLog, Machine
    from falcon_qlora.bench.measure import Bench
    from falcon_qlora.bench.runners import Settings
    from falcon_qlora.bench.tables import rows_of_steps, speed_over_memory, steps_in_markdown
    from falcon_qlora.processes.devices import free_memory, local_device
    from falcon_qlora.run_folder.environment import collect_environment
    from falcon_qlora.terminal.charts import draw_speed_and_memory

    wanted: BenchArguments = configuration.extra
    length = configuration.data.max_length
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    settings = Settings(r=lora.r, alpha=lora.alpha, max_length=length, seed=configuration.run.seed)
    # All are looked up before the first is measured.
    planned = {model: _rows(configuration, model, variants, sizes, pace) for model in models}
    # SIGTERM from a time limit ends like Ctrl-C: the table is still printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = GpuLog(device)
    results: list[Result] = []
    failed: UserError | None = None
    ceilings: dict[tuple[str, str], float | None] = {}
    try:
        for model, rows in planned.items():
            bench = Bench(
                model,
                rows,
                settings=settings,
                pace=pace,
                device=device,
                log=log,
                revision=configuration.model.model_revision,
            )
            for dtype in {variant.compute_dtype for variant in variants}:
                ceiling = product_ceiling(device, bench.config.hidden_size, sizes[0], dtype)
                ceilings[model, dtype] = ceiling
                free_memory()
                if ceiling:
                    say(f"{model}: a plain {dtype} product runs at {ceiling:,.3g} TFLOP/s")
            results += bench.run()
            if bench.interrupted:
                break
    except UserError as error:  # of a later model; what was measured is kept
        if not results:
            raise
        failed = error
    finally:
        log.close()
    machine = Machine.of(collect_environment(), wanted.commit)
    made = rows_of_steps(results, machine, ceilings)
    print(steps_in_markdown(made), flush=True)
    if wanted.csv:
        append_csv(Path(wanted.csv), made)
    if wanted.plot:
        title = f"{machine.gpu}, {length}-token documents"
        draw_speed_and_memory(speed_over_memory(made), Path(wanted.plot), title=title)
    if failed is not None:
        raise failed
    status = status_of([result.failure for result in results])
    return 130 if bench.interrupted else status


def _rows(
    configuration: Configuration, model: str, variants: list[Variant], sizes: list[int], pace: Pace
) -> list[Result]:
    from falcon_qlora.bench.documents import made_up, same_rows
    from falcon_qlora.bench.measure import LARGEST_BATCHES, Result
    from falcon_qlora.models.layouts import layout_of
    from falcon_qlora.models.locate import open_checkpoint
    from falcon_qlora.models.tokenizer import check_vocabulary
    from falcon_qlora.training import rows

    length, seed = configuration.data.max_length, configuration.run.seed
    checkpoint = open_checkpoint(model, revision=configuration.model.model_revision)
    config, stored = checkpoint.config, checkpoint.scheme
    others = [variant.name for variant in variants if stored and variant.quantize_mode != stored.mode]
    if stored and others:
        own = ", ".join(name for name in ("ours", "ours-8bit") if VARIANTS[name].quantize_mode == stored.mode)
        raise UserError(
            f"--variants {','.join(others)}: {model} is stored in {stored.mode}; "
            f"measure variants of that, such as {own}"
        )
    row = functools.partial(Result, model=model, parameters=layout_of(config).parameter_count())
    made = []
    if "dataset_name" in configuration.explicit:
        configuration.model.model_name_or_path = model
        tokenizer = rows.load_tokenizer(configuration.model)
        check_vocabulary(tokenizer, config.vocab_size, name=model)
        corpus, _ = rows.corpora(configuration.data, tokenizer, seed=seed)
        for tokens in sizes:
            packed, padded = same_rows(
                corpus, tokens=tokens, max_length=length, batches=pace.steps, seed=seed
            )
            for variant in variants:
                batches = packed if variant.padding is None else padded
                made.append(row(variant=variant, micro_batch_tokens=tokens, batches=batches, whole=True))
        return made
    count = max(2 * max(sizes) // length, max(LARGEST_BATCHES))
    documents = made_up(count, length, config.vocab_size, seed=seed)
    for variant in variants:
        # Other tools' variants are measured at one batch size, ours at every size.
        for tokens in sizes[:1] if variant.engine else sizes:
            size = len(documents) if variant.largest_batch else tokens // length
            batches = [documents[at : at + size] for at in range(0, len(documents) - size + 1, size)]
            made.append(row(variant=variant, micro_batch_tokens=tokens, batches=batches))
    return made


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
        raise UserError("--models: no model is named")
    return list(dict.fromkeys(models))


def _pace(configuration: Configuration, sizes: list[int]) -> Pace:
    wanted: BenchArguments = configuration.extra
    warmup = 3 if wanted.warmup is None else wanted.warmup
    if warmup < 1:
        raise UserError(f"--warmup {warmup}: must be at least 1")
    length = configuration.data.max_length
    for tokens in sizes:
        if tokens % length:
            raise UserError(
                f"--tokens {tokens}: a micro batch holds whole documents of {length} tokens (--max_length)"
            )
    steps = configuration.run.max_steps if "max_steps" in configuration.explicit else 10
    minutes = math.inf if wanted.minutes is None else wanted.minutes
    rounds = min(wanted.rounds, steps)
    return Pace(rounds=rounds, steps=math.ceil(steps / rounds), warmup=warmup, minutes=minutes)
