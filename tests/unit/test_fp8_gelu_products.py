"""FP8 products with LoRA as columns and GELU in their epilogue: as near to float32 as without."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.testing import assert_close

from falcon_qlora.kernels import fp8, fp8_gelu_products
from falcon_qlora.kernels.fp8_gelu_products import PLAIN, balance, columns_of, least, put
from falcon_qlora.kernels.fp8_rows import Rows
from falcon_qlora.kernels.libraries import Loaded
from falcon_qlora.kernels.low_rank import LowRank
from falcon_qlora.models import fast_path
from falcon_qlora.models.fast_path import (
    apply_fast_path,
    drop_fp8_weights,
    fp8_weight_bytes,
    keep_fp8_weights,
)
from falcon_qlora.models.layouts.falcon import Falcon
from tests.layouts import FAMILIES, attach_lora, documents, plain_float32, tiny_model
from tests.packing import packed
from tests.unit.test_fast_path import LENGTHS, adapted, assert_same, few_targets, step
from tests.unit.test_fp8_block import distances, outliers

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

BFLOAT16 = 2**-7  # of a product of two factors


@pytest.fixture
def emulated() -> Any:
    with fp8.emulated():
        yield


@pytest.fixture
def in_products(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU in products, as on a GPU that has the library."""
    monkeypatch.setattr(fast_path, "_fp8_gelu_products", lambda base: Loaded(PLAIN))


@pytest.fixture
def exact(in_products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations, with operands that are not rounded."""
    monkeypatch.setattr(fp8, "DTYPE", torch.float32)


def low_rank_in_columns(b: float, outlier: float = 1, a: float = 1, rank: int = 64) -> tuple[float, float]:
    """The error of LoRA's part, of itself and of the whole; rows from 0.05 to 20 times the average."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 256, generator=generator)
    x[:, [3, 17]] *= outlier
    x *= (3 * torch.rand(96, 1, generator=generator) ** 2 - 1).exp()
    weight = torch.randn(144, 256, generator=generator) * 0.02
    scale = 2 * weight.abs().max() / 448
    into = (torch.rand(rank, 256, generator=generator) - 0.5) * (a / 8)
    t = x @ into.T
    low = LowRank(t.bfloat16(), (torch.randn(144, rank, generator=generator) * b).bfloat16().T)
    columns, k = columns_of(rank), balance(into, low.right, scale)
    values = torch.empty(96, columns + 256, dtype=fp8.DTYPE)
    rows, _ = fp8.quantize_rows(x, values[:, columns:], least(k, low))
    right = torch.empty(144, columns, dtype=fp8.DTYPE)
    put(low, rows.scales, scale, k, values[:, :columns], right)
    found = values[:, :columns].double() @ right.double().T * rows.scales.double()[:, None] * scale.double()
    expected = low.left.double() @ low.right.double()
    error, whole = (found - expected).norm(dim=1), (expected + x.double() @ weight.T.double()).norm(dim=1)
    return float((error / expected.norm(dim=1)).nan_to_num().max()), float((error / whole).max())


@pytest.mark.parametrize("outlier", [1, 50, 3000])
@pytest.mark.parametrize("b", [0, 1e-6, 1e-5, 1e-4, 1e-2, 1, 30, 1e4])
def test_low_rank_in_columns_is_as_exact_as_bfloat16(b: float, outlier: float) -> None:
    of_itself, _ = low_rank_in_columns(b, outlier)
    assert of_itself < BFLOAT16


@pytest.mark.parametrize(("a", "b"), [(1e-3, 1e-6), (1, 1e-10), (1e4, 1e-4), (1e4, 1e4)])
def test_what_is_lost_of_the_smallest_is_nothing_beside_the_rest(a: float, b: float) -> None:
    _, of_whole = low_rank_in_columns(b, a=a)
    assert of_whole < (2**-20 if b < 1e-4 and a <= 1 else BFLOAT16)


@pytest.mark.parametrize("bug", ["no low part", "no balance", "no least"])
def test_bugs_would_be_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "no low part":
        split = fp8._split
        monkeypatch.setattr(fp8, "_split", lambda x: (split(x)[0], torch.zeros_like(x)))
    if bug == "no balance":
        monkeypatch.setitem(globals(), "balance", lambda into, right, scale: torch.ones(len(into)))
    if bug == "no least":
        monkeypatch.setitem(globals(), "least", lambda k, low: None)
    worst = max(low_rank_in_columns(b)[0] for b in (1e-4, 1e-2, 30, 1e4))
    assert not worst < BFLOAT16


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        *((layout, {"r": r}) for layout in ("falcon-7b", "falcon-40b", "falcon-11b") for r in (8, 64)),
        *(("falcon-7b", {"target_modules": [name], "r": 5}) for name in Falcon.linears),
        ("falcon-40b", {"target_modules": ["dense_h_to_4h", "dense_4h_to_h"], "r": 17, "use_rslora": True}),
    ],
    ids=str,
)
def test_but_for_rounding_it_is_the_same(layout: str, settings: dict[str, Any], exact: None) -> None:
    model = adapted(layout, "4bit", **settings)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    report = apply_fast_path(model, fp8_products=True)
    assert all("GELU: in products" in what for what in report.values())
    assert_same(step(model, arguments), reference)


