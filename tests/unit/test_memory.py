"""The arithmetic of a step's memory against what was measured on an H200 (tests/benchmarks)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from falcon_qlora.common.quantities import GIB
from falcon_qlora.kernels import ops
from falcon_qlora.methods.interface import trainable_count
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models.activations import Checkpointing
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import layout_of, preset_config
from falcon_qlora.models.load import load_model
from falcon_qlora.models.scaled import head_loss
from falcon_qlora.models.sizes import weight_bytes
from falcon_qlora.models.step_memory import (
    _UNCOUNTED_BYTES,
    Step,
    allocated_optimizer_bytes,
    embedded_share,
    gathered_bytes,
    optimizer_bytes,
)
from tests.layouts import attach_lora, documents
from tests.packing import packed

FALCON_7B = preset_config("falcon-7b")
TRAINABLE = trainable_count(Lora(r=64), FALCON_7B)
LAYERS = FALCON_7B.num_hidden_layers
ORDER: list[Checkpointing] = ["none", "selective", "full", "offload"]

RECORDS = Path(__file__).parent.parent / "benchmarks" / "records.csv"
# The benchmark of the reference path's records compared gradients first; what it made for that was still
# there: two blocks and the embedding in float32, the same in 4 bits, and their adapters.
LEFT_OVER = 3.7e9


def step(name: str = "falcon-7b", **settings: object) -> Step:
    config = preset_config(name)
    trainable = trainable_count(Lora(r=64), config)
    given = {"tokens": 8192, "trainable": trainable, "fast": True, "lora_rank": 64}
    return Step(config=config, **given | settings)  # type: ignore[arg-type]


def in_all(one: Step, checkpointing: Checkpointing) -> float:
    """Bytes with the model and its adapter."""
    loaded = weight_bytes(one.config, "4bit") + 4 * one.trainable
    return loaded + one.bytes([checkpointing] * one.config.num_hidden_layers)


@pytest.mark.parametrize(("fast", "more_gb"), [(True, 46.1 - 27.9), (False, 42.0 - 27.9)])
def test_what_is_measured_between_two_records_is_predicted(fast: bool, more_gb: float) -> None:
    # Twice the tokens, and the reference path instead of the fast one.
    other = step(tokens=16384) if fast else step(fast=False)
    assert (in_all(other, "none") - in_all(step(), "none")) / 1e9 == pytest.approx(more_gb, rel=0.1)


@pytest.mark.parametrize(("checkpointing", "measured_gb"), [("none", 42.0), ("full", 13.4)])
def test_a_step_on_the_reference_path_takes_what_was_measured(
    checkpointing: Checkpointing, measured_gb: float
) -> None:
    predicted = in_all(step(fast=False), checkpointing) + LEFT_OVER
    assert 0.98 * measured_gb < predicted / 1e9 < 1.15 * measured_gb


def test_a_step_on_the_fast_path_takes_what_was_measured() -> None:
    with RECORDS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if "benchmarks.memory" in row["note"]]
    found = {}
    for row in rows:
        name, setting = row["model"].removeprefix("random:"), row["variant"]
        if setting.startswith("auto"):
            continue
        given = {"optimizer_bytes": 0} if setting.startswith("smallest") else {}
        one = step(name, tokens=int(row["micro_batch_tokens"]), **given)
        predicted = in_all(one, row["checkpointing"]) / 1e9  # type: ignore[arg-type]
        found[name, setting] = predicted / float(row["peak_allocated_gb"])
    assert len(found) == 10
    assert all(0.98 < ratio < 1.15 for ratio in found.values()), found


def test_attentions_backward_is_counted_as_flashattention_2_allocates_it() -> None:
    # Gradients of query, key and value in bfloat16 and for every query head, that of the query in float32
    # too; tests/gpu measures it. Beside them lie the two parts of what was joined.
    one = step()
    heads = one.config.num_attention_heads * 64
    joined = one.config.hidden_size + one.config.ffn_hidden_size
    beside = 2 * (one.working_values("none")[2] - joined)
    assert beside == heads * (3 * 2 + 4)


@pytest.mark.parametrize("tokens", [40, 1000, 1024, 2500])
def test_the_head_has_as_many_rows_of_logits_at_a_time_as_are_counted(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, losses = [], ops.cross_entropy_
    monkeypatch.setattr(
        ops, "cross_entropy_", lambda logits, *rest: rows.append(len(logits)) or losses(logits, *rest)
    )
    hidden = torch.randn(tokens, 8, requires_grad=True)
    head_loss(hidden, torch.nn.Linear(8, 32, bias=False), torch.zeros(tokens, dtype=torch.int64))
    few, more = (
        Step(config=preset_config("falcon-7b", vocab_size=words), tokens=tokens, trainable=0, fast=True)
        for words in (1000, 2000)
    )
    # In bfloat16; Triton's kernel replaces them by their gradient.
    assert more._head - few._head == max(rows) * 1000 * 2


def parts_of_the_smallest(one: Step) -> list[int]:
    """The rows of the table in `step_memory`, in bytes."""
    embedding = 2 * one.config.vocab_size * one.config.hidden_size
    at_work = [int(each * one.tokens * one.value_bytes) for each in one.working_values("offload")]
    trained = one.trainable_bytes * one.trainable
    weights = weight_bytes(one.config, "4bit") - embedding
    return [weights, embedding, trained, trained, one._weights, *at_work, _UNCOUNTED_BYTES]


@pytest.mark.parametrize(("name", "goal_gb"), [("falcon-7b", 7.0), ("falcon-40b", 32.0)])
def test_the_smallest_setting_is_what_the_table_says_and_within_the_goal(name: str, goal_gb: float) -> None:
    import falcon_qlora.models.step_memory

    one = step(name, optimizer_bytes=allocated_optimizer_bytes("paged_adamw_8bit"))
    parts = parts_of_the_smallest(one)
    assert sum(parts) == pytest.approx(in_all(one, "offload"), rel=1e-6)
    assert in_all(one, "offload") < goal_gb * 1e9
    table = [
        line.strip("| ").split(" | ")
        for line in falcon_qlora.models.step_memory.__doc__.splitlines()
        if "| " in line
    ]
    column = table[0].index("7B" if name == "falcon-7b" else "40B") + 1
    said = [float(row[column]) for row in table if row[-1][0].isdigit() and row[-1] != "40B"]
    assert said == [round(each / 1e9, 2) for each in [*parts, sum(parts)]]


@pytest.mark.parametrize("fast", [True, False])
def test_auto_computes_again_no_more_than_memory_demands(fast: bool) -> None:
    one = step(fast=fast)
    smaller = [each for each in ORDER if fast or each != "selective"]
    assert one.choose(200 * GIB) == ["none"] * LAYERS
    assert one.choose(GIB) == ["offload"] * LAYERS
    seen = set()
    for tenth in range(20, 600, 9):
        free = tenth * GIB // 10
        blocks = one.choose(free)
        seen |= set(blocks)
        if blocks == ["offload"] * LAYERS:
            continue
        assert one.bytes(blocks) <= 0.92 * free
        assert len(set(blocks)) <= 2
        # One block less would be too much.
        changed = max(index for index, each in enumerate(blocks) if each == max(blocks, key=smaller.index))
        if blocks[changed] != "none":
            blocks[changed] = smaller[smaller.index(blocks[changed]) - 1]
            assert one.bytes(blocks) > 0.92 * free
    assert seen == set(smaller)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    "adamw_torch_fused sgd adafactor adagrad rmsprop adamw_bnb_8bit paged_adamw_8bit paged_adamw_32bit "
    "lion_8bit lion_32bit rmsprop_bnb_8bit ademamix ademamix_8bit".split(),
)
def test_an_optimizers_state_is_what_the_trainer_makes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    kind, words = Trainer.get_optimizer_cls_and_kwargs(settings)
    weight = torch.nn.Parameter(torch.randn(512, 512, dtype=dtype))
    optimizer = kind([weight], **words)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if torch.is_tensor(value)]
    found = (
        sum(value.nbytes for value in kept if value.numel() > 256) / weight.numel()
    )  # no tables, no counts
    assert optimizer_bytes(name, dtype.itemsize) == pytest.approx(found, abs=0.02)
    paged = name.startswith("paged")
    assert allocated_optimizer_bytes(name) == (0 if paged else optimizer_bytes(name))


# Tokens of a micro batch (82 to 87 % of them real on average), how many to a step, GPUs, optimizer, and the
# most that was reserved; full fine-tuning through the command line on H200s.
FULL = [
    (8192, 1, 1, "adamw_torch_fused", 64.37),
    (8192, 1, 1, "adamw_bnb_8bit", 57.73),
    (4096, 4, 1, "adamw_bnb_8bit", 59.24),
    (4096, 1, 2, "adamw_torch_fused", 44.07),
]


@pytest.mark.parametrize(("tokens", "to_a_step", "gpus", "optim", "measured_gib"), FULL)
def test_full_fine_tuning_takes_what_was_measured(
    tokens: int, to_a_step: int, gpus: int, optim: str, measured_gib: float
) -> None:
    whole = layout_of(FALCON_7B).parameter_count()
    one = step(
        tokens=tokens,
        trainable=whole // gpus,
        trainable_bytes=2,
        fast=False,
        lora_rank=0,
        optimizer_bytes=allocated_optimizer_bytes(optim, 2, embedded=embedded_share(FALCON_7B)),
        gradients_stay=to_a_step > 1,
        all_trained=True,
        gathered=gathered_bytes(FALCON_7B, 2) if gpus > 1 else 0,
    )
    predicted = (2 * whole // gpus + one.bytes(["none"] * LAYERS)) / GIB
    assert 0.93 < predicted / measured_gib < 1.15


def test_gradients_that_come_as_activations_go_are_not_counted_beside_them() -> None:
    # 40B at 8,192 tokens reserved 87.9 GB on one GPU and 89.7 on each of two, where they lie in a buffer.
    stay, go = step("falcon-40b"), step("falcon-40b", gradients_stay=False)
    more = stay.bytes(["none"] * 60) - go.bytes(["none"] * 60)
    assert more / 1e9 == pytest.approx(89.7 - 87.9, rel=0.05)
    assert stay.bytes(["offload"] * 60) == go.bytes(["offload"] * 60)


@pytest.mark.parametrize(
    ("name", "card_bytes", "predicted_gb"),
    [("falcon-40b", 24 * 2**30, 18.8), ("falcon-180b", 80 * 10**9, 64.8)],
)
def test_two_cards_that_share_a_base_out_train_what_neither_holds(
    name: str, card_bytes: int, predicted_gb: float
) -> None:
    one = step(name, optimizer_bytes=allocated_optimizer_bytes("paged_adamw_8bit"))
    whole, part = (weight_bytes(one.config, "4bit", processes=processes) for processes in (1, 2))
    blocks: list[Checkpointing] = ["offload"] * one.config.num_hidden_layers
    adapter = 4 * one.trainable
    assert one.bytes(blocks) + adapter + part == pytest.approx(predicted_gb * 1e9, rel=0.01)
    assert one.fits(blocks, card_bytes - adapter - part)
    assert not one.fits(blocks, card_bytes - adapter - whole)
    # tests.integration.shared_out counts what the processes hold: a part of the linears, and two blocks.
    rest = 2 * (layout_of(one.config).parameter_count() - layout_of(one.config).linear_parameter_count())
    assert part - rest == pytest.approx((whole - rest) * (1 / 2 + 2 / one.config.num_hidden_layers), rel=1e-6)


# Shares as in 7B.
_H1 = "head_dim=32,intermediate_size=1024,mamba_d_ssm=256,mamba_n_heads=4,mamba_d_head=64,mamba_d_state=16"


@pytest.mark.parametrize(
    "model", ["falcon3-7b?head_dim=64,intermediate_size=1920", f"falcon-h1-7b?{_H1}"], ids=["falcon3", "h1"]
)
def test_what_a_block_keeps_is_what_is_counted(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    # PEFT looks for autocast on GPUs alone; without it each LoRA reads a copy of its own.
    shape = "vocab_size=160,hidden_size=256,num_attention_heads=4,num_key_value_heads=1"
    asked, tokens = torch.is_autocast_enabled, 128
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: not device or asked(*device))
    kept = []
    for blocks in (1, 3):
        name = f"random:{model},{shape},num_hidden_layers={blocks}"
        trained: Any = attach_lora(load_model(name, device="cpu", compute_dtype="bf16"), r=8)
        enable_packing(trained)
        here: dict[int, Tensor] = {}

        def keep(tensor: Tensor, here: dict[int, Tensor] = here) -> Tensor:
            here[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            output = trained(**packed(documents([tokens])))
        assert output.loss.requires_grad
        activations = [each for each in here.values() if tokens in each.shape]
        kept.append(sum(each.untyped_storage().nbytes() for each in activations))
    one = Step(config=trained.config, tokens=tokens, trainable=0, fast=False, lora_rank=8)
    # On the CPU attention keeps keys and values for every query head.
    assert one._kept("none") == pytest.approx((kept[1] - kept[0]) / 2 / tokens, rel=0.06)
