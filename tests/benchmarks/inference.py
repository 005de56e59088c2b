"""What a quantized Falcon takes to answer: memory and speed.

    python -m tests.benchmarks.inference --models random:falcon-7b random:falcon-40b

Random weights in 4 bits, a prompt of 128 tokens, 64 new ones, one at a time behind a cache. Prints Markdown.
"""

# ruff: noqa: E402
from __future__ import annotations

from falcon_qlora.common import allocator

allocator.use_expandable_segments()  # before torch is loaded

import argparse
import gc
import time

import torch

from falcon_qlora.models.load import load_model

PROMPT, NEW = 128, 64
GB = 1e9


def measure(name: str) -> str:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model = load_model(name, quantize_mode="4bit", compute_dtype="bf16").eval()
    loading = time.perf_counter() - started
    loaded = torch.cuda.max_memory_reserved() / GB
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), device=model.device)
    seconds = 0.0
    for _ in range(2):  # the first warms up
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    held, peak = torch.cuda.memory_allocated() / GB, torch.cuda.max_memory_reserved() / GB
    return f"| {name} | {held:.2f} | {loaded:.2f} | {peak:.2f} | {loading:.1f} | {NEW / seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["random:falcon-7b", "random:falcon-40b"])
    arguments = parser.parse_args()
    print("| model, 4bit | GB held | GB reserved, loading | answering too | loading, s | tokens/s |")
    print("|---|---|---|---|---|---|")
    for name in arguments.models:
        print(measure(name), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
