"""A worker: models whose base is shared out over the processes compute what whole ones do, to the last bit.

Torchrun starts it, on several processes that each have other documents; with ``cuda`` it runs on GPUs.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from falcon_qlora.kernels import fp8, ops
from falcon_qlora.methods.table import METHODS
from falcon_qlora.models import sharded_base
from falcon_qlora.models.activations import Checkpointing, set_checkpointing
from falcon_qlora.models.blocks.fast_block import base_of
from falcon_qlora.models.fast_path import apply_fast_path, runs_fast
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.load import load_model
from falcon_qlora.models.quantize import stored
from falcon_qlora.models.sharded_base import Parts, alone, sharded_base_of
from falcon_qlora.models.streamed_base import held_for_good
from falcon_qlora.processes import devices, endings
from tests.layouts import FALCON_H1, FAMILIES, documents
from tests.packing import gradients, packed

# Layout, how weights are stored, what runs the blocks (a form of the kernels, on a GPU Triton's, or the
# reference path), what they keep, and the method.
CASES: tuple[tuple[str, str, str, Checkpointing, str], ...] = (
    ("falcon-7b", "4bit", "torch", "none", "lora"),
    ("falcon-7b", "8bit", "torch", "full", "lora"),
    ("falcon-7b", "4bit", "fp8", "none", "lora"),
    ("falcon-7b", "4bit", "reference", "none", "adapter"),
    ("falcon-7b", "4bit", "torch", "selective", "adapter"),
    ("falcon-7b", "8bit", "torch", "none", "adapter_v2"),
    ("falcon-7b", "8bit", "reference", "full", "adapter_v2"),
    ("falcon-40b", "4bit", "triton", "full", "lora"),
    ("falcon-40b", "4bit", "torch", "offload", "lora"),
    ("falcon-40b", "16bit", "torch", "selective", "lora"),
    ("falcon-40b", "4bit", "reference", "none", "lora"),
    ("falcon-40b", "16bit", "reference", "none", "lora"),
    ("falcon-rw-1b", "8bit", "reference", "none", "lora"),
    ("falcon-rw-1b", "4bit", "reference", "offload", "lora"),
    ("falcon3", "4bit", "torch", "full", "lora"),
    ("falcon3", "8bit", "torch", "none", "lora"),
    ("falcon3", "8bit", "fp8", "full", "lora"),
    ("falcon3", "4bit", "reference", "full", "adapter"),
    ("falcon-h1", "4bit", "torch", "none", "lora"),
    ("falcon-h1", "8bit", "torch", "full", "lora"),
    ("falcon-h1", "4bit", "reference", "full", "lora"),
)
BLOCKS = 5  # more than there are buffers, and an odd number


def main() -> None:
    device = devices.local_device() if "cuda" in sys.argv else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # as Accelerate does: Triton launches on the current one
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for case in CASES:
        try:
            wrong = _compare(device, *case)
        except Exception:  # on every process alike; the other cases have their turn
            wrong = traceback.format_exc()
        if dist.get_rank() == 0:
            print(*case, f"differs: {wrong}" if wrong else "is the same", flush=True)
    endings.leave(0)


def _compare(device: torch.device, layout: str, mode: Any, way: str, keep: Checkpointing, method: str) -> str:
    of = partial(made, device, layout, mode, way, keep, method)
    models = of(share_out=False), of(share_out=True)
    interpreted = way == "triton" and device.type == "cpu"  # which takes its time
    lengths = [3 + dist.get_rank()] if interpreted else [7 + dist.get_rank(), 40, 3]
    batches = [packed(documents(lengths, seed=seed + dist.get_rank(), device=device)) for seed in (0, 9)]
    with computing(device, way):
        if interpreted:
            return difference(*(one_pass(model, batches[0], True) for model in models))
        # Passes in several orders: what is in the buffers, and gathered ahead, follows from the last.
        for batch, trains in ((0, True), (1, True), (0, False), (1, False), (1, True), (0, True)):
            if wrong := difference(*(one_pass(model, batches[batch], trains) for model in models)):
                return f"{wrong} of {batch, trains}"
        # The main process by itself, with an error on the way, as where an adapter does not open.
        found = alone(models[1], lambda: one_pass(models[1], batches[0], True))
        with suppress(ZeroDivisionError):
            alone(models[1], lambda: _fail(models[1], batches[1]))
        wrong = difference(*(one_pass(model, batches[1], True) for model in models))
        if found is not None:
            wrong = wrong or difference(one_pass(models[0], batches[0], True), found)
        if method == "lora":
            wrong = wrong or _when_it_gathers(models[1], batches[0], may_wait=way == "reference")
    return wrong or _what_it_holds(*models)


@contextmanager
def computing(device: torch.device, way: str) -> Iterator[None]:
    form: Any = None if device.type == "cuda" else {"reference": None, "fp8": "torch"}.get(way, way)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with ops.using(form), autocast, fp8.emulated() if way == "fp8" else nullcontext():
        yield


def made(
    device: torch.device,
    layout: str,
    mode: Any,
    way: str,
    keep: Checkpointing,
    method: str,
    **where: bool,
) -> Any:
    """With random values in its adapter; `where`: `share_out` or `offload` of `load_model`."""
    base = load_model(
        (FAMILIES | FALCON_H1)[layout].replace("num_hidden_layers=2", f"num_hidden_layers={BLOCKS}"),
        quantize_mode=mode,
        device=device,
        compute_dtype="bf16" if device.type == "cuda" else "fp32",
        double_quantization=layout != "falcon-rw-1b",
        seed=1,
        **where,
    )
    model = METHODS[method]().attach(base, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(device) * 0.05)
    enable_packing(model)
    if way != "reference":
        with computing(device, way):
            report = apply_fast_path(model, fp8_products=way == "fp8")
        assert all(map(runs_fast, report.values())), report
    set_checkpointing(model, [keep] * BLOCKS)
    return model


def one_pass(model: Any, batch: dict[str, Any], trains: bool) -> dict[str, Tensor]:
    """Loss and gradients."""
    model.train(trains).zero_grad()
    with nullcontext() if trains else torch.no_grad():
        loss = model(**batch).loss
    if not trains:
        return {"loss": loss}
    loss.backward()
    grads = {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}
    assert len(grads) > 1
    return {"loss": loss.detach(), **grads}


def _fail(model: Any, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**batch)
    raise ZeroDivisionError


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> str:
    if one.keys() != two.keys():
        return "which parameters have a gradient"
    return ", ".join(name for name, each in one.items() if not _are_alike(each, two[name]))


def _are_alike(one: Tensor, two: Tensor) -> bool:
    # On a GPU, attention's backward adds up in no fixed order.
    return torch.equal(one, two) or (one.is_cuda and bool((one - two).norm() <= 1e-2 * one.norm()))


def _when_it_gathers(model: Any, batch: dict[str, Any], *, may_wait: bool) -> str:
    """That each gather is for the block after the one that runs, and the last two blocks are kept.

    On a GPU also that the host waits for nothing.
    """
    base, told = sharded_base_of(model), []
    assert base is not None
    assert isinstance(base.storage, Parts)
    parts = base.storage.parts
    run, use = sharded_base._all_gather, base._use

    def gathers(whole: Tensor, part: Tensor, **how: Any) -> Any:
        told.append(f"gather {[each is part for each in parts].index(True)}")
        return run(whole, part, **how)

    def uses(index: int) -> None:
        told.append(f"run {index}")
        use(index)

    one_pass(model, batch, True)
    sharded_base._all_gather, base._use = gathers, uses  # type: ignore[method-assign]
    if batch["input_ids"].is_cuda and not may_wait:
        torch.cuda.set_sync_debug_mode("error")
    try:
        one_pass(model, batch, True)
    finally:
        if batch["input_ids"].is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        sharded_base._all_gather = run
        del base._use
    forward = "run 0, run 1, gather 2, run 2, gather 3, run 3, gather 4, run 4"
    backward = "run 4, run 3, gather 2, run 2, gather 1, run 1, gather 0, run 0"
    return "" if ", ".join(told) == f"{forward}, {backward}" else ", ".join(told)


def _what_it_holds(whole: Any, shared: Any) -> str:
    """That this process holds its part of the linears and two blocks, and nothing else is a part."""
    base, layout = sharded_base_of(shared), layout_of(shared.config)
    assert base is not None
    assert isinstance(base.storage, Parts)
    processes = dist.get_world_size()
    linears = [dict(each.named_modules()) for each in map(causal_lm_in, (whole, shared))]
    total = 0
    for name in layout.expected_linears():
        one, two = (base_of(modules[name]) for modules in linears)
        total += sum(each.nbytes for each in stored(one).values())
        if not all(map(base.holds, stored(two).values())):
            return f"{name} is not shared out"
    alike = [each for each in held_for_good(shared) if not each.requires_grad]
    frozen = [each for each in shared.parameters() if not each.requires_grad]
    buffers = list(shared.buffers())
    if len(frozen) + len(buffers) - len(alike) != len(layout.expected_linears()):
        return f"{len(frozen) + len(buffers)} tensors, {len(alike)} of them replicated"
    held = sum(each.nbytes for each in (*base.storage.parts, *base.buffers))
    expected = total / processes + 2 * total / BLOCKS
    # Each tensor and each part begins at a multiple of 256 bytes.
    rounding = 256 * (BLOCKS + 2 * processes) * 4 * len(layout.linears)
    return "" if expected <= held <= expected + rounding else f"{held} bytes instead of {expected}"


if __name__ == "__main__":
    main()
