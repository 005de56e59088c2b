"""What blocks keep is chosen from the memory there is: a whole run's settings on a GPU that is made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from falcon_qlora.config import Configuration, parse
from falcon_qlora.kernels import fp8
from falcon_qlora.kernels.fp8_block import Fp8
from falcon_qlora.models.activations import blocks_of
from falcon_qlora.models.fast_path import choose_kernels
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.load import load_model
from falcon_qlora.processes import devices
from falcon_qlora.training.activations import Activations, choose_activations

GIB = 2**30
# Layers enough for a share of them, and micro batches whose activations are what matters.
MODEL = "random:falcon-7b?num_hidden_layers=6,vocab_size=64,hidden_size=192,num_attention_heads=3"
SETTINGS = f"-m {MODEL} -b 8 --max_length 2048 --kernels auto"
USABLE = 0.92

Choose = Callable[..., tuple[Activations, Any]]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """`choose_activations` with so many bytes free on a GPU; also the model."""

    def kept(model: Any) -> int:
        products = [_state(block).products for block in blocks_of(model) if _state(block) is not None]
        weights = [weight for each in products if isinstance(each, Fp8) for weight in each.weights]
        return sum(values.nbytes for weight in weights for values in weight.kept.values())

    def chosen(flags: str, free: int) -> tuple[Activations, Any]:
        configuration = parse([*SETTINGS.split(), *flags.split()])
        model = _model(configuration)
        kernels = choose_kernels(
            model, kernels=configuration.model.kernels, compute_dtype=configuration.model.compute_dtype
        )
        optimizer = configuration.optimizer  # of the trainer's settings, made for this machine
        with monkeypatch.context() as gpu:
            gpu.setattr(devices, "local_device", lambda: torch.device("cuda", 0))
            gpu.setattr(torch.cuda, "empty_cache", lambda: None)
            gpu.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
            gpu.setattr(torch.cuda, "memory_allocated", lambda device: kept(model))
            activations = choose_activations(
                configuration.run,
                model,
                kernels,
                max_length=configuration.data.max_length,
                optimizer=optimizer,
            )
        return activations, model

    return chosen


def _model(configuration: Configuration) -> Any:
    settings = configuration.model
    base = load_model(
        settings.model_name_or_path,
        quantize_mode=settings.quantize_mode,
        compute_dtype=settings.compute_dtype,
        device="cpu",
    )
    model = configuration.method.attach(base, seed=0)
    enable_packing(model)
    return model


def _state(block: Any) -> Any:
    return getattr(block, "_fast_path_state", None)


def needed(activations: Activations) -> float:
    """Bytes predicted."""
    assert activations.predicted_gib is not None
    return activations.predicted_gib * GIB


def trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_auto_keeps_as_much_as_there_is_memory_for(choose: Choose) -> None:
    ample, _ = choose("", 80 * GIB)
    least, _ = choose("", 0)
    assert (set(ample.blocks), set(least.blocks)) == ({"none"}, {"offload"})
    enough = int(needed(ample) / USABLE)
    # A hair more than all of it takes, and a hair less.
    assert [set(choose("", enough + spare)[0].blocks) for spare in (4096, -4096)] == [
        {"none"},
        {"none", "selective"},
    ]
    seen = set()
    for tenth in range(1, 10):
        free = int((needed(least) + tenth / 10 * (needed(ample) - needed(least))) / USABLE)
        some, model = choose("", free)
        assert needed(least) <= needed(some) <= USABLE * free + 1 < needed(ample)
        # The blocks themselves do as was chosen.
        keeps = {"none": "all", "selective": "attention", "full": "input", "offload": "offload"}
        assert [_state(block).keep for block in blocks_of(model)] == [keeps[each] for each in some.blocks]
        seen |= set(some.blocks)
        if "none" in some.blocks:
            count = some.blocks.count("selective")
            assert some.described().startswith(
                f"activations: kept; the largest recomputed in {count} of 6 blocks; "
            )
    assert {"none", "selective", "full"} <= seen


def test_reference_blocks_adapt_without_what_they_cannot_do(choose: Choose) -> None:
    ample, _ = choose("--kernels off", 80 * GIB)
    some, model = choose("--kernels off", int(0.9 * needed(ample) / USABLE))
    assert set(some.blocks) == {"none", "full"}
    assert [block.gradient_checkpointing for block in blocks_of(model)] == [
        each == "full" for each in some.blocks
    ]


@pytest.mark.parametrize("wanted", ["none", "selective", "full", "offload"])
def test_what_is_asked_for_is_done_whatever_memory_there_is(wanted: str, choose: Choose) -> None:
    blocks = [choose(f"--checkpointing {wanted}", free)[0].blocks for free in (0, 80 * GIB)]
    assert blocks == [[wanted] * 6] * 2


def test_fp8_weights_are_kept_where_there_is_room_beside_everything(choose: Choose) -> None:
    with fp8.emulated():
        flags = "-q 4bit --compute_dtype fp8"
        bare, model = choose(f"{flags} --checkpointing none", 0)
        frozen = sum(m.out_features * m.in_features for n, m in model.named_modules() if "base_layer" in n)
        enough = int((needed(bare) + 2 * frozen) / USABLE)
        tight, _ = choose(flags, enough - 4096)
        with_room, _ = choose(flags, enough + 4096)
        full, _ = choose(f"{flags} --checkpointing full", 80 * GIB)
        bf16, _ = choose("-q 4bit --compute_dtype bf16", 80 * GIB)
    assert [each.fp8_weights_kept for each in (bare, tight, with_room, full, bf16)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert tight.blocks == with_room.blocks == ["none"] * 6
    assert needed(tight) == needed(bare)
    # They lie on the device when what is predicted is said.
    assert needed(with_room) - needed(bare) == pytest.approx(2 * frozen)
    assert "weights kept in FP8" in with_room.described()
    assert "FP8" not in tight.described()


@pytest.mark.parametrize(
    ("compute_dtype", "optimizer", "state", "gradient"),
    [
        ("bf16", "adamw_bnb_8bit", 2, 2),
        ("bf16", "adamw_8bit", 2, 2),
        ("bf16", "adamw_torch_fused", 4, 2),
        ("bf16", "paged_adamw_8bit", 0, 2),
        ("fp32", "adamw_torch_fused", 8, 4),
        ("fp32", "adamw_bnb_8bit", 2, 4),
    ],
)
def test_full_fine_tunings_state_and_gradients_are_counted_in_the_weights_dtype(
    compute_dtype: str, optimizer: str, state: int, gradient: int, choose: Choose
) -> None:
    flags = f"--method full -q 16bit --checkpointing none --compute_dtype {compute_dtype}"
    stateless, model = choose(f"{flags} --optim sgd", 0)
    assert {parameter.dtype.itemsize for parameter in model.parameters()} == {gradient}
    stateful, _ = choose(f"{flags} --optim {optimizer}", 0)
    # An 8-bit optimizer has scales, and keeps the state of the embedding, the smallest part here, in 32 bits.
    found = (needed(stateful) - needed(stateless)) / trainable(model)
    assert state <= found <= 1.05 * state
    # Gradients of the micro batch before lie beside all activations; a single one's come as those go.
    several, _ = choose(f"{flags} --optim sgd --gradient_accumulation_steps 2", 0)
    assert (needed(several) - needed(stateless)) / trainable(model) == pytest.approx(gradient, rel=1e-6)


def test_an_adapters_state_and_gradients_are_float32s(choose: Choose) -> None:
    flags = "-q 4bit --compute_dtype bf16 --checkpointing none"
    stateless, model = choose(f"{flags} --optim sgd", 0)
    stateful, _ = choose(f"{flags} --optim adamw_torch_fused", 0)
    several, _ = choose(f"{flags} --optim sgd --global_batch_size 16", 0)
    for more, size in ((stateful, 8), (several, 4)):
        assert (needed(more) - needed(stateless)) / trainable(model) == pytest.approx(size, rel=1e-6)
