"""Which GPUs the installed torch serves, and what each computes in."""

from __future__ import annotations

import pytest
import torch

from falcon_qlora.common.errors import UserError
from falcon_qlora.kernels import ops
from falcon_qlora.models.packed_attention import _capability, takes_varlen
from falcon_qlora.processes import devices

CUDA_13 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120".split()
CUDA_12_6 = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90".split()


@pytest.mark.parametrize(
    ("capability", "built", "served"),
    [
        ((7, 0), CUDA_13, False),  # V100
        ((7, 0), CUDA_12_6, True),
        ((6, 1), CUDA_13, False),  # P40
        ((6, 1), CUDA_12_6, True),  # sm_60's code
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # sm_86's code
        ((10, 3), CUDA_13, True),
        ((11, 0), CUDA_13, False),  # of no built major, and before the PTX
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),  # by PTX
        ((13, 0), CUDA_12_6, False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((8, 0), [], True),
    ],
)
def test_by_cudas_rules_of_machine_code_and_ptx(
    capability: tuple[int, int], built: list[str], served: bool
) -> None:
    assert devices.is_served(capability, built) is served


@pytest.mark.parametrize(
    ("capability", "built", "install"),
    [((7, 0), CUDA_13, "install a torch built for CUDA 12.6"), ((13, 0), CUDA_12_6, "install a newer torch")],
)
def test_what_is_not_served_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str], install: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(UserError, match=r"Some GPU \(compute capability") as caught:
        devices.check_served(torch.device("cuda", 0))
    assert install in str(caught.value)
    devices.check_served(torch.device("cpu"))


def test_on_a_t4_all_is_float16_and_no_kernel_of_ours_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    t4 = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    _capability.cache_clear()
    ops.triton.cache_clear()
    try:
        assert devices.compute_dtype("auto", t4) == torch.float16
        assert not takes_varlen(t4, torch.float16, 64, 0.0)
        assert not ops.triton_runs_on(t4)
        assert ops.triton(t4).failure is None  # nothing is broken
    finally:
        _capability.cache_clear()
        ops.triton.cache_clear()
