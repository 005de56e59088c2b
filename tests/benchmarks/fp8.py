"""FP8 products on a GPU that has them: are they right, and what do they gain?

    python -m tests.benchmarks.fp8

In this order: gradients of two blocks against float32; every kernel against its bytes at the memory's speed;
every product against bfloat16's; steps of Falcon-7B in bfloat16 and FP8, in turn; the kernels of one step,
also in ``fast_path_kernels_fp8.txt`` in the folder that the environment variable OUT names, else in the
current one. Prints Markdown. `--swiglu 23040 12288` times SwiGLU of these widths alone, with quantizing in
its pass and after it, and first checks that both give the same bits; `--tune` times other tiles of kernels.
`--tiny` tries the script, without a GPU in emulation and Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.bench.devices import synchronize
from falcon_qlora.bench.documents import made_up
from falcon_qlora.bench.runners import Settings, build
from falcon_qlora.bench.variants import VARIANTS
from falcon_qlora.kernels import (
    fp8,
    fp8_bounds,
    fp8_gelu,
    fp8_low_rank,
    fp8_quantize,
    fp8_swiglu,
    gelu,
    layer_norm,
    nf4,
    ops,
    rotary,
    rows,
)
from falcon_qlora.kernels.fp8_rows import DTYPE, Rows
from falcon_qlora.kernels.low_rank import LowRank
from falcon_qlora.models.load import load_model
from falcon_qlora.models.quantize import bnb
from tests.benchmarks import kernels as kernel_benchmark
from tests.benchmarks.fast_path import compare_gradients, profile

DEVICE = kernel_benchmark.DEVICE
BF16 = torch.bfloat16
DOCUMENT = 512


class Layer:
    """A frozen linear as the operations read it."""

    def __init__(self, rows: int, columns: int, mode: str) -> None:
        plain = torch.randn(rows, columns, device=DEVICE, dtype=BF16) * 0.02
        if mode == "16bit":
            self.weight: Any = plain
        elif mode == "4bit":
            packed, state = bnb.functional.quantize_4bit(
                plain, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            self.weight = bnb.nn.Params4bit(packed, False, quant_state=state, bnb_quantized=True)
        else:
            values, scales, _ = bnb.functional.int8_vectorwise_quant(plain.half())
            self.weight = bnb.nn.Int8Params(
                values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
            )


def cases(sizes: kernel_benchmark.Sizes, tokens: int) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """What is timed and the bytes it has to move."""
    hidden, wide = sizes.hidden, sizes.wide

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=BF16)

    x = make(tokens, hidden)
    yield f"rows [{tokens}, {hidden}]", lambda x=x: fp8.quantize_rows(x), 3 * x.numel()
    scale = torch.tensor(3e-4, device=DEVICE)
    for mode, bytes_ in (("4bit", 0.5 + 1 / 64), ("8bit", 1), ("16bit", 2)):
        layer = Layer(wide, hidden, mode)
        for transpose in (False, True):
            shape = (hidden, wide) if transpose else (wide, hidden)
            out = torch.empty(shape, device=DEVICE, dtype=DTYPE)
            yield (
                f"weight, {mode} {list(shape)}",
                lambda layer=layer, out=out, transpose=transpose: fp8.quantize_weight(
                    layer, scale, out, transpose
                ),
                out.numel() * (1 + bytes_),
            )
    lows = [LowRank(make(tokens, 64), make(wide, 64).T), LowRank(make(tokens, 64), make(64, wide))]
    for count, rank in ((0, 64), (1, 128), (2, 128)):
        low = LowRank(make(tokens, rank), make(hidden, rank).T)
        others = tuple(make(tokens, hidden) for _ in range(count))
        yield (
            f"sum of LoRA's r {rank} and {count} more [{tokens}, {hidden}]",
            lambda x=x, low=low, others=others: fp8.add(x, low, others),
            2 * (2 + count) * x.numel(),
        )
    before, grad = make(tokens, wide), make(tokens, wide)
    bound = torch.full((tokens,), 100.0, device=DEVICE)
    yield f"GELU [{tokens}, {wide}]", lambda: fp8.gelu(before, lows[0], bound), 3 * before.numel()
    yield (
        f"GELU, backward, and its output again [{tokens}, {wide}]",
        lambda: fp8.gelu_backward(grad, lows[1], bound, before, lows[0], bound),
        6 * before.numel(),
    )
    rows, a = fp8.quantize_rows(before)[0], make(64, wide)
    yield f"FP8 into LoRA's r 64 [{tokens}, {wide}]", lambda: fp8.into_low_rank(a, rows), before.numel()
    yield (
        f"sum over tokens of LoRA's r 64 and FP8 [{tokens}, {wide}]",
        lambda: fp8.gathered(lows[0].left, rows),
        before.numel(),
    )


def time_kernels(sizes: kernel_benchmark.Sizes, tokens: int) -> None:
    print(f"\n| kernel, {sizes.name} | µs | MB | of copies' speed |\n|---|---|---|---|")
    for name, work, moved in cases(sizes, tokens):
        seconds = kernel_benchmark.milliseconds(work) / 1e3
        share = moved / seconds / kernel_benchmark.COPY_BYTES_A_SECOND
        print(f"| {name} | {1e6 * seconds:.1f} | {moved / 1e6:.0f} | {share:.0%} |", flush=True)


def time_swiglu(wide: int, tokens: int) -> None:
    """SwiGLU and its gradient with quantizing in the same pass, by lanes and warps, and in one after it."""
    gate_up, grad = (torch.randn(tokens, n, device=DEVICE, dtype=BF16) for n in (2 * wide, wide))
    out, of_input = torch.empty_like(grad), torch.empty_like(gate_up)

    def apart() -> list[Rows]:
        gradient, _ = ops.swiglu_backward(grad.clone(), gate_up)
        return [fp8.quantize_rows(each)[0] for each in (ops.swiglu(gate_up), gradient)]

    together = [fp8.swiglu(gate_up, out), fp8.swiglu_backward(grad.clone(), gate_up, of_input)[0]]
    for one, other in zip(together, apart(), strict=True):
        assert torch.equal(one.scales, other.scales)
        assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
    del together
    steps: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "SwiGLU": (
            lambda: fp8.swiglu(gate_up, out),
            lambda: fp8.quantize_rows(ops.swiglu(gate_up, out)),
            7 * grad.numel(),
        ),
        "SwiGLU, backward": (
            lambda: fp8.swiglu_backward(grad, gate_up, of_input),
            lambda: fp8.quantize_rows(ops.swiglu_backward(grad, gate_up, of_input)[0]),
            14 * grad.numel(),
        ),
    }
    before = fp8_swiglu._BLOCK, fp8_swiglu._WARPS
    for name, (fused, separate, moved) in steps.items():
        times = [("apart", kernel_benchmark.milliseconds(separate))]
        for block, warps in product((2048, 4096, 8192), (4, 8, 16, 32)):
            fp8_swiglu._BLOCK, fp8_swiglu._WARPS = block, warps
            with contextlib.suppress(Exception):  # what does not compile is no choice
                times.append((f"{block} lanes, {warps} warps", kernel_benchmark.milliseconds(fused)))
        fp8_swiglu._BLOCK, fp8_swiglu._WARPS = before
        told = ", ".join(f"{1e3 * time:.0f} µs {how}" for how, time in times)
        print(f"- {name} [{tokens}, {wide}], now {before}, {moved / 1e6:.0f} MB: {told}", flush=True)


def tune(sizes: kernel_benchmark.Sizes, tokens: int) -> None:
    """Times of kernels with other tiles."""
    choices: list[tuple[ModuleType, str, str]] = [
        (fp8_gelu, "_FORWARD", "GELU ["), (fp8_gelu, "_BACKWARD", "GELU, backward"),
        (fp8_low_rank, "_INTO", "FP8 into"), (fp8_low_rank, "_SUM", "sum over tokens"),
        (fp8_quantize, "_SUM", "sum of LoRA's r 128 and 2 more"),
    ]  # fmt: skip
    for module, constant, start in choices:
        before = getattr(module, constant)
        work = next(work for name, work, _ in cases(sizes, tokens) if name.startswith(start))
        times = []
        for tile in product((32, 64, 128), (64, 128, 256), (4, 8)):
            setattr(module, constant, (*tile, *before[3:]))
            with contextlib.suppress(Exception):  # what does not compile is no choice
                times.append((1e3 * kernel_benchmark.milliseconds(work), tile))
        setattr(module, constant, before)
        print(
            f"- {constant}, now {before}: " + ", ".join(f"{t:.0f} µs {tile}" for t, tile in sorted(times)),
            flush=True,
        )


def time_products(sizes: kernel_benchmark.Sizes, tokens: int) -> None:
    """TFLOP/s of a block's products, one by one and as bfloat16 runs them, several in one."""
    hidden, wide = sizes.hidden, sizes.wide
    fused = sizes.kv_heads * sizes.group * sizes.head_dim
    shapes = {
        "query_key_value": (hidden, fused), "h_to_4h": (hidden, wide), "4h_to_h": (wide, hidden),
        "dense": (hidden, hidden), "both into": (hidden, fused + wide),
        "both out of": (wide + hidden, hidden),
        "query_key_value, backward": (fused, hidden), "both into, backward": (fused + wide, hidden),
    }  # fmt: skip
    print(f"\n| product, {sizes.name} | K | N | fast accumulation | without | a scale a tensor | bfloat16 |")
    print("|---|---|---|---|---|---|---|")
    for name, (k, n) in shapes.items():
        x = fp8.quantize_rows(torch.randn(tokens, k, device=DEVICE, dtype=BF16))[0]
        weight = fp8.quantize_rows(torch.randn(n, k, device=DEVICE, dtype=BF16))[0]
        plain, plain_weight = x.values.to(BF16), weight.values.to(BF16)
        one = torch.ones((), device=DEVICE)

        def scaled(fast: bool, a: Tensor, b: Tensor, x=x, weight=weight) -> Tensor:
            return torch._scaled_mm(
                x.values, weight.values.t(), scale_a=a, scale_b=b, out_dtype=BF16, use_fast_accum=fast
            )

        a, b = x.scales[:, None], weight.scales[None]
        work: list[Callable[[], Tensor]] = [
            lambda s=scaled, a=a, b=b: s(True, a, b),
            lambda s=scaled, a=a, b=b: s(False, a, b),
            lambda s=scaled, one=one: s(True, one, one),
            lambda plain=plain, plain_weight=plain_weight: plain @ plain_weight.T,
        ]
        rates = [2 * tokens * k * n / kernel_benchmark.milliseconds(one) / 1e9 for one in work]
        print(f"| {name} | {k} | {n} | " + " | ".join(f"{rate:.0f}" for rate in rates) + " |", flush=True)