def test_columns_of_another_step_do_not_stay(exact: None) -> None:
    model = adapted("falcon-7b", "4bit")
    arguments = packed(documents(LENGTHS))
    apply_fast_path(model, fp8_products=True)
    keep_fp8_weights(model)
    step(model, arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(-1.5)
    ours = step(model, arguments)
    apply_fast_path(model)
    assert_same(ours, step(model, arguments))


@pytest.fixture
def tame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights with which attention does not choose single tokens: errors are not magnified on the way."""
    for layout, label in FAMILIES.items():
        monkeypatch.setitem(FAMILIES, layout, label.replace("range=0.15", "range=0.05"))


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("b", [0, 0.001, 0.01, 0.3])
@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
def test_gradients_are_no_further_from_float32_than_with_gelu_apart(
    layout: str, b: float, rank: int, tame: None, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = packed(documents([70, 300, 10, 120]))
    errors: list[list[Tensor]] = [[], []]
    for with_outliers in (False, True):
        base = tiny_model(layout, "16bit", compute_dtype="bf16")
        plain, model = (attach_lora(each, r=rank, alpha=8) for each in (plain_float32(base), base))
        for one in (plain, model):
            with torch.no_grad():
                for name, parameter in one.named_parameters():
                    if "lora_B" in name:
                        generator = torch.Generator().manual_seed(len(name))
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * b)
            if with_outliers:
                outliers(one)
            fast_path.enable_packing(one)
        reference = step(plain, arguments)
        for found, products in zip(errors, (None, PLAIN), strict=True):
            monkeypatch.setattr(fast_path, "_fp8_gelu_products", lambda base, p=products: Loaded(p))
            apply_fast_path(model, fp8_products=True)
            found.append(torch.tensor(distances_of_nonzero(step(model, arguments), reference)))
    before, after = (torch.stack(found).square().mean(0).sqrt() for found in errors)
    print(f"{before.mean():.4f} {after.mean():.4f} worst {(after / before).max():.3f}")
    # 4h_to_h's t is made from what its product reads, GELU's output in FP8; another seed gives 3 to 9 %.
    assert after.mean() < 1.1 * before.mean()
    assert (after < 1.25 * before).all()


def test_a_part_of_lora_far_larger_than_the_weights_stays_in_range(in_products: None) -> None:
    model = adapted("falcon-7b", "16bit", target_modules=["dense_h_to_4h", "dense_4h_to_h"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e5
    apply_fast_path(model, fp8_products=True)
    module = fast_path.blocks_of(model)[0]
    state = fast_path.state_of(module)
    block, adapters = fast_path._FAMILIES["falcon"].block_and_adapters(module, state)
    whole = [
        linear.layer.weight + linear.scaling * b @ a
        for linear, (a, b) in zip(block.projections[1:3], adapters[1:3], strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    hidden, grad = (torch.randn(40, len(whole[1]), generator=generator) for _ in range(2))
    grad *= 1e-3
    with torch.no_grad():
        products = state.products(block, adapters)
        (_, before), low_in = products.enter(hidden)
        expected = block.normalize(hidden)[0][0] @ whole[0].T
        after = products.after_gelu[0].float()
        low_out = products.leave(before, hidden, low_in, hidden)[1]
        _, _, (of_before, _), _ = products.leave_backward(grad, before, lambda: hidden, low_in, low_out)
        of_expected = torch.ops.aten.gelu_backward(grad @ whole[1], before)
    gelu = torch.nn.functional.gelu(expected)
    for found, exact in ((before, expected), (after, gelu), (of_before.float(), of_expected)):
        assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
def test_no_row_depends_on_others_by_a_bit(layout: str, in_products: None) -> None:
    model = adapted(layout, "16bit")
    apply_fast_path(model, fp8_products=True)
    module = fast_path.blocks_of(model)[0]
    state = fast_path.state_of(module)
    block, adapters = fast_path._FAMILIES["falcon"].block_and_adapters(module, state)
    generator = torch.Generator().manual_seed(0)
    hidden, grad = (torch.randn(20, len(block.norms[0].weight), generator=generator) for _ in range(2))
    results = []
    for factor in (1, 300):
        hidden[10:, 0] *= factor
        grad[10:] *= factor
        with torch.no_grad():
            products = state.products(block, adapters)
            (_, before), low_in = products.enter(hidden)
            output, low_out = products.leave(before, hidden, low_in, hidden)
            _, _, (of_before, _), _ = products.leave_backward(grad, before, lambda: hidden, low_in, low_out)
        results.append([each[:10] for each in (before, output, of_before.float())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def distances_of_nonzero(ours: Any, theirs: Any) -> list[float]:
    some = {name: grad for name, grad in theirs[1].items() if grad.norm() > 0}
    return distances(ours, (theirs[0], some))


@pytest.mark.parametrize(("layout", "keep"), [("falcon-7b", "attention"), ("falcon-40b", "input")])
@pytest.mark.parametrize("few", [False, True])
def test_what_is_not_kept_is_computed_again(layout: str, keep: Any, few: bool, in_products: None) -> None:
    model = adapted(layout, "4bit")
    arguments = packed(documents(LENGTHS))
    arguments = few_targets(arguments) if few else arguments
    apply_fast_path(model, fp8_products=True)
    reference = step(model, arguments)
    apply_fast_path(model, fp8_products=True, keep=keep)
    assert_same(step(model, arguments), reference, 1e-6)


@pytest.mark.parametrize(("layout", "mode"), [("falcon-7b", "4bit"), ("falcon-40b", "8bit")])
def test_weights_that_are_kept_are_those_that_would_be_made(
    layout: str, mode: str, in_products: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(layout, mode)
    apply_fast_path(model, fp8_products=True)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    made = []
    quantize = fp8.quantize_weight
    monkeypatch.setattr(fp8, "quantize_weight", lambda *a: made.append(a) or quantize(*a))
    keep_fp8_weights(model)
    blocks = [products for products, _ in fast_path._fp8_blocks(model)]
    kept = [values for products in blocks for weight in products.weights for values in weight.kept.values()]
    assert fp8_weight_bytes(model) == sum(values.numel() for values in kept)
    made.clear()
    ours = step(model, arguments)
    assert not made
    assert_same(ours, reference, 1e-6)


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
def test_kept_weights_do_for_an_adapter_of_another_rank_and_for_none(layout: str, in_products: None) -> None:
    model = adapted(layout, "4bit", r=8)
    arguments = packed(documents(LENGTHS))
    apply_fast_path(model, fp8_products=True)
    model.add_adapter("other", LoraConfig(r=24, init_lora_weights=False, target_modules=[*Falcon.linears]))
    results = []
    for keep in (True, False):
        model.set_adapter("default")
        if keep:
            keep_fp8_weights(model)
        else:
            drop_fp8_weights(model)
        model.set_adapter("other")
        trained = step(model, arguments)
        with model.disable_adapter(), torch.no_grad():
            results.append((trained, model(**arguments).loss))
    (kept, kept_alone), (made, made_alone) = results
    assert_same(kept, made, 1e-6)
    assert_close(kept_alone, made_alone)
    assert abs(made_alone - made[0]) > 1e-3


def test_without_lora_and_without_gradients(exact: None) -> None:
    model = tiny_model("falcon-7b", "4bit")
    fast_path.enable_packing(model)
    arguments = packed(documents(LENGTHS))
    with torch.no_grad():
        reference = model(**arguments).loss
        apply_fast_path(model, fp8_products=True)
        assert_close(model(**arguments).loss, reference)


def test_it_takes_rows_of_zeros() -> None:
    low = LowRank(torch.zeros(3, 4), torch.zeros(4, 16))
    left, right = (torch.empty(size, columns_of(4), dtype=fp8.DTYPE) for size in (3, 16))
    scale = torch.tensor(1.0)
    k = balance(torch.zeros(4, 16), low.right, scale)
    assert not least(k, low).any()
    put(low, torch.ones(3), scale, k, left, right)
    assert not Rows(left, torch.ones(3)).float().any()
    assert not right.float().any()


class Epilogue:
    """What the library makes of a function, on the CPU: it is given tensors where a kernel gives values."""

    def __init__(self, function: Any, outputs: tuple[str, ...]) -> None:
        self.function, self.outputs = function, outputs

    def gemm(
        self, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None, *, epi_args: dict[str, Tensor],
        b_kn: bool, post_init_attrs: Any, **tile: Any,
    ) -> None:  # fmt: skip
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        assert dict(post_init_attrs)["fp8_slow_accum"] is False
        assert tile.keys() == {"tile_M", "tile_N", "cluster_M", "cluster_N", "pingpong"}
        vectors = {name: value[:, None] for name, value in epi_args.items() if name not in self.outputs}
        addend = [] if c is None else [c.float()]
        found = self.function(a.float() @ b.float(), *addend, **vectors)
        assert found.keys() == {"D", *self.outputs}
        for name, value in found.items():
            (d if name == "D" else epi_args[name]).copy_(value)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the library, as far as products with GELU use it."""
    activation, frontend, operations = (ModuleType(name) for name in ("activation", "frontend", "ops"))
    activation.gelu_erf = torch.nn.functional.gelu  # type: ignore[attr-defined]
    activation.dgelu_erf = lambda x, grad: (  # type: ignore[attr-defined]
        torch.ops.aten.gelu_backward(grad, x),
        torch.nn.functional.gelu(x),
    )
    frontend.gemm_epilogue = lambda outputs, ops: lambda f: Epilogue(f, outputs)  # type: ignore[attr-defined]
    operations.ColVecLoad = str  # type: ignore[attr-defined]
    quack = ModuleType("quack")
    quack.activation = activation  # type: ignore[attr-defined]
    for name, module in {"": quack, ".epilogue.frontend": frontend, ".epilogue.ops": operations}.items():
        monkeypatch.setitem(sys.modules, f"quack{name}", module)
    monkeypatch.setitem(sys.modules, "quack.epilogue", ModuleType("quack.epilogue"))
    return activation


def test_the_library_is_asked_for_what_the_plain_forms_compute(library: ModuleType, emulated: None) -> None:
    products = fp8_gelu_products._tried(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    rows, _ = fp8.quantize_rows(torch.randn(5, 32, generator=generator))
    weight = torch.randn(48, 32, generator=generator).to(fp8.DTYPE)
    before = torch.randn(5, 48, generator=generator).bfloat16()
    scale, scales = torch.tensor(0.01), torch.full((5,), 0.1)
    ours, theirs = (each.forward(rows, weight, scale, scales, torch.bfloat16) for each in (products, PLAIN))
    assert_close(ours[0], theirs[0])
    assert_close(ours[1].float(), theirs[1].float(), rtol=0.13, atol=0)
    back, of_plain = (
        each.backward(rows, weight, scale, scales, scales / 2, before) for each in (products, PLAIN)
    )
    for found, expected in zip(back, of_plain, strict=True):
        assert_close(found.float(), expected.float(), rtol=0.13, atol=0)
    empty = products.forward(
        Rows(rows.values[:0], rows.scales[:0]), weight, scale, scales[:0], torch.bfloat16
    )
    assert empty[0].shape == (0, 48)


@pytest.mark.parametrize("bug", ["another GELU", "no gradient", "not a number"])
def test_a_library_that_computes_something_else_is_not_used(bug: str, library: Any, emulated: None) -> None:
    plain = library.gelu_erf
    if bug == "another GELU":
        library.gelu_erf = lambda x: plain(x) + 0.03 * x
    if bug == "no gradient":
        library.dgelu_erf = lambda x, grad: (grad, plain(x))
    if bug == "not a number":
        library.gelu_erf = lambda x: plain(x) * torch.nan
    with pytest.raises(ArithmeticError, match="an FP8 product with GELU is wrong by"):
        fp8_gelu_products._tried(torch.device("cpu"))
