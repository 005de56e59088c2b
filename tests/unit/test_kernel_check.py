"""The fast path beside the model's own forward, at every start of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from falcon_qlora.common.errors import UserError
from falcon_qlora.kernels import fp8, frozen_linear
from falcon_qlora.kernels.block import Block
from falcon_qlora.kernels.fp8_gelu_products import PLAIN
from falcon_qlora.kernels.frozen_linear import SharedOutput
from falcon_qlora.kernels.libraries import Loaded
from falcon_qlora.methods.table import METHODS
from falcon_qlora.models import fast_path
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.training import kernel_check
from falcon_qlora.training.kernel_check import _NOISES, Distance, check_kernels
from tests.layouts import tiny_model, vary_norms
from tests.unit.test_fast_path import LAYOUTS_AND_MODES, SEQUENTIAL_MODES, adapted

CPU = torch.device("cpu")
FP8 = ["fp8", "fp8, GELU in products"]
CASES = [(*case, dtype) for case in (*LAYOUTS_AND_MODES, *SEQUENTIAL_MODES) for dtype in ("auto", "bf16")]
CASES += [("falcon-7b", "4bit", FP8[1]), ("falcon-40b", "16bit", FP8[0])]
CASES += [("falcon3", "4bit", FP8[0]), ("falcon-h1", "8bit", FP8[0])]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "is_compiled_for", lambda device: True)


@pytest.mark.parametrize(("layout", "mode", "compute_dtype"), CASES)
def test_right_kernels_pass_and_nothing_is_changed(
    layout: str, mode: Any, compute_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp8 = compute_dtype.startswith("fp8")
    if compute_dtype.endswith("products"):
        monkeypatch.setattr(fast_path, "_fp8_gelu_products", lambda base: Loaded(PLAIN))
    model = adapted(layout, mode, r=16, compute_dtype="auto" if compute_dtype == "auto" else "bf16")
    vary_norms(model)
    before = {name: (each, each.data, each.clone()) for name, each in model.named_parameters()}
    states = torch.get_rng_state()
    with fp8.emulated():
        apply_fast_path(model, fp8_products=in_fp8)
        found = check_kernels(model.train(), CPU)
    assert isinstance(found, Distance)
    limit = 0.3 if in_fp8 else 0.1 if compute_dtype == "bf16" or mode == "8bit" else 1e-5
    assert found.noise == (0, 0)
    assert 0 <= found.gradients < limit < found.limit
    assert found.of_worst < 0.4
    assert model.training
    assert torch.equal(torch.get_rng_state(), states)
    for name, each in model.named_parameters():
        same, data, value = before[name]
        assert each is same
        assert each.data_ptr() == data.data_ptr()
        assert torch.equal(each, value)
        assert each.grad is None


@pytest.mark.parametrize("name", ["adapter", "adapter_v2"])
def test_other_methods_are_compared_too(name: str) -> None:
    model = METHODS[name](prefix_length=5, first_block=0).attach(
        tiny_model("falcon-7b", "4bit").requires_grad_(False), seed=3
    )
    enable_packing(model)
    apply_fast_path(model)
    found = check_kernels(model, CPU)
    assert isinstance(found, Distance)
    assert found.gradients < 1e-5


def of_one_matrix(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`SharedOutput.adapter_gradients` with another gradient of dense's A."""
    right = SharedOutput.adapter_gradients

    def wrong(self: SharedOutput, *args: Any) -> Any:
        *others, of_a, of_b = right(self, *args)
        assert of_a is not None
        return [*others, change(of_a), of_b]

    return wrong


