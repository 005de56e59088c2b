"""What each setting of ``--checkpointing`` costs in time and saves in memory, beside what was predicted.

    python -m tests.benchmarks.memory

One process and one GPU, a few minutes. Random weights in 4 bits, LoRA r 64 on all linears, documents of 512
tokens, loss on every token, the optimizer's step included. Prints Markdown; appends the rows to
``memory.csv`` and writes the copies of an offloading step to ``offload.txt``, in the folder that the
environment variable OUT names, else in the current one.
"""

# ruff: noqa: E402
from __future__ import annotations

from falcon_qlora.common import allocator

allocator.use_expandable_segments()  # before torch is loaded

import argparse
import csv
import datetime
import gc
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor

from falcon_qlora.bench.devices import synchronize
from falcon_qlora.bench.documents import made_up
from falcon_qlora.bench.runners import Settings, adapted
from falcon_qlora.bench.variants import VARIANTS
from falcon_qlora.data.packing import MicroBatch, collate
from falcon_qlora.models.activations import Checkpointing, set_checkpointing
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.load import load_model
from falcon_qlora.models.step_memory import Step
from falcon_qlora.step.loss import sum_of_losses
from tests.benchmarks.fast_path import DOCUMENT, count_waits, distances

GB = 1e9
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Variant:
    """One row; `within`: bytes of a GPU that ``auto`` is to fit into."""

    name: str
    checkpointing: Checkpointing | None
    paged: bool = False
    within: float = 0.0


def variants(within: float) -> list[Variant]:
    settings: tuple[Checkpointing, ...] = ("none", "selective", "full", "offload")
    rows = [Variant(each, each) for each in settings]
    rows.append(Variant(f"auto, as on a GPU with {within / GB:.0f} GB", None, within=within))
    rows.append(Variant("smallest: offload, paged 8-bit AdamW", "offload", paged=True))
    return rows


