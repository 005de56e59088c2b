"""The parts of an optimizer's state hold all of it, whoever wrote them and whoever reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from falcon_qlora.checkpoint.optimizer_parts import own_part, read_own_rows, write_part
from falcon_qlora.models.sharded import local_tensor

# Fewer rows than processes among them, and rows that do not divide evenly.
SHAPES = [(7, 3), (1, 4), (2,), (6, 2, 2)]


@contextmanager
def one_of(processes: int, process: int) -> Iterator[None]:
    """Be one of several processes that exchange nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=process, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def cut(whole: Tensor) -> Tensor:
    """As this process holds it of a sharded model; as it is where there is one process."""
    if not dist.is_initialized():
        return whole
    # Its name keeps torch from taking this process for the one whose turn it was before.
    names = (f"process_{dist.get_rank()}",)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=names)
    return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)


def optimizer(kind: str, *, used: bool) -> torch.optim.Optimizer:
    """Over parameters that are the same in every call, with numbers in its state that are so after a step."""
    generator = torch.Generator().manual_seed(1)
    wholes = [torch.randn(shape, generator=generator) for shape in SHAPES]
    parameters = [nn.Parameter(cut(whole)) for whole in wholes]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}]
    made = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.01, fused=True),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    }[kind]()
    if used:
        for parameter in parameters:
            parameter.grad = cut(torch.ones(parameter.shape))
        made.step()
        made.param_groups[0]["lr"] = 0.003  # as a schedule does
        # Not the step's own: their last bits depend on how many there are in a row.
        for state in made.state_dict()["state"].values():
            for value in state.values():
                value.copy_(cut(torch.rand(value.shape, generator=generator)) if value.dim() else 3.0)
    return made


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(("wrote", "read"), [(2, 2), (2, 3), (5, 2), (3, 1), (1, 4)])
def test_any_number_of_processes_reads_what_any_number_wrote(
    tmp_path: Path, kind: str, wrote: int, read: int
) -> None:
    expected = optimizer(kind, used=True).state_dict()
    if wrote == 1:
        torch.save(expected, tmp_path / "optimizer.pt")
    for process in range(wrote if wrote > 1 else 0):
        with one_of(wrote, process):
            write_part(own_part(optimizer(kind, used=True)), tmp_path, process=process, processes=wrote)
    found = []
    for process in range(read):
        if read == 1:
            fresh = optimizer(kind, used=False)
            read_own_rows(fresh, tmp_path)
            found.append(fresh.state_dict())
            continue
        with one_of(read, process):
            fresh = optimizer(kind, used=False)
            read_own_rows(fresh, tmp_path)
            found.append(fresh.state_dict())
            for parameter, state in fresh.state.items():
                for value in state.values():
                    # So that a step can be taken, and a later save holds these rows alone.
                    assert value.dim() == 0 or value.placements == parameter.placements
                    own = local_tensor(value)
                    assert own.untyped_storage().nbytes() == own.nbytes
    for each in found:
        assert each["param_groups"] == expected["param_groups"]
    for index, state in expected["state"].items():
        for name, whole in state.items():
            pieces = [local_tensor(each["state"][index][name]) for each in found]
            if whole.dim():
                assert torch.equal(torch.cat(pieces), whole)
                assert [len(piece) for piece in pieces] == _lengths(len(whole), read)
            else:
                assert all(torch.equal(piece, whole) for piece in pieces)


def _lengths(rows: int, processes: int) -> list[int]:
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(processes)]
    return chunks + [0] * (processes - len(chunks))


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    saved = optimizer("adamw", used=True).state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"][:6]
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(RuntimeError, match=r"exp_avg .* does not fit a parameter of \(7, 3\)"):
        read_own_rows(optimizer("adamw", used=False), tmp_path)
