"""The fast path against the reference path: speed, memory, gradients, and where the time goes.

    python -m tests.benchmarks.fast_path

One process and one GPU. Random weights of Falcon-7B's shapes in 4 bits, LoRA on all linears, documents of 512
tokens, loss on every token, the optimizer's step included. Prints Markdown; writes the kernels of one step to
``fast_path_kernels_*.txt`` in the folder that the environment variable OUT names, else in the current one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels import ops
from falcon_qlora.methods.lora import attach_lora
from falcon_qlora.models.attention import Sequences
from falcon_qlora.models.falcon import parameter_count
from falcon_qlora.models.fast import apply_fast_path, remove_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.load import load_model
from tests.layouts import plain_float32

GB = 1e9
DOCUMENT = 512
WARM_UP, TIMED = 3, 10


@dataclass(frozen=True)
class Variant:
    """One row: `form` is how the fast path's small operations run, None the reference path."""

    name: str
    tokens: int
    form: ops.Implementation | None = None
    checkpointing: bool = False
    fp8: bool = False


def variants(forms: list[ops.Implementation], small: int, large: int) -> list[Variant]:
    rows = [
        Variant("reference, recomputing", small, checkpointing=True),
        Variant("reference", small),
    ]
    for form in forms:
        rows += [Variant(f"fast, {form}", tokens, form) for tokens in (small, large)]
    if forms:
        rows.append(Variant(f"fast, {forms[-1]}, recomputing", small, forms[-1], checkpointing=True))
    return rows


def triton_runs() -> bool:
    try:
        return bool(ops._triton_forms())
    except ImportError as error:
        print(f"Triton's forms are left out: {error}")
        return False


def with_lora(model: Any, r: int) -> Any:
    """LoRA on all linears, whose second matrices are not zero."""
    peft_model = attach_lora(model, r=r, alpha=16, seed=0)
    generator = torch.Generator(device=model.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01, generator=generator)
    enable_packing(peft_model)
    return peft_model


def batch(tokens: int, vocabulary: int, device: torch.device, document: int = DOCUMENT) -> dict[str, Any]:
    """Documents of `document` tokens; every token but the first of each is a target."""
    lengths = [document] * (tokens // document)
    sequences = Sequences.from_lengths(lengths, device)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, vocabulary, (sum(lengths),), generator=generator).to(device)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    positions = torch.cat([torch.arange(start, end - 1) for start, end in pairwise(starts)]).to(device)
    return {
        "input_ids": ids[None],
        "sequences": sequences,
        "target_positions": positions,
        "targets": ids[positions + 1],
    }


@contextmanager
def running(model: Any, variant: Variant):
    if variant.form is not None:
        report = apply_fast_path(model, fp8_products=variant.fp8)
        print(f"- {variant.name}: {next(iter(report.values()))}", flush=True)
    if variant.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        with ops.using(variant.form):
            yield
    finally:
        model.gradient_checkpointing_disable()
        remove_fast_path(model)


def stepper(model: Any, arguments: dict[str, Any]) -> Callable[[], Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
    count = len(arguments["targets"])

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**arguments).loss / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(model: Any, variant: Variant, vocabulary: int) -> dict[str, float]:
    """Milliseconds a step, and the most memory it took."""
    device = model.device
    arguments = batch(variant.tokens, vocabulary, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    with running(model, variant):
        step = stepper(model, arguments)
        for _ in range(WARM_UP):
            loss = step()
        synchronize()
        started = time.perf_counter()
        for _ in range(TIMED):
            step()
        synchronize()
        seconds = (time.perf_counter() - started) / TIMED
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    # The optimizer's two states and the gradients are not activations.
    trained = 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "seconds": seconds,
        "loss": float(loss),
        "allocated": peak / GB,
        "reserved": reserved / GB,
        "megabytes_a_token": (peak - held - trained) / variant.tokens / 1e6,
    }


def product_ceiling(device: torch.device, hidden: int, tokens: int) -> float:
    """TFLOP/s of a bfloat16 product like the block's first, on random data, after a second of the same."""
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(5 * hidden, hidden, device=device, dtype=torch.bfloat16)
    operations = 2 * x.numel() * weight.shape[0]
    repeat = max(1, int(6e14 / operations)) if device.type == "cuda" else 1
    for _ in range(2):
        synchronize()
        started = time.perf_counter()
        for _ in range(repeat):
            x @ weight.T
        synchronize()
        seconds = (time.perf_counter() - started) / repeat
    return operations / seconds / 1e12


