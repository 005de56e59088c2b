"""The fast path's gradients against float32, and where the time of one step goes.

    python -m tests.benchmarks.fast_path

Speed and memory are measured by `falcon-qlora bench`. Random weights of Falcon-7B's shapes in 4 bits, LoRA on
all linears, documents of 512 tokens, loss on every token. Prints Markdown; writes the kernels of one step to
``fast_path_kernels_*.txt`` in the folder that the environment variable OUT names, else in the current one.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from falcon_qlora.bench.devices import synchronize
from falcon_qlora.bench.documents import made_up
from falcon_qlora.bench.runners import OwnRunner, Settings, adapted, build
from falcon_qlora.bench.variants import VARIANTS, Variant
from falcon_qlora.kernels import fp8, ops
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.load import load_model
from falcon_qlora.step.loss import sum_of_losses
from tests.layouts import plain_float32

DOCUMENT = 512
WARM_UP = 3


def gradients(runner: OwnRunner, tokens: int, *, autocast: bool = True) -> tuple[float, dict[str, Tensor]]:
    """The mean loss and every trainable parameter's gradient on documents of 512 tokens."""
    documents = made_up(tokens // DOCUMENT, DOCUMENT, runner.model.config.vocab_size, seed=0)
    inputs = runner.prepare(documents)
    loss = runner.loss(inputs) if autocast else sum_of_losses(runner.model, inputs) / len(inputs.targets)
    loss.backward()
    found = {n: p.grad.clone() for n, p in runner.model.named_parameters() if p.requires_grad}
    runner.model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def compare_gradients(
    label: str, settings: Settings, device: torch.device, forms: list[ops.Implementation], tokens: int
) -> None:
    """Distance of every path's gradients from float32's, on the same weights dequantized."""
    base = load_model(label, quantize_mode="4bit", device=device, compute_dtype="bf16", seed=1)
    truth = adapted(plain_float32(base, device), VARIANTS["reference"], settings)
    enable_packing(truth)
    exact_runner = OwnRunner(truth, VARIANTS["reference"], settings, [])
    exact_loss, exact = gradients(exact_runner, tokens, autocast=False)
    del truth, exact_runner
    print(f"\nGradients on {label}, {tokens:,} tokens, relative distance (norms) from float32:\n")
    print("| path | loss | mean | worst | where |\n|---|---|---|---|---|")
    print(f"| float32 | {exact_loss:.5f} | | | |")
    paths: list[tuple[Variant, ops.Implementation | None]] = [(VARIANTS["reference"], None)]
    paths += [(VARIANTS["ours"], form) for form in forms]
    if fp8.why_not(device) is None:
        paths += [(VARIANTS["ours-fp8"], form) for form in forms]
    reference: dict[str, Tensor] = {}
    for variant, form in paths:
        with ops.using(form), build(variant, base, settings, {}) as runner:
            loss, found = gradients(runner, tokens)
        errors = distances(found, exact)
        worst = max(errors, key=lambda name: errors[name])
        where = ".".join(worst.split(".")[4:8])
        mean = sum(errors.values()) / len(errors)
        print(f"| {variant.name} {form or ''} | {loss:.5f} | {mean:.2%} | {errors[worst]:.2%} | {where} |")
        if reference:
            between = distances(found, reference)
            print(f"| …from the reference path | | {sum(between.values()) / len(between):.2%} | "
                  f"{max(between.values()):.2%} | |")  # fmt: skip
        else:
            reference = found
    print(flush=True)


def distances(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((found[n] - g).norm() / g.norm().clamp(min=1e-30)) for n, g in truth.items()}


def profile(runner: OwnRunner, name: str, tokens: int, folder: Path) -> None:
    """Write where the time of one step goes, kernel by kernel; say whether anything waits for the host."""
    device = runner.model.device
    documents = made_up(tokens // DOCUMENT, DOCUMENT, runner.model.config.vocab_size, seed=0)
    inputs = runner.prepare(documents)
    for _ in range(WARM_UP):
        runner.step(inputs)
    synchronize(device)
    waits = count_waits(lambda: runner.step(inputs))
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as record:
        started = time.perf_counter()
        runner.step(inputs)
        launched = time.perf_counter() - started
        synchronize(device)
        seconds = time.perf_counter() - started
    on_device = torch.autograd.DeviceType.CUDA
    kernels = [event for event in record.key_averages() if event.device_type == on_device]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels) or 1
    summary = (
        f"{name}, {tokens:,} tokens: {seconds * 1e3:.1f} ms under the profiler, launched in "
        f"{launched * 1e3:.1f} ms, kernels {total / 1e3:.1f} ms, {sum(e.count for e in kernels):,} launches, "
        f"{waits} waits for the GPU"
    )
    lines = [summary, f"{'ms':>9} {'share':>6} {'calls':>6} {'us each':>9}  kernel"]
    for event in kernels[:60]:
        time_us = event.self_device_time_total
        lines.append(
            f"{time_us / 1e3:9.2f} {time_us / total:6.1%} {event.count:6d} {time_us / event.count:9.1f}  "
            f"{event.key[:150]}"
        )
    path = folder / f"fast_path_kernels_{name.replace(' ', '_')}.txt"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines[:16]]), flush=True)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="random:falcon-7b")
    parser.add_argument("--gradients_of", default="random:falcon-7b?num_hidden_layers=2")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--profile", nargs="+", default=["ours"], help="variants of `falcon-qlora bench`")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of Transformers, about its own names
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(os.environ.get("OUT", "."))
    forms: list[ops.Implementation] = ["torch", "triton"] if ops.triton_runs_on(device) else ["torch"]
    settings = Settings(r=arguments.r, max_length=DOCUMENT)
    compare_gradients(arguments.gradients_of, settings, device, forms, min(2048, arguments.tokens))
    for name in arguments.profile:
        variant = VARIANTS[name]
        base = load_model(
            arguments.model, quantize_mode=variant.quantize_mode, device=device, compute_dtype="bf16"
        )
        for form in forms[-1:]:
            with ops.using(form), build(variant, base, settings, {}) as runner:
                profile(runner, f"{name} {form}", arguments.tokens, folder)
        del base


if __name__ == "__main__":
    main()