def check_products() -> None:
    """The GPU's products against float32's of the same operands, for numbers of tokens that fit nothing."""
    errors = []
    for tokens in (1, 7, 17, 1000, 2048):
        x = fp8.quantize_rows(torch.randn(tokens, 4544, device=DEVICE, dtype=BF16))[0]
        weight = fp8.quantize_rows(torch.randn(4672, 4544, device=DEVICE, dtype=BF16))[0]
        ours = fp8.product(x, Rows(weight.values, weight.scales), BF16).float()
        with fp8.emulated():
            exact = fp8.product(x, weight, torch.float32)
        errors.append(f"{tokens}: {float((ours - exact).norm() / exact.norm()):.1e}")
    print(f"- products against float32's of the same operands, by tokens: {', '.join(errors)}")


def compilations() -> int:
    found = 0
    for module in (fp8_bounds, fp8_gelu, fp8_low_rank, fp8_quantize, gelu, layer_norm, nf4, rotary, rows):
        for function in vars(module).values():
            for caches in getattr(function, "device_caches", {}).values():
                found += len(caches[0])
    return found


def check_recompilation(base: Any, settings: Settings) -> None:
    """Whether another number of tokens compiles anything once more; how long the first step took."""
    with build(VARIANTS["ours-fp8"], base, settings, {}) as runner:
        counts = []
        for documents in (3, 16, 17):
            inputs = runner.prepare(made_up(documents, 61, base.config.vocab_size, seed=0))
            started = time.perf_counter()
            runner.step(inputs)
            synchronize(DEVICE)
            seconds = time.perf_counter() - started
            counts.append(f"{compilations()} ({61 * documents} tokens, {seconds:.1f} s)")
    print(f"- kernels compiled after steps: {', '.join(counts)}", flush=True)