def batch(model: Any, tokens: int) -> MicroBatch:
    documents = made_up(tokens // DOCUMENT, DOCUMENT, model.config.vocab_size, seed=0)
    ids, masks = [each[0] for each in documents], [each[1] for each in documents]
    return collate(ids, masks, pad_to=None).to(model.device)


def mean_loss(model: Any, inputs: MicroBatch) -> Tensor:
    with torch.autocast(model.device.type, torch.bfloat16):
        return sum_of_losses(model, inputs) / len(inputs.targets)


def stepper(model: Any, inputs: MicroBatch, paged: bool) -> Callable[[], Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if paged:
        optimizer: Any = bitsandbytes.optim.PagedAdamW8bit(parameters, lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=ON_GPU)

    def step() -> Tensor:
        loss = mean_loss(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def start_afresh() -> float:
    """GB that are allocated when nothing is at work, the peaks set back to it."""
    gc.collect()
    if not ON_GPU:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / GB


def measure(model: Any, variant: Variant, tokens: int, r: int, timed: int) -> dict[str, Any]:
    held = start_afresh()
    one = Step(
        config=model.config,
        tokens=tokens,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        fast=True,
        lora_rank=r,
        optimizer_bytes=0 if variant.paged else 8,
    )
    layers = model.config.num_hidden_layers
    blocks = (
        [variant.checkpointing] * layers
        if variant.checkpointing
        else one.choose(int(variant.within - held * GB))
    )
    set_checkpointing(model, blocks)
    step = stepper(model, batch(model, tokens), variant.paged)
    step()
    step()
    synchronize(model.device)
    started = time.perf_counter()
    for _ in range(timed):
        loss = step()
    synchronize(model.device)
    seconds = (time.perf_counter() - started) / timed
    return {
        "seconds": seconds,
        "loss": float(loss),
        "allocated": torch.cuda.max_memory_allocated() / GB if ON_GPU else 0.0,
        "reserved": torch.cuda.max_memory_reserved() / GB if ON_GPU else 0.0,
        "predicted": held + one.bytes(blocks) / GB,
        "blocks": ", ".join(f"{count} {what}" for what, count in Counter(blocks).items()),
    }


def table(label: str, model: Any, rows: list[Variant], arguments: argparse.Namespace) -> None:
    timed = 6 if layout_of(model.config).parameter_count() < 2e10 else 3
    lines, first = [], None
    for variant in rows:
        try:
            found = measure(model, variant, arguments.tokens, arguments.r, timed)
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            lines.append(f"| {variant.name} | out of memory |")
            continue
        speed = arguments.tokens / found["seconds"]
        first = first or speed
        lines.append(
            f"| {variant.name} | {found['blocks']} | {speed:,.0f} | {speed / first:.3f}x | "
            f"{found['seconds'] * 1e3:.0f} | {found['allocated']:.2f} | {found['reserved']:.2f} | "
            f"{found['predicted']:.2f} | {found['loss']:.4f} |"
        )
        print(lines[-1], flush=True)
        record(label, model, variant, found, speed / first, arguments)
    print(f"\n{label}, {arguments.tokens:,} tokens a micro batch\n")
    print(
        "| setting | blocks | tokens/s | ratio | ms a step | allocated GB | reserved GB | predicted GB "
        "| loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines), flush=True)


def record(
    label: str,
    model: Any,
    variant: Variant,
    found: dict[str, Any],
    ratio: float,
    arguments: argparse.Namespace,
) -> None:
    """Append a row in the form of records.csv."""
    speed = arguments.tokens / found["seconds"]
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": arguments.commit,
        "gpu": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "gpus": 1,
        "driver": "",
        "torch": torch.__version__,
        "model": label,
        "variant": variant.name,
        "quantize_mode": "4bit",
        "compute_dtype": "bf16",
        "checkpointing": variant.checkpointing or "auto",
        "micro_batch_tokens": arguments.tokens,
        "tokens_per_second": round(speed),
        "samples_per_second_512": round(speed / 512, 1),
        "tflops_4n": round(4 * layout_of(model.config).parameter_count() * speed / 1e12),
        "ceiling_share": "",
        "peak_allocated_gb": round(found["allocated"], 2),
        "peak_reserved_gb": round(found["reserved"], 2),
        "step_ms": round(found["seconds"] * 1e3, 1),
        "ratio_to_first": round(ratio, 3),
        "note": f"predicted {found['predicted']:.2f} GB; {found['blocks']}; "
        "python -m tests.benchmarks.memory",
    }
    path = arguments.folder / "memory.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def compare(model: Any, tokens: int) -> None:
    """Whether what is kept changes a gradient."""
    inputs = batch(model, tokens)
    expected = None
    print("\n| setting | loss | gradients, largest relative distance from none's |\n|---|---|---|")
    for variant in variants(0)[:4]:
        assert variant.checkpointing is not None
        set_checkpointing(model, [variant.checkpointing] * model.config.num_hidden_layers)
        loss = mean_loss(model, inputs)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        expected = expected or found
        print(f"| {variant.name} | {loss:.6f} | {max(distances(found, expected).values()):.1e} |", flush=True)


def profile(model: Any, tokens: int, folder: Path) -> None:
    """One offloading step: how much of the copies' time lies under kernels, and what waits."""
    set_checkpointing(model, ["offload"] * model.config.num_hidden_layers)
    step = stepper(model, batch(model, tokens), False)
    step()
    step()
    synchronize(model.device)
    waits = count_waits(step)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        synchronize(model.device)
    on_device = torch.autograd.DeviceType.CUDA
    events = [event for event in recorded.events() if event.device_type == on_device]
    copies = {way: [e for e in events if f"Memcpy {way}" in e.name] for way in ("DtoH", "HtoD")}
    kernels = merged([(e.time_range.start, e.time_range.end) for e in events if "Mem" not in e.name])
    lines = [f"one offloading step: {waits} waits for the GPU"]
    for way, each in copies.items():
        spans = [(e.time_range.start, e.time_range.end) for e in each if e.time_range.elapsed_us() > 50]
        total = sum(end - start for start, end in spans)
        under = sum(overlap(span, kernels) for span in spans)
        share = under / total if total else 0.0
        lines.append(f"{way}: {len(spans)} copies, {total / 1e3:.1f} ms, {share:.0%} of it under kernels")
    lines.append(f"kernels: {sum(end - start for start, end in kernels) / 1e3:.1f} ms")
    gaps = sorted((later[0] - earlier[1] for earlier, later in pairwise(kernels)), reverse=True)[:5]
    lines.append(f"largest gaps between kernels, ms: {', '.join(f'{gap / 1e3:.2f}' for gap in gaps)}")
    print("", *lines, sep="\n", flush=True)
    all_copies = sorted((e for each in copies.values() for e in each), key=lambda e: e.time_range.start)
    rows = [f"{e.time_range.start:14.0f} {e.time_range.elapsed_us():10.0f} us  {e.name}" for e in all_copies]
    (folder / "offload.txt").write_text("\n".join([*lines, *rows]) + "\n")


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def overlap(span: tuple[float, float], others: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(span[1], end) - max(span[0], start)) for start, end in others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["random:falcon-7b", "random:falcon-40b"])
    parser.add_argument("--within_gb", type=float, nargs="+", default=[16, 48], help="for auto, one a model")
    parser.add_argument("--tokens", type=int, default=8192, help=f"a multiple of {DOCUMENT}")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--commit", default="", help="for the record")
    arguments = parser.parse_args()
    arguments.folder = Path(os.environ.get("OUT", "."))
    warnings.simplefilter("ignore", FutureWarning)  # of Transformers, about its own names
    device = torch.device("cuda" if ON_GPU else "cpu")
    if ON_GPU:
        torch.empty(1, device=device)
        print(f"- allocator: {torch.cuda.memory._snapshot()['allocator_settings']}")
    for place, (label, within) in enumerate(zip(arguments.models, arguments.within_gb, strict=True)):
        started = time.perf_counter()
        base = load_model(label, quantize_mode="4bit", device=device, compute_dtype="bf16")
        model = adapted(base, VARIANTS["ours"], Settings(r=arguments.r))
        enable_packing(model)
        del base
        print(f"\n- {label} loaded in {time.perf_counter() - started:.0f} s; {start_afresh():.2f} GB")
        print(f"- {next(iter(apply_fast_path(model).values()))}")
        if place == 0:
            compare(model, min(arguments.tokens, 4 * DOCUMENT))
        table(label, model, variants(within * GB), arguments)
        if place == 0:
            profile(model, arguments.tokens, arguments.folder)
        del model


if __name__ == "__main__":
    main()
