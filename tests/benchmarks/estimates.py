"""What `falcon-qlora estimate` says of an H200, beside what its steps take there.

    python -m tests.benchmarks.estimates --csv estimates.csv [--only 0:14] [--list]

Each setting runs in a process of its own: the model with its method, the kernels and activations that
training chooses, two steps to warm up and four that are timed, on documents of 512 tokens. The card's memory
is read after the steps, when PyTorch still holds all that it ever needed. Rows that the CSV has already are
not run again, so a run that was stopped goes on. All of them take some ten minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from falcon_qlora.common.quantities import GIB
from falcon_qlora.config import Configuration, parse
from falcon_qlora.models.locate import find_outline_here
from falcon_qlora.training.cards import MEASURED
from falcon_qlora.training.estimate import Estimate, Estimator

DOCUMENT_TOKENS = 512
WARM_UP, TIMED = 2, 4
_SMALLEST = "--recipe smallest --lora_r 16 -b 1"
SETTINGS = {
    "7B": "-m random:falcon-7b",
    "7B, 16,384 tokens": "-m random:falcon-7b -b 8",
    "7B, 2,048 tokens": "-m random:falcon-7b -b 1",
    "7B, two micro batches": "-m random:falcon-7b -b 2 --gradient_accumulation_steps 2",
    "7B, selective": "-m random:falcon-7b --checkpointing selective",
    "7B, full": "-m random:falcon-7b --checkpointing full",
    "7B, offload": "-m random:falcon-7b --checkpointing offload",
    "7B, smallest, r 16": f"-m random:falcon-7b {_SMALLEST}",
    "7B, 8 bits": "-m random:falcon-7b -q 8bit",
    "7B, 16 bits": "-m random:falcon-7b -q 16bit",
    "7B, FP8": "-m random:falcon-7b --compute_dtype fp8",
    "7B, FP8, full": "-m random:falcon-7b --compute_dtype fp8 --checkpointing full",
    "7B, dropout": "-m random:falcon-7b --lora_dropout 0.1",
    "7B, reference path": "-m random:falcon-7b --kernels off",
    "7B, Adapter": "-m random:falcon-7b -q 16bit --method adapter",
    "7B, Adapter v2": "-m random:falcon-7b -q 4bit --method adapter_v2",
    "7B, every weight": "-m random:falcon-7b -q 16bit --method full --optim adamw_bnb_8bit -b 2",
    "11B": "-m random:falcon-11b",
    "11B, FP8": "-m random:falcon-11b --compute_dtype fp8",
    "Falcon3-7B": "-m random:falcon3-7b",
    "Falcon3-7B, 8 bits, selective": "-m random:falcon3-7b -q 8bit --checkpointing selective",
    "Falcon3-7B, smallest, r 16": f"-m random:falcon3-7b {_SMALLEST}",
    "Falcon-H1-7B": "-m random:falcon-h1-7b",
    "Falcon-H1-7B, full": "-m random:falcon-h1-7b --checkpointing full",
    "Falcon-H1-7B, smallest, r 16": f"-m random:falcon-h1-7b {_SMALLEST}",
    "40B, 4,096 tokens": "-m random:falcon-40b -b 2",
    "40B, FP8, 4,096 tokens": "-m random:falcon-40b -b 2 --compute_dtype fp8 --checkpointing none",
    "40B, full": "-m random:falcon-40b --checkpointing full",
    "40B, smallest, r 16": f"-m random:falcon-40b {_SMALLEST}",
}
_COLUMNS = (
    "setting flags estimated_card_gib card_gib card_per_cent estimated_tokens_per_second tokens_per_second "
    "tokens_per_cent peak_reserved_gib peak_allocated_gib before_gib checkpointing kernels seconds failure"
).split()


def estimated(configuration: Configuration) -> Estimate:
    """What the command would say of these settings, of documents like those that are measured."""
    outline = find_outline_here(configuration.model.model_name_or_path)
    return Estimator(configuration, outline, document_tokens=DOCUMENT_TOKENS).on(MEASURED)


def measure(words: list[str]) -> dict[str, Any]:
    """Run steps with these flags in this process; GiB, tokens/s and what ran."""
    from falcon_qlora.common import allocator

    allocator.use_expandable_segments()  # before torch is loaded
    import torch
    from transformers import Trainer

    from falcon_qlora.bench import devices
    from falcon_qlora.bench.documents import made_up
    from falcon_qlora.data.packing import collate
    from falcon_qlora.models.fast_path import choose_kernels, described
    from falcon_qlora.models.forward import enable_packing
    from falcon_qlora.models.load import load_model
    from falcon_qlora.step.loss import sum_of_losses
    from falcon_qlora.training.activations import choose_activations

    configuration = parse(words)
    settings, run, data = configuration.model, configuration.run, configuration.data
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    before = card_gib()
    base = load_model(
        settings.model_name_or_path,
        quantize_mode=settings.quantize_mode,
        compute_dtype=settings.compute_dtype,
        double_quantization=settings.double_quantization,
        device=device,
    )
    model = configuration.method.attach(base, seed=run.seed)
    enable_packing(model)
    kernels = choose_kernels(model, kernels=settings.kernels, compute_dtype=settings.compute_dtype)
    activations = choose_activations(
        run, model, kernels, max_length=data.max_length, optimizer=configuration.optimizer
    )
    parameters = [each for each in model.parameters() if each.requires_grad]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    kind, more = Trainer.get_optimizer_cls_and_kwargs(configuration.training)
    optimizer = kind(parameters, **more)
    if more.get("optim_bits") == 8:  # as Trainer has it
        from bitsandbytes.optim import GlobalOptimManager

        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(
                    module, "weight", {"optim_bits": 32}
                )
    tokens = run.per_device_train_batch_size * data.max_length
    length = min(DOCUMENT_TOKENS, tokens)
    rows = made_up(tokens // length, length, model.config.vocab_size, seed=0)
    batch = collate([ids for ids, _ in rows], [mask for _, mask in rows]).to(device)
    micro_batches = run.gradient_accumulation_steps

    def step() -> None:
        for _ in range(micro_batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
                loss = sum_of_losses(model, batch) / (micro_batches * len(batch.targets))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    held = []
    for _ in range(WARM_UP):
        step()
        devices.synchronize(device)
        held.append(card_gib())
    started = time.perf_counter()
    for _ in range(TIMED):
        step()
    devices.synchronize(device)
    seconds = time.perf_counter() - started
    return {
        "card_gib": max(*held, card_gib()),
        "tokens_per_second": TIMED * micro_batches * tokens / seconds,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else 0.0,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0,
        "before_gib": before,
        "checkpointing": activations.described(),
        "kernels": described(kernels),
    }


def card_gib() -> float:
    """What nvidia-smi shows as used of the first visible GPU, GiB; 0 without one.

    Where there is no nvidia-smi, CUDA's figures: its total leaves out what the driver reserves, too.
    """
    import torch

    if not torch.cuda.is_available():
        return 0.0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={visible}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        return float(told.split()[0]) * 2**20 / GIB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        free, total = torch.cuda.mem_get_info()
        return (total - free) / GIB


def row(name: str, words: list[str]) -> dict[str, Any]:
    """Estimate a setting, then measure it in a child."""
    said = estimated(parse(words))
    began = time.perf_counter()
    command = [sys.executable, "-m", "tests.benchmarks.estimates", "--measure", shlex.join(words)]
    child = subprocess.run(command, capture_output=True, text=True)
    found: dict[str, Any] = {"failure": (child.stderr.strip().splitlines() or ["no output"])[-1]}
    if child.returncode == 0:
        found = json.loads(child.stdout.strip().splitlines()[-1])
    for name_of, figure, of_estimate in (
        ("card_per_cent", "card_gib", said.card_gib),
        ("tokens_per_cent", "tokens_per_second", said.tokens_per_second or 0.0),
    ):
        if found.get(figure):
            found[name_of] = 100 * (of_estimate / found[figure] - 1)
    return {
        "setting": name,
        "flags": shlex.join(words),
        "estimated_card_gib": said.card_gib,
        "estimated_tokens_per_second": said.tokens_per_second,
        "seconds": time.perf_counter() - began,
        **found,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| setting | GiB of the card, estimated | measured | % | tokens/s, estimated | measured | % |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        if each.get("failure"):
            lines.append(
                f"| {each['setting']} | {float(each['estimated_card_gib']):.2f} | {each['failure']} |"
            )
            continue
        gib, measured, off, speed, timed, away = (float(each.get(name) or 0) for name in _COLUMNS[2:8])
        told = f"{gib:.2f} | {measured:.2f} | {off:+.1f} | {speed:,.0f} | {timed:,.0f} | {away:+.1f}"
        lines.append(f"| {each['setting']} | {told} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Estimates against what an H200 takes.")
    parser.add_argument("--csv", type=Path, default=Path(os.environ.get("OUT", ".")) / "estimates.csv")
    parser.add_argument("--only", help="N:M, of the settings in their order")
    parser.add_argument("--list", action="store_true", help="show the settings with their estimates, and end")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    wanted = parser.parse_args(arguments)
    if wanted.measure is not None:
        print(json.dumps(measure(shlex.split(wanted.measure))))
        return
    chosen = list(SETTINGS.items())
    if wanted.only:
        first, _, end = wanted.only.partition(":")
        chosen = chosen[int(first or 0) : int(end) if end else None]
    if wanted.list:
        for name, flags in chosen:
            said = estimated(parse(flags.split()))
            print(
                f"{name:<32} {said.card_gib:7.2f} GiB {said.tokens_per_second or 0:9,.0f} tokens/s  {flags}"
            )
        return
    rows: list[dict[str, Any]] = []
    if wanted.csv.exists():
        with wanted.csv.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    done = {each["setting"] for each in rows if not each["failure"]}
    for name, flags in chosen:
        if name in done:
            continue
        rows.append(row(name, flags.split()))
        print(table(rows[-1:]).splitlines()[-1], f"{rows[-1]['seconds']:.0f} s", flush=True)
        is_new = not wanted.csv.exists()
        with wanted.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(rows[-1])
    print(table([each for each in rows if not each.get("failure")]))


if __name__ == "__main__":
    main()