def time_steps(base: Any, settings: Settings, tokens: tuple[int, ...], warm_up: int, timed: int) -> None:
    print("\n| variant | tokens a step | tokens/s | ms a step | peak allocated GB | loss | |")
    print("|---|---|---|---|---|---|---|")
    for count, name in product(tokens, ("ours", "ours-fp8")):
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with build(VARIANTS[name], base, settings, {}) as runner:
            inputs = runner.prepare(made_up(count // DOCUMENT, DOCUMENT, base.config.vocab_size, seed=0))
            for _ in range(warm_up):
                loss = runner.step(inputs)
            synchronize(DEVICE)
            started = time.perf_counter()
            for _ in range(timed):
                runner.step(inputs)
            synchronize(DEVICE)
            seconds = (time.perf_counter() - started) / timed
        peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else float("nan")
        print(
            f"| {name} | {count:,} | {count / seconds:,.0f} | {1e3 * seconds:.0f} | {peak:.1f} | "
            f"{float(loss):.4f} | {runner.notes[0]} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="random:falcon-7b")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs=2, default=[8192, 16384])
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try this script")
    parser.add_argument("--tune", action="store_true", help="time other tiles, alone")
    parser.add_argument("--swiglu", type=int, nargs="+", default=[], help="widths to time SwiGLU alone")
    arguments = parser.parse_args()
    for wide in arguments.swiglu:
        time_swiglu(wide, arguments.tokens[1])
    if arguments.swiglu:
        return
    folder = Path(os.environ.get("OUT", "."))
    named = kernel_benchmark.TINY if arguments.tiny else kernel_benchmark.MODELS
    sizes = [one for one in named if isinstance(one, kernel_benchmark.Sizes)]
    small, large, pace = *arguments.tokens, (3, 10)
    replaced = "num_hidden_layers=2"
    if arguments.tiny:
        small, large, pace, arguments.r = 512, 512, (1, 1), 4
        replaced += ",hidden_size=192,num_attention_heads=3,vocab_size=128"
        arguments.model = f"random:falcon-7b?{replaced}"
    settings = Settings(r=arguments.r, max_length=DOCUMENT)
    if arguments.tune:
        for one in sizes:
            tune(one, large)
        return
    forms: list[ops.Implementation] = ["triton", "torch"] if ops.triton_runs_on(DEVICE) else ["torch"]
    with contextlib.nullcontext() if fp8.why_not(DEVICE) is None else fp8.emulated():
        check_products()
        for label in ["7b"] if arguments.tiny else ["7b", "40b"]:
            name = f"random:falcon-{label}?{replaced}"
            compare_gradients(name, settings, DEVICE, forms, min(2048, small))
        with ops.using(forms[0]):
            for one in sizes:
                time_kernels(one, large)
                if DEVICE.type == "cuda":
                    time_products(one, large)
        base = load_model(arguments.model, quantize_mode="4bit", device=DEVICE, compute_dtype="bf16")
        check_recompilation(base, settings)
        time_steps(base, settings, (small, large), *pace)
        with build(VARIANTS["ours-fp8"], base, settings, {}) as runner:
            profile(runner, "ours-fp8", large, folder)
    print((folder / "fast_path_kernels_ours-fp8.txt").read_text())


if __name__ == "__main__":
    main()
