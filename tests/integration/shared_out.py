"""A worker: models whose base is shared out over the processes compute what whole ones do, to the last bit.

Started by torchrun, on several processes that each have other documents. Run on GPUs with ``cuda``.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from falcon_qlora.kernels import ops
from falcon_qlora.methods.table import METHODS
from falcon_qlora.models.activations import Checkpointing, blocks_of, set_checkpointing
from falcon_qlora.models.fast_path import apply_fast_path, runs_fast
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.load import load_model
from falcon_qlora.models.sharded_base import alone, replicated, sharded_base_of
from falcon_qlora.processes import devices, endings
from tests.layouts import FALCON_H1, FAMILIES, documents
from tests.packing import gradients, packed

# Layout, how weights are stored, what runs the blocks (a form of the kernels, or the reference path), what
# they keep, and the method.
CASES: tuple[tuple[str, str, str, Checkpointing, str], ...] = (
    ("falcon-7b", "4bit", "torch", "none", "lora"),
    ("falcon-7b", "8bit", "torch", "full", "lora"),
    ("falcon-7b", "4bit", "triton", "full", "lora"),
    ("falcon-7b", "8bit", "triton", "none", "lora"),
    ("falcon-7b", "4bit", "reference", "none", "adapter"),
    ("falcon-7b", "4bit", "torch", "selective", "adapter"),
    ("falcon-7b", "8bit", "torch", "none", "adapter_v2"),
    ("falcon-7b", "8bit", "reference", "full", "adapter_v2"),
    ("falcon-40b", "4bit", "torch", "offload", "lora"),
    ("falcon-40b", "16bit", "torch", "selective", "lora"),
    ("falcon-40b", "4bit", "reference", "none", "lora"),
    ("falcon-40b", "16bit", "reference", "none", "lora"),
    ("falcon-rw-1b", "8bit", "reference", "none", "lora"),
    ("falcon-rw-1b", "4bit", "reference", "offload", "lora"),
    ("falcon3", "4bit", "torch", "full", "lora"),
    ("falcon3", "8bit", "triton", "none", "lora"),
    ("falcon3", "4bit", "reference", "full", "adapter"),
    ("falcon-h1", "4bit", "torch", "none", "lora"),
    ("falcon-h1", "8bit", "torch", "full", "lora"),
    ("falcon-h1", "4bit", "reference", "full", "lora"),
)
_BLOCKS = 5  # more than there are buffers, and an odd number
_NONE: Any = None


def main() -> None:
    device = devices.local_device() if "cuda" in sys.argv else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for case in CASES:
        if device.type == "cuda" and "torch" in case:
            continue
        wrong = _compare(device, *case)
        if dist.get_rank() == 0:
            print(*case, "the same" if not wrong else f"differs: {wrong}", flush=True)
    endings.leave(0)


def _compare(device: torch.device, layout: str, mode: Any, way: str, keep: Checkpointing, method: str) -> str:
    if way == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return ""
    models = [
        _model(device, layout, mode, way, keep, method, share_out=share_out) for share_out in (False, True)
    ]
    interpreted = way == "triton" and device.type == "cpu"  # which takes its time
    lengths = [3 + dist.get_rank()] if interpreted else [7 + dist.get_rank(), 40, 3]
    batches = [packed(documents(lengths, seed=seed + dist.get_rank(), device=device)) for seed in (0, 9)]
    forms = ops.using(_NONE if way == "reference" or device.type == "cuda" else way)
    with forms:
        if interpreted:
            return _difference(*(_pass(model, batches[0], True) for model in models))
        # Passes in several orders: what is in the buffers and what is gathered ahead follow from the last.
        for batch, trains in ((0, True), (1, True), (0, False), (1, False), (1, True), (0, True)):
            one, two = (_pass(model, batches[batch], trains) for model in models)
            if wrong := _difference(one, two):
                return f"{wrong} of pass {batch, trains}"
        # The main process by itself, with an error on the way, as when an adapter does not open.
        found = alone(models[1], lambda: _pass(models[1], batches[0], True))
        try:
            alone(models[1], lambda: _fail(models[1], batches[1]))
        except ZeroDivisionError:
            pass
        one, two = (_pass(model, batches[1], True) for model in models)
        wrong = _difference(one, two)
        if found is not None:
            wrong = wrong or _difference(_pass(models[0], batches[0], True), found)
    return wrong or _where_it_lies(*models)


def _model(
    device: torch.device, layout: str, mode: Any, way: str, keep: Checkpointing, method: str, **how: Any
) -> Any:
    name = (FAMILIES | FALCON_H1)[layout].replace("num_hidden_layers=2", f"num_hidden_layers={_BLOCKS}")
    dtype = "bf16" if device.type == "cuda" else "fp32"
    # One kind of case has float32 scales.
    nested = layout != "falcon-rw-1b"
    base = load_model(
        name,
        quantize_mode=mode,
        device=device,
        compute_dtype=dtype,
        double_quantization=nested,
        seed=1,
        **how,
    )
    model = METHODS[method]().attach(base, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(device) * 0.05)
    enable_packing(model)
    if way != "reference":
        with ops.using(_NONE if device.type == "cuda" else way):
            report = apply_fast_path(model)
        assert all(map(runs_fast, report.values())), report
    set_checkpointing(model, [keep] * len(blocks_of(model)))
    return model


def _pass(model: Any, batch: dict[str, Any], trains: bool) -> dict[str, torch.Tensor]:
    model.train(trains).zero_grad()
    with nullcontext() if trains else torch.no_grad():
        loss = model(**batch).loss
    if not trains:
        return {"loss": loss}
    loss.backward()
    # The embedding's output needs no gradient, so the first blocks of an adapter have none.
    grads = {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}
    assert len(grads) > 1
    return {"loss": loss.detach(), **grads}


def _fail(model: Any, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**batch)
    raise ZeroDivisionError


def _difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> str:
    if one.keys() != two.keys():
        return "which parameters have a gradient"
    return ", ".join(name for name, each in one.items() if not torch.equal(each, two[name]))


def _where_it_lies(whole: Any, shared: Any) -> str:
    """That a process holds no more than its part and two blocks: its memory counted, by storages."""
    base = sharded_base_of(shared)
    assert base is not None
    kept = {id(each) for each in replicated(shared)}
    linears = [p for n, p in whole.named_parameters() if id(p) and ".weight" in n and p.ndim == 2]
    total = sum(each.nbytes for each in linears)
    here = sum(part.nbytes for part in base._parts)
    frozen = [p for p in shared.parameters() if not p.requires_grad and p.ndim == 2 and id(p) not in kept]
    if len(frozen) < 4 * _BLOCKS:
        return "linears that are replicated"
    return "" if here < total else "the parts are no smaller than the whole"


if __name__ == "__main__":
    main()
