"""What can be wrong with a run although it ends well, or on one rank alone: more FAULTS of `faulty_worker`.

{"do": "unquantized"}           a linear holds plain weights
{"do": "unadapted"}             the LoRA of a linear is frozen
{"do": "endless"}               end tokens are no targets
{"do": "leak"}                  packed documents are one to attention
{"do": "version", "rank": 1}    another PEFT
{"do": "lost"}                  rows dropped for want of an answer are counted nowhere
{"do": "twice"}                 the seconds of the start are counted twice, and more
{"do": "peak"}                  half of the memory was predicted
{"do": "rebased"}               the base's files change while the run trains
{"do": "alpha"}                 a saved adapter has another scale
{"do": "gone", "rank": 1}       the data's file is not there
{"do": "kernel", "rank": 1}     GELU gives more than it should
{"do": "compiled"}              kernels are compared at the start, as on a GPU
{"do": "sum", "rank": 1}        an all-reduce gives more than it should
{"do": "dawdle", "rank": 1}     what a dry run saved is read back two seconds later
{"do": "blind", "rank": 1}      and then is not there
{"do": "card", "mib": 30}       there is a card of this size, beside what libraries take
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.data import corpus
from falcon_qlora.data.batches import DocumentReader
from falcon_qlora.kernels import ops
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models import step_memory
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.quantize import dequantized_weight
from falcon_qlora.step import loss
from falcon_qlora.training import (
    activations,
    batch_tokens,
    build,
    checks,
    estimate,
    finish,
    kernel_check,
    rows,
)
from falcon_qlora.training.cards import Card
from falcon_qlora.training.throughput import peak_memory_gib


def install(faults: Callable[..., list[dict[str, Any]]]) -> None:
    """Put in the faults that fall on this process."""
    for name, put_in in _FAULTS.items():
        if faults(name):
            put_in()
    for fault in faults("card"):
        _card(fault["mib"])


def _after_loading(change: Callable[[Any, Any], None]) -> None:
    """Have `change` alter a model and one of its linears, once it has its adapter."""
    load: Callable[..., Any] = build.model_with_adapter

    def faulty(*arguments: Any, **named: Any) -> Any:
        model = load(*arguments, **named)
        base = causal_lm_in(model)
        change(model, base.get_submodule(layout_of(base.config).expected_linears()[3]))
        return model

    build.model_with_adapter = faulty


def _freeze(model: Any, linear: Any) -> None:
    linear.lora_B["default"].weight.data.fill_(0.01)  # what is still zero ends a run
    linear.requires_grad_(False)


def _unquantized() -> None:
    def change(model: Any, linear: Any) -> None:
        weight = dequantized_weight(linear.base_layer)
        linear.base_layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.base_layer.weight = nn.Parameter(weight, requires_grad=False)

    _after_loading(change)


def _endless() -> None:
    read = DocumentReader.micro_batch

    def faulty(self: Any, documents: Any) -> Any:
        batch = read(self, documents)
        kept = batch.targets != self.padding_id
        targets, positions = batch.targets[kept], batch.target_positions[kept]
        return dataclasses.replace(batch, targets=targets, target_positions=positions)

    DocumentReader.micro_batch = faulty  # type: ignore[method-assign]


def _leak() -> None:
    sequences = loss.Sequences

    def faulty(**named: Any) -> Any:
        total = sum(named["lengths"])
        whole = torch.tensor([0, total], dtype=torch.int32)
        return sequences(**named | {"cu_seqlens": whole, "lengths": (total,), "max_length": total})

    loss.Sequences = faulty  # type: ignore[assignment,misc]


def _version() -> None:
    from falcon_qlora.training import dry_run

    known = checks.versions
    dry_run.versions = checks.versions = lambda: known() | {"peft": "0.0.1"}


def _lost() -> None:
    statistics = corpus._statistics
    corpus._statistics = lambda *given: dataclasses.replace(statistics(*given), rows_dropped_empty=0)


def _twice() -> None:
    clock = finish._wall_clock

    def faulty(trainer: Any) -> dict[str, Any]:
        told = clock(trainer)
        return told | {"start_seconds": told["wall_seconds"] + told["start_seconds"]}

    finish._wall_clock = faulty


def _peak() -> None:
    choose = activations.choose_activations
    activations.choose_activations = lambda *given, **named: dataclasses.replace(
        choose(*given, **named), predicted_gib=peak_memory_gib() / 2
    )


def _rebased() -> None:
    require_moved = finish.require_moved

    def faulty(trainer: Any, **named: Any) -> None:
        config = Path(trainer.model.config.name_or_path, "config.json")
        config.write_text(config.read_text() + "\n")
        require_moved(trainer, **named)

    finish.require_moved = faulty


def _alpha() -> None:
    save = Lora.save

    def faulty(self: Any, model: Any, folder: Path, *state: Any) -> None:
        save(self, model, folder, *state)
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({**settings, "lora_alpha": settings["lora_alpha"] * 2}))

    Lora.save = faulty  # type: ignore[method-assign]


def _gone() -> None:
    read = rows.corpora

    def faulty(data: Any, *given: Any, **named: Any) -> Any:
        return read(dataclasses.replace(data, dataset_name=["gone/rows.jsonl"]), *given, **named)

    rows.corpora = faulty


def _kernel() -> None:
    gelu = ops.gelu
    # Beyond what rounding may do in bfloat16.
    ops.gelu = lambda *given, **named: gelu(*given, **named).mul_(-4)  # type: ignore[assignment]


def _compiled() -> None:
    kernel_check.is_compiled_for = lambda device: True


def _sum() -> None:
    add_up = dist.all_reduce

    def faulty(tensor: torch.Tensor, *given: Any, **named: Any) -> None:
        add_up(tensor, *given, **named)
        tensor[:3] += 1

    dist.all_reduce = faulty


def _dawdle(then_fails: bool = False) -> None:
    from falcon_qlora.training.dry_run import DryRun

    read = DryRun._read_back

    def faulty(*given: Any) -> str:
        time.sleep(2)
        if then_fails:
            raise UserError("the checkpoint is not there")
        return read(*given)

    DryRun._read_back = faulty  # type: ignore[method-assign]


def _card(mib: float) -> None:
    card = Card(name="made up", title="made up", gib=mib / 2**10)
    batch_tokens.card_here = lambda: card
    estimate._CONTEXT_BYTES = estimate._NCCL_BYTES = step_memory._UNCOUNTED_BYTES = 0


_FAULTS: dict[str, Callable[[], None]] = {
    "unquantized": _unquantized,
    "unadapted": lambda: _after_loading(_freeze),
    "endless": _endless,
    "leak": _leak,
    "version": _version,
    "lost": _lost,
    "twice": _twice,
    "peak": _peak,
    "rebased": _rebased,
    "alpha": _alpha,
    "gone": _gone,
    "kernel": _kernel,
    "compiled": _compiled,
    "sum": _sum,
    "dawdle": _dawdle,
    "blind": lambda: _dawdle(then_fails=True),
}
