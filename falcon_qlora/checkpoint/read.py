"""Checks that a checkpoint's torch files hold what training writes, before any of it is loaded.

PyTorch's `load_state_dict` accepts nearly anything: moments of another shape fail in the first step, and
another weight decay silently trains another model. The functions raise ValueError, TypeError or LookupError,
which `process_state.reading` reports with the file's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falcon_qlora.common.untrusted import is_count, is_number
from falcon_qlora.models.sharded import local_tensor

# States that have their parameter's shape, in all optimizers.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "state1", "state2")
_NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq")
_OF_ADAM = {"step", "exp_avg", "exp_avg_sq"}
_OF_DEVICES = ("foreach", "fused", "capturable")
# bitsandbytes' kernels trust these sizes: values of the 8-bit code, and elements that share a scale.
_CODES, _BLOCK = 256, 256
# More would make pieces of less than one sequence.
_MOST_HALVINGS = 30
_COUNTS_OF_BAD_STEPS = ("total", "in_a_row", "steps")


def check_optimizer(kept: dict[str, Any], optimizer: Any) -> None:
    """Refuse an optimizer state of other parameters or settings.

    Args:
        kept: the saved `optimizer.state_dict()`; for a sharded model, with this process's rows only.
        optimizer: that loads it, perhaps in Accelerate's wrapper.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    fresh = optimizer.state_dict()["param_groups"]
    groups, states = kept["param_groups"], kept["state"]
    require(isinstance(groups, list) and len(groups) == len(fresh), "param_groups")
    for group, wanted in zip(groups, fresh, strict=True):
        _check_group(group, wanted)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    require(isinstance(states, dict), "state")
    # If all steps were skipped, there is no state.
    require(not states or states.keys() == set(range(len(parameters))), "state, of other parameters")
    required = _OF_ADAM if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else set()
    if required and any(group["amsgrad"] for group in fresh):
        required = required | {"max_exp_avg_sq"}
    for index, state in states.items():
        state = _unpacked(state)
        require(state.keys() >= required, f"the state of parameter {index}")
        if "state1" in state and state["state1"].dtype == torch.uint8:
            require(state.keys() >= {"qmap1", "absmax1"}, f"the state of parameter {index}")
        require(not required or isinstance(state["step"], Tensor), f"the state of parameter {index}")
        for name, value in state.items():
            _check_moment(name, value, parameters[index])


def _unpacked(state: Any) -> dict[str, Any]:
    """A parameter's state, flattened: bitsandbytes keeps its own tensors in a nested dictionary."""
    require(isinstance(state, dict), "state")
    unpacked: dict[str, Any] = {}
    for name, value in state.items():
        unpacked |= value if isinstance(value, dict) else {name: value}
    return unpacked


def _check_group(group: Any, wanted: dict[str, Any]) -> None:
    require(isinstance(group, dict) and list(group["params"]) == wanted["params"], "params")
    for name, value in wanted.items():
        if name == "lr":
            require(isinstance(value, Tensor) or is_number(group["lr"]), "lr")
        elif name in _OF_DEVICES:
            require(group.get(name) in (None, True, False), name)
        elif isinstance(value, Tensor) or (name not in group and isinstance(value, bool | None)):
            continue  # releases of PyTorch have added switches
        elif group[name] != value:
            raise ValueError(f"{name} is {str(group[name])[:40]} in it and {str(value)[:40]} in this run")


