"""A model sharded over all processes by DeepSpeed's ZeRO-3, an alternative to `models.sharded`.

Beside bfloat16 weights it keeps float32 ones that the optimizer steps on, and it accumulates gradients in
float32, so that no small step is lost in rounding. With AdamW that takes 18 bytes a parameter, divided among
the processes; PyTorch's own sharding takes 8.

A model is first marked. When training starts it is handed to DeepSpeed's engine together with its optimizer;
until then it is whole. Afterwards a parameter is empty except while its module computes. DeepSpeed sets its
shape on it as ``ds_shape`` and this process's part as ``ds_tensor``. Every process must take part in every
forward, and in reading a whole tensor. DeepSpeed is an extra, imported only where needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from falcon_qlora.common.errors import UserError
from falcon_qlora.models.layouts import causal_lm_in

_MARK = "_falcon_qlora_zero3"
# Elements whose gradients are sent together; a larger parameter's go alone.
_BUCKET_NUMBERS = 50_000_000


def check_installed() -> None:
    """Refuse to continue without DeepSpeed.

    Raises:
        UserError: that says how to install it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "--sharding zero3 needs DeepSpeed: pip install 'falcon-qlora[deepspeed]', or give --sharding "
            "fsdp, which needs nothing more"
        )


def mark(model: nn.Module) -> None:
    """Mark `model` for ZeRO-3, which begins with `start`."""
    setattr(model, _MARK, True)


def is_zero3(model: nn.Module) -> bool:
    """Whether `mark` was called on `model`."""
    return _MARK in vars(model)


class Zero3Optimizer(Optimizer):
    """The optimizer that the trainer sees: DeepSpeed's engine steps on this process's parts.

    Args:
        engine: DeepSpeed's.
        inner: the optimizer that `engine` uses; both share their groups, so a schedule reaches it.

    Attributes:
        found_inf: set before a step; 1 skips it, as in PyTorch's fused optimizers.
    """

    _step_supports_amp_scaling = True

    def __init__(self, engine: Any, inner: Optimizer):
        self._engine = engine
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        super().__init__(inner.param_groups, inner.defaults)
        self.found_inf = torch.zeros((), device=engine.device)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if bool(self.found_inf):
            self._engine.optimizer.zero_grad()  # the next backward pass overwrites the accumulated gradients
        else:
            self._engine.step()

    def gradient_norm(self) -> Tensor:
        """The norm over all parts of the gradients that the next step takes, before clipping."""
        from deepspeed.utils import safe_get_local_grad

        norms = [torch.linalg.vector_norm(safe_get_local_grad(each)) for each in self._parameters]
        square = torch.stack(norms).square().sum()
        dist.all_reduce(square)
        return square.sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the state is the engine's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing; Accelerate hands back what it got, to move it to the device."""


def start(model: nn.Module, optimizer: Optimizer, *, max_grad_norm: float) -> tuple[Any, Zero3Optimizer]:
    """Shard every parameter of a marked model, which all processes hold alike: each keeps only its part.

    Args:
        model: with packing enabled, on its device.
        optimizer: PyTorch's, of the model's parameters, that has taken no step.
        max_grad_norm: norm to which gradients are clipped; 0: no clipping.

    Returns:
        The engine, a module whose own forward and backward must be used; and the optimizer.
    """
    import deepspeed

    base = causal_lm_in(model)
    if base.device.type == "cpu":
        # It would compile an extension for all-reduces, which takes minutes and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The loss reads the head's weight without calling the head, which would gather it.
    deepspeed.zero.register_external_parameter(base, base.get_output_embeddings().weight)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config=_settings(base.dtype, max_grad_norm=max_grad_norm),
    )
    # The trainer counts micro-batches: every step that it asks for is a real one.
    engine.set_gradient_accumulation_boundary(True)
    return engine, Zero3Optimizer(engine, optimizer)


def _settings(dtype: torch.dtype, *, max_grad_norm: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, but used only in log lines
        "gradient_accumulation_steps": 1,  # else it would divide the loss
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": _BUCKET_NUMBERS,
            "stage3_prefetch_bucket_size": _BUCKET_NUMBERS,
        },
        "zero_allow_untested_optimizer": True,  # only its own are tested; all of PyTorch's work elementwise
        "steps_per_print": None,
    }


def is_part(parameter: Tensor) -> bool:
    """Whether the engine has taken over a parameter."""
    return hasattr(parameter, "ds_tensor")


def read_whole(parameter: nn.Parameter) -> Tensor:
    """A whole copy of a sharded parameter; all processes must call this."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def fill_whole(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy a whole tensor into a sharded parameter; all processes must call this.

    The float32 weights that the optimizer steps on do not change, so no step may follow.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(whole)


def own_part(parameter: Any, whole: Tensor) -> tuple[Tensor, Tensor]:
    """This process's part of a parameter and the same part of a whole tensor, both flat."""
    mine = parameter.ds_tensor.detach()
    expected = whole.flatten()[mine.numel() * dist.get_rank() :][: mine.numel()]
    return mine[: len(expected)], expected  # the last process's part is padded