def table(model: Any, rows: list[Variant], ceiling: float) -> None:
    parameters, vocabulary = parameter_count(model.config), model.config.vocab_size
    lines = []
    first = None
    for variant in rows:
        try:
            result = measure(model, variant, vocabulary)
        except torch.OutOfMemoryError:
            lines.append(f"| {variant.name} | {variant.tokens:,} | out of memory |")
            model.zero_grad(set_to_none=True)
            continue
        speed = variant.tokens / result["seconds"]
        first = first or speed
        teraflops = 4 * parameters * speed / 1e12
        lines.append(
            f"| {variant.name} | {variant.tokens:,} | {speed:,.0f} | {speed / first:.2f}x | "
            f"{result['seconds'] * 1e3:.0f} | {teraflops:.0f} | {teraflops / ceiling:.0%} | "
            f"{result['allocated']:.1f} | {result['reserved']:.1f} | {result['megabytes_a_token']:.2f} | "
            f"{result['loss']:.4f} |"
        )
    print(
        "\n| variant | tokens a step | tokens/s | ratio | ms a step | TFLOP/s by 4N | of the ceiling | "
        "peak allocated GB | reserved GB | activations MB a token | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines), flush=True)


def gradients_of(
    model: Any, arguments: dict[str, Any], autocast: bool = True
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        loss = model(**arguments).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()) / len(arguments["targets"]), found


def compare_gradients(label: str, r: int, device: torch.device, variants: list[Variant]) -> None:
    """Distance of every path's gradients from float32's, on the same weights dequantized."""
    n = variants[0].tokens
    base = load_model(label, quantize_mode="4bit", device=device, compute_dtype="bf16", seed=1)
    with device:  # or else random weights are drawn on the CPU before they are replaced
        truth = with_lora(plain_float32(base).to(device), r)
    model = with_lora(base, r)
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in truth.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours[name])
    arguments = batch(n, base.config.vocab_size, device)
    exact_loss, exact = gradients_of(truth, arguments, autocast=False)
    del truth
    print(f"\nGradients on {label}, {n:,} tokens, relative distance (norms) from float32:\n")
    print("| path | loss | mean | worst | where |\n|---|---|---|---|---|")
    print(f"| float32 | {exact_loss:.5f} | | | |")
    reference: dict[str, Tensor] = {}
    for variant in variants:
        with running(model, variant):
            loss, found = gradients_of(model, arguments)
        errors = distances(found, exact)
        worst = max(errors, key=lambda name: errors[name])
        where = ".".join(worst.split(".")[4:8])
        mean = sum(errors.values()) / len(errors)
        print(f"| {variant.name} | {loss:.5f} | {mean:.2%} | {errors[worst]:.2%} | {where} |")
        if reference:
            between = distances(found, reference)
            print(f"| …from the reference path | | {sum(between.values()) / len(between):.2%} | "
                  f"{max(between.values()):.2%} | |")  # fmt: skip
        else:
            reference = found
    print(flush=True)


def distances(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((found[n] - g).norm() / g.norm().clamp(min=1e-30)) for n, g in truth.items()}


def profile(model: Any, variant: Variant, folder: Path, shown: int = 16) -> None:
    """Write where the time of one step goes, kernel by kernel; say whether anything waits for the host."""
    arguments = batch(variant.tokens, model.config.vocab_size, model.device)
    with running(model, variant):
        step = stepper(model, arguments)
        for _ in range(WARM_UP):
            step()
        synchronize()
        waits = count_waits(step)
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as record:
            started = time.perf_counter()
            step()
            launched = time.perf_counter() - started
            synchronize()
            seconds = time.perf_counter() - started
    on_device = torch.autograd.DeviceType.CUDA
    kernels = [event for event in record.key_averages() if event.device_type == on_device]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels) or 1
    summary = (
        f"{variant.name}, {variant.tokens:,} tokens: {seconds * 1e3:.1f} ms under the profiler, launched in "
        f"{launched * 1e3:.1f} ms, kernels {total / 1e3:.1f} ms, {sum(e.count for e in kernels):,} launches, "
        f"{waits} waits for the GPU"
    )
    lines = [summary, f"{'ms':>9} {'share':>6} {'calls':>6} {'us each':>9}  kernel"]
    for event in kernels[:40]:
        time_us = event.self_device_time_total
        lines.append(
            f"{time_us / 1e3:9.2f} {time_us / total:6.1%} {event.count:6d} {time_us / event.count:9.1f}  "
            f"{event.key[:150]}"
        )
    path = folder / f"fast_path_kernels_{'fp8' if variant.fp8 else variant.form}.txt"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines[:shown]]), flush=True)


def count_waits(step: Callable[[], Tensor]) -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    for place in sorted({f"{warning.filename}:{warning.lineno}" for warning in waits}):
        print(f"- waits for the GPU: {place}")
    return len(waits)


def print_machine(device: torch.device) -> None:
    if device.type != "cuda":
        print(f"CPU, torch {torch.__version__}")
        return
    query = "name,driver_version,clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    print(f"torch {torch.__version__}; {state}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="random:falcon-7b")
    parser.add_argument("--gradients_of", default="random:falcon-7b?num_hidden_layers=2")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs=2, default=[8192, 16384])
    parser.add_argument("--only_fast", action="store_true", help="leave the reference path's rows out")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of Transformers, about its own names
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(os.environ.get("OUT", "."))
    forms: list[ops.Implementation] = ["torch", "triton"] if triton_runs() else ["torch"]
    small, large = arguments.tokens
    print_machine(device)
    n = min(2048, small)
    compared = [Variant("reference", n), *(Variant(f"fast, {form}", n, form) for form in forms)]
    compare_gradients(arguments.gradients_of, arguments.r, device, compared)
    started = time.perf_counter()
    base = load_model(arguments.model, quantize_mode="4bit", device=device, compute_dtype="bf16")
    model = with_lora(base, arguments.r)
    print(f"- {arguments.model} loaded in {time.perf_counter() - started:.0f} s")
    rows = variants(forms, small, large)
    if arguments.only_fast:
        rows = [variant for variant in rows if variant.form is not None]
    ceiling = product_ceiling(device, model.config.hidden_size, small)
    print(f"- a plain bfloat16 product: {ceiling:.1f} TFLOP/s")
    table(model, rows, ceiling)
    print_machine(device)
    for form in forms:
        profile(model, Variant(f"fast, {form}", large, form), folder)


if __name__ == "__main__":
    main()