@pytest.mark.parametrize("compute_dtype", ["auto", "bf16"])
@pytest.mark.parametrize(
    "change", [lambda x: x * 40_000, torch.zeros_like, torch.neg, lambda x: x.fill_(math.nan)]
)
def test_a_wrong_gradient_of_one_matrix_is_refused_by_name(
    change: Any, compute_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("falcon-7b", "4bit", compute_dtype=compute_dtype)
    apply_fast_path(model)
    monkeypatch.setattr(SharedOutput, "adapter_gradients", of_one_matrix(change))
    with pytest.raises(
        UserError, match=r"gradients by \S+ of their norm.*, dense\.lora_A by .*--kernels off"
    ):
        check_kernels(model, CPU)


def test_low_parts_that_a_compiler_gets_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton 3.6 did on Hopper from dc6841e to d4d649d: the loss stays near, gradients do not."""
    monkeypatch.setattr(fast_path, "_fp8_gelu_products", lambda base: Loaded(PLAIN))
    split = fp8.split_columns

    def wrong(x: torch.Tensor, *args: Any, of_weight: bool) -> torch.Tensor:
        out = split(x, *args, of_weight=of_weight)
        rank = x.shape[1]
        low = slice(rank, 2 * rank) if not of_weight else slice(2 * rank, 3 * rank)
        args[-1][:, low] = 448.0
        return out

    monkeypatch.setattr(fp8, "split_columns", wrong)
    model = adapted("falcon-7b", "4bit", r=16, compute_dtype="bf16")
    with fp8.emulated():
        apply_fast_path(model, fp8_products=True)
        ways = "Give --kernels portable, which leaves optional libraries out; or --compute_dtype auto; or "
        with pytest.raises(UserError, match=ways):
            check_kernels(model, CPU)
        ways = "Give --compute_dtype auto; or --compute_dtype auto --kernels off; and report it"
        with pytest.raises(UserError, match=ways):
            check_kernels(model, CPU, "portable")


@pytest.mark.parametrize(
    ("layout", "compute_dtype", "sharper"), [("falcon-7b", "bf16", 2), ("falcon3", "fp8", 2)]
)
def test_sharp_attention_in_which_rounding_is_large_is_not_refused_and_faults_are(
    layout: str, compute_dtype: str, sharper: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(layout, "16bit", r=16, compute_dtype="bf16")
    scaled = ("query_key_value", "q_proj", "k_proj")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("weight") and any(each in name for each in scaled) and "lora" not in name:
                weight *= sharper
    with fp8.emulated():
        apply_fast_path(model, fp8_products=compute_dtype == "fp8")
        found = check_kernels(model, CPU)
        assert isinstance(found, Distance)
        assert found.limit < found.gradients < _NOISES * found.noise[0] < 4
        right = frozen_linear.mm_float32
        monkeypatch.setattr(frozen_linear, "mm_float32", lambda a, b: 40_000 * right(a, b))
        with pytest.raises(UserError, match="rounding alone: 0"):
            check_kernels(model, CPU)


def test_the_last_block_computes_few_rows_as_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("falcon-7b", "4bit")
    apply_fast_path(model)
    monkeypatch.setattr(Block, "wanted", lambda self, x: x if self.rows is None else 0 * x[self.rows])
    with pytest.raises(UserError, match="differs"):
        check_kernels(model, CPU)


def test_one_half_of_lora_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("falcon-7b", "4bit")
    apply_fast_path(model)
    monkeypatch.setattr(frozen_linear, "mm_float32", lambda a, b: 0.5 * (a @ b).float())
    with pytest.raises(UserError, match="differs from the model's own: a loss of"):
        check_kernels(model, CPU)


def test_what_runs_on_the_reference_path_or_the_cpu_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("falcon-7b", "4bit")
    assert check_kernels(model, CPU) == "the reference path runs"
    monkeypatch.undo()
    apply_fast_path(model)
    assert check_kernels(model, CPU) == "PyTorch's own, on the CPU"


def test_a_model_whose_own_loss_is_not_finite_is_not_the_kernels_fault() -> None:
    model = adapted("falcon-7b", "4bit")
    apply_fast_path(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    assert check_kernels(model, CPU) == "the model's own loss is nan"
