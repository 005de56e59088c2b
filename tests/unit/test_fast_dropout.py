"""LoRA dropout on the fast path: what PEFT computes where the same values are left out."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.testing import assert_close

from falcon_qlora.kernels import dropout
from falcon_qlora.kernels.libraries import Loaded
from falcon_qlora.kernels.low_rank import Dropout
from falcon_qlora.models import fast_path
from falcon_qlora.models.activations import blocks_of
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts.falcon import Falcon
from falcon_qlora.models.layouts.llama import Llama
from tests.layouts import documents, plain_float32, tiny_model
from tests.packing import packed, with_adapter
from tests.unit.test_fast_path import (
    LAYOUTS_AND_MODES,
    LENGTHS,
    SEQUENTIAL_MODES,
    GeluProductsInPyTorch,
    adapted,
    assert_same,
    calls,  # noqa: F401  # a fixture
    step,
)

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

P = 0.4


class SameOnes(torch.nn.Module):
    """Takes the place of PEFT's dropout; leaves out what it is told to."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted, self.p = wanted, wanted.p

    def forward(self, x):
        kept = dropout.dropped(torch.ones_like(x[0]), self.wanted)
        return x * kept


@pytest.fixture
def drawn(monkeypatch):
    """The dropouts in the order they were drawn."""
    all_drawn, draw = [], Dropout.draw

    def record(p):
        all_drawn.append(draw(p))
        return all_drawn[-1]

    monkeypatch.setattr(Dropout, "draw", staticmethod(record))
    return all_drawn


def with_dropout(model, wanted=None):
    """The model with dropout on all its LoRA, PEFT's own or those that are wanted, in the blocks' order."""
    order = FAST_ORDER[model.config.model_type]
    for number, block in enumerate(blocks_of(model)):
        linears = [m for name in order for n, m in block.named_modules() if n.endswith(name)]
        linears = [linear for linear in linears if isinstance(linear, LoraLayer)]
        for place, linear in enumerate(linears):
            module = torch.nn.Dropout(P) if wanted is None else SameOnes(wanted[len(order) * number + place])
            linear.lora_dropout["default"] = module
    return model.train()


FAST_ORDER = {
    "falcon": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h", "self_attention.dense"),
    "llama": tuple(Llama.linears),
    "falcon_h1": ("q_proj", "k_proj", "v_proj", "in_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize(
    ("layout", "mode", "keep"),
    [
        *((layout, mode, "all") for layout, mode in [*LAYOUTS_AND_MODES, *SEQUENTIAL_MODES]),
        ("falcon-7b", "4bit", "attention"),
        ("falcon-40b", "4bit", "attention"),
        ("falcon-7b", "4bit", "input"),
        ("falcon-40b", "4bit", "input"),
        ("falcon3", "4bit", "attention"),
        ("falcon3", "4bit", "input"),
        ("falcon-h1", "4bit", "attention"),
        ("falcon-h1", "4bit", "input"),
    ],
)
def test_loss_and_gradients_are_pefts_with_the_same_values_left_out(layout, mode, keep, drawn, calls):  # noqa: F811
    base = tiny_model(layout, mode)
    plain = with_adapter(plain_float32(base))
    model = with_dropout(with_adapter(base))
    enable_packing(model)
    enable_packing(plain)
    assert all(line.startswith("fast (") for line in apply_fast_path(model, keep=keep).values())
    arguments = packed(documents(LENGTHS))
    ours = step(model, arguments)
    assert calls == {"forward": 2, "backward": 2}
    assert len(drawn) == 2 * len(FAST_ORDER[model.config.model_type])
    assert_same(ours, step(with_dropout(plain, drawn), arguments))


def test_it_leaves_out_others_each_time_and_none_in_evaluation(drawn):
    model = with_dropout(adapted("falcon-7b", "4bit"))
    arguments = packed(documents(LENGTHS))
    apply_fast_path(model)
    torch.manual_seed(1)
    first, second = model(**arguments).loss, model(**arguments).loss
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model(**arguments).loss, first)
    without = model.eval()(**arguments).loss
    count = len(drawn)
    assert torch.equal(model(**arguments).loss, without)
    assert len(drawn) == count
    plain = adapted("falcon-7b", "4bit").eval()
    assert_close(plain(**arguments).loss, without, rtol=1e-5, atol=0)


@pytest.mark.parametrize("targets", [[name] for name in Falcon.linears], ids="-".join)
def test_dropout_on_one_linear_alone(targets, drawn):
    model = with_dropout(adapted("falcon-40b", "4bit", target_modules=targets, r=5))
    reference = adapted("falcon-40b", "4bit", target_modules=targets, r=5)
    apply_fast_path(model)
    arguments = packed(documents(LENGTHS))
    ours = step(model, arguments)
    assert len(drawn) == 2
    blocks = [m for m in reference.modules() if isinstance(m, LoraLayer)]
    for linear, wanted in zip(blocks, drawn, strict=True):
        linear.lora_dropout["default"] = SameOnes(wanted)
    assert_same(ours, step(reference.train(), arguments))


def test_products_that_compute_gelu_are_used_forward_alone(drawn, monkeypatch):
    model = with_dropout(adapted("falcon-7b"))
    plain = adapted("falcon-7b")
    products = GeluProductsInPyTorch()
    monkeypatch.setattr(fast_path, "_gelu_products", lambda falcon: Loaded(products))
    report = apply_fast_path(model)
    assert "GELU: in products forward, PyTorch backward" in next(iter(report.values()))
    arguments = packed(documents(LENGTHS))
    ours = step(model, arguments)
    assert len(products.columns) == 2
    assert_same(ours, step(with_dropout(plain, drawn), arguments))