def _check_moment(name: Any, value: Any, parameter: Tensor) -> None:
    if name == "step":
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        require(is_number(number) and number >= 0, name)
    elif name in _MOMENTS and (value is not None or name != "momentum_buffer"):
        require(isinstance(value, Tensor) and value.shape == parameter.shape, f"the shape of {name}")
        value = local_tensor(value)
        if name.startswith("state"):
            require(value.dtype in (torch.uint8, torch.float32), name)
            return
        require(value.is_floating_point() and bool(value.isfinite().all()), name)
        require(name not in _NEVER_NEGATIVE or not bool((value < 0).any()), name)
    elif name in ("qmap1", "qmap2", "absmax1", "absmax2"):
        size = _CODES if name.startswith("qmap") else -(-parameter.numel() // _BLOCK)
        require(value.shape == (size,) and value.dtype == torch.float32, name)


def check_scheduler(
    kept: dict[str, Any], scheduler: Any, *, step: int | None, rates: list[float] | None = None
) -> None:
    """Refuse a schedule of another learning rate or step.

    Args:
        kept: the saved `scheduler.state_dict()`.
        scheduler: that loads it.
        step: that it was saved at; None if steps may have been skipped.
        rates: of the optimizer that was saved with it, one a group.
    """
    fresh = scheduler.state_dict()
    for name, value in kept.items():
        require(name in fresh, f"{str(name)[:40]!r}")
        alike = is_number(value) if is_number(fresh[name]) else type(value) is type(fresh[name])
        require(alike or fresh[name] is None, name)
    for name in ("base_lrs", "lr_lambdas"):
        if name in fresh and kept[name] != fresh[name]:
            raise ValueError(f"{name} is {str(kept[name])[:40]} in it and {fresh[name]} in this run")
    last = kept["_last_lr"]
    require(len(last) == len(fresh["_last_lr"]) and all(map(is_number, last)), "_last_lr")
    require(rates is None or last == rates, "_last_lr")
    place = kept["last_epoch"]
    require(isinstance(place, int) and (place >= 0 if step is None else place == step), "last_epoch")


def check_scaler(kept: dict[str, Any], scaler: Any) -> None:
    """Refuse what is not the state of a gradient scaler."""
    fresh = scaler.state_dict()
    require(kept.keys() == fresh.keys(), "what it keeps")
    for name, value in fresh.items():
        require(is_number(kept[name]) and kept[name] >= 0, name)
        if name in ("growth_factor", "backoff_factor", "growth_interval"):
            require(kept[name] == value, name)
    require(not fresh or kept["scale"] > 0, "scale")


def check_process(state: dict[str, Any], *, step: int) -> None:
    """Refuse what no process would have saved at this step."""
    require(isinstance(state["random"], dict), "random")
    require(is_number(state["loss"]), "loss")
    require(is_number(state["counted"]) and 0 <= state["counted"] <= step, "counted")
    require(is_count(state["last_logged"]) and state["last_logged"] <= step, "last_logged")
    require(is_count(state["halvings"]) and state["halvings"] <= _MOST_HALVINGS, "halvings")
    for name in ("now", "last"):
        numbers = state["meter"][name]
        fits = len(numbers) == 4 and all(map(is_count, numbers[:3])) and is_number(numbers[3])
        require(fits and numbers[3] >= 0, f"meter {name}")
    of_clock = state["meter"]
    seconds = [*of_clock.get("lost", {}).values(), of_clock.get("wall", 0), of_clock.get("since_log", 0)]
    require(all(is_number(each) and each >= 0 for each in seconds), "meter")
    bad_steps = state["bad_steps"]
    require(all(is_count(bad_steps[name]) for name in _COUNTS_OF_BAD_STEPS), "bad_steps")
    require(bad_steps["total"] <= step and bad_steps["in_a_row"] <= bad_steps["total"], "bad_steps")
    require(is_count(bad_steps.get("overflowed", 0)) and bad_steps.get("overflowed", 0) <= step, "bad_steps")
    require(is_number(bad_steps["mean"]) and is_number(bad_steps["variance"]), "bad_steps")
    require(bad_steps["variance"] >= 0, "bad_steps")
    for of_step, values, origins in state["reports"]:
        require(is_count(of_step) and of_step < step, "reports")
        require(all(isinstance(value, float) for value in values), "reports")
        require(all(is_count(part) and is_count(number) for part, number in origins), "reports")


def require(fits: Any, what: str) -> None:
    if not fits:
        raise ValueError(f"{what} is not what training writes")
