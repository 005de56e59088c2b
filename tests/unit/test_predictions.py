"""How far two models' predictions are from each other, by the definitions in float64."""

import pytest
import torch

from falcon_qlora.inference.evaluation import Predictions, divergence


def test_divergence_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1500, 6, generator=generator) for _ in range(2))
    second = first + 0.7 * second
    head = torch.randn(9, 6, generator=generator)
    targets = torch.zeros(1500, dtype=torch.int64)
    both = [
        Predictions(
            hidden=hidden, head=head, vectors=None, targets=targets, answers=targets.bool(), scale=1.0
        )
        for hidden in (first, second)
    ]
    found = divergence(*both)
    p, q = ((hidden.double() @ head.double().T).softmax(-1) for hidden in (first, second))
    kl = (p * (p / q).log()).sum(-1)
    same = sum(int(a.topk(1).indices) == int(b.topk(1).indices) for a, b in zip(p, q, strict=True)) / 1500
    assert 0.3 < same < 0.9
    assert found["kl_divergence"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found["largest_kl_divergence"] == pytest.approx(kl.max().item(), rel=1e-5)
    assert found["same_top_token"] == pytest.approx(same, abs=1 / 1500)
