"""What follows from the given settings: alternatives, and values that others decide.

Of two alternatives, the one from the higher layer unsets the other (a flag can replace a recipe's setting).
Within one layer they contradict each other, which is an error.
"""

import math
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.settings import settings_of
from falcon_qlora.config.parser import FLAG, Layer
from falcon_qlora.methods.new_tokens import named_tokens
from falcon_qlora.methods.table import METHODS, method_settings

Values = dict[str, Any]
Laid = dict[str, tuple[Any, Layer]]

# A run of at most so many steps logs each of them.
EVERY_STEP_UP_TO = 50


def settle(values: Values, laid: Laid) -> list[str]:
    """Fill in, in place, the values that follow from the given settings; returns what contradicts what.

    Args:
        values: every setting's value.
        laid: the settings that some layer gives, with their value and that layer.
    """
    faults: list[str] = []
    for part in (
        _settle_compute_dtype,
        _settle_method,
        _settle_checkpointing,
        _settle_batch,
        _settle_packing,
        _settle_saving,
        _settle_evaluation,
        _settle_length,
    ):
        try:
            part(values, laid)
        except UserError as error:
            faults += error.lines
    if _rank(laid, "logging_steps") < 1 and 1 <= values["max_steps"] <= EVERY_STEP_UP_TO:
        values["logging_steps"] = 1
    return faults


def _rank(laid: Laid, *names: str) -> int:
    """The rank of the highest layer that gives one of these settings; 0 for the default recipe or none."""
    return max((laid[name][1].rank for name in names if name in laid), default=0)


def _settle_compute_dtype(values: Values, laid: Laid) -> None:
    """Replace `--bf16` and `--fp16`, the trainer's names for values of compute_dtype."""
    given = {name: laid[name] for name in ("bf16", "fp16") if name in laid and laid[name][0] is not None}
    for name in ("bf16", "fp16"):
        values.pop(name, None)
    chosen = values["compute_dtype"]
    named = 0 if chosen == "auto" else _rank(laid, "compute_dtype")
    top = max((layer.rank for _, layer in given.values()), default=0)
    wanted = [name for name, (value, layer) in given.items() if value and layer.rank == top]
    if len(wanted) == 2:
        raise UserError("bf16 and fp16 are both on; choose one with --compute_dtype")
    for name, (value, layer) in given.items():
        if named and layer.rank == named and value != (chosen == name):
            raise UserError(
                f"{layer.where(name)} is {str(value).lower()}, but "
                f"{laid['compute_dtype'][1].where('compute_dtype')} is {chosen}; give --compute_dtype alone"
            )
    if named and named >= top:
        return
    if wanted:
        values["compute_dtype"] = wanted[0]
    elif "bf16" in given and not given["bf16"][0]:
        values["compute_dtype"] = "fp32"


def _settle_method(values: Values, laid: Laid) -> None:
    """Apply what the method needs of the base; refuse flags of other methods, which would have no effect."""
    method, of_method = METHODS[values["method"]], _rank(laid, "method")
    faults: list[str] = []
    if method.needs_16bit and values["quantize_mode"] != "16bit":
        if _rank(laid, "quantize_mode") >= of_method:
            adapter = ", or train an adapter on the quantized base, such as --method lora"
            adapter *= values["sharding"] != "zero3"
            faults.append(
                f"{laid['quantize_mode'][1].where('quantize_mode')} is {values['quantize_mode']}, but "
                f"--method {method.name} {method.needs_16bit}: give --quantize_mode 16bit{adapter}"
            )
        values["quantize_mode"] = "16bit"
    if values["sharding"] == "zero3" and not method.is_whole:
        advice = "--sharding fsdp shares out the frozen weights under an adapter"
        if values["offload_base"] or values["use_dora"]:  # which exclude that
            advice = "drop it"
        faults.append(f"--sharding zero3 is for --method full: {advice}")
    if values["new_tokens"]:
        values["new_tokens"] = named_tokens(values["new_tokens"])  # a run records the tokens, not their file
    own = {each.name: each for each in settings_of(method)}
    for name, each in own.items():
        if each.alternative is not None:
            mine, other = _rank(laid, name), _rank(laid, each.alternative)
            if mine != other:
                values[name if other > mine else each.alternative] = None
    faults += [
        f"--{name} does nothing with --method {method.name}: drop it"
        for name, (_, layer) in laid.items()
        if layer.origin == FLAG and name in method_settings() and name not in own
    ]
    if faults:
        raise UserError(*faults)


def _settle_checkpointing(values: Values, laid: Laid) -> None:
    """Replace `--gradient_checkpointing`, the trainer's name for values of checkpointing."""
    values.pop("gradient_checkpointing", None)
    given = laid.get("gradient_checkpointing")
    if given is None or given[0] is None:
        return
    wanted, layer = "full" if given[0] else "none", given[1]
    ours = _rank(laid, "checkpointing")
    if ours == layer.rank and values["checkpointing"] not in ("auto", wanted):
        raise UserError(
            f"{layer.where('gradient_checkpointing')} is {str(given[0]).lower()}, but "
            f"{laid['checkpointing'][1].where('checkpointing')} is {values['checkpointing']}; "
            "give --checkpointing alone"
        )
    if layer.rank >= ours:
        values["checkpointing"] = wanted


def _settle_batch(values: Values, laid: Laid) -> None:
    batch, steps = _rank(laid, "global_batch_size"), _rank(laid, "gradient_accumulation_steps")
    if values["global_batch_size"] is not None and steps >= 1:
        if batch == steps and laid["gradient_accumulation_steps"][0] is not None:
            both = (
                laid[each][1].where(each) for each in ("global_batch_size", "gradient_accumulation_steps")
            )
            raise UserError(f"{' and '.join(both)} both set the size of a step; give one of them")
        if steps > batch:
            values["global_batch_size"] = None
    if values["global_batch_size"] is not None:
        values["gradient_accumulation_steps"] = 1
    if _rank(laid, "per_device_eval_batch_size") < 1:
        values["per_device_eval_batch_size"] = values["per_device_train_batch_size"]


def _settle_length(values: Values, laid: Laid) -> None:
    epochs, steps = _rank(laid, "num_train_epochs"), _rank(laid, "max_steps")
    if values["max_steps"] < 1 or epochs < steps:
        return
    if epochs > steps:
        values["max_steps"] = -1
    elif laid["max_steps"][1].origin == FLAG:
        raise UserError("--max_steps and --num_train_epochs both say how long the run is; give one of them")


def _settle_packing(values: Values, laid: Laid) -> None:
    if values["packing"] and values["train_sampling_strategy"] == "group_by_length":
        if _rank(laid, "packing") <= _rank(laid, "train_sampling_strategy"):
            raise UserError(
                "--train_sampling_strategy group_by_length saves padding and needs --packing false"
            )
        values["train_sampling_strategy"] = "random"


def _settle_saving(values: Values, laid: Laid) -> None:
    """Save by the clock, unless steps are given; `save_steps` None means that they are not."""
    strategy, steps = _rank(laid, "save_strategy"), _rank(laid, "save_steps")
    if values["save_strategy"] == "steps" and values["save_steps"] is None and strategy > steps:
        values["save_steps"] = 0.1
    chosen = values["save_steps"] is not None or values["save_strategy"] != "steps"
    if chosen and max(strategy, steps) > _rank(laid, "save_every_minutes"):
        values["save_every_minutes"] = 0.0


def _settle_evaluation(values: Values, laid: Laid) -> None:
    if values["eval_split"] is None:
        return
    wanted = _rank(laid, "eval_split")
    switched_on = wanted > _rank(laid, "eval_strategy") and values["eval_strategy"] == "no"
    if switched_on:
        values["eval_strategy"] = "steps"
    if values["eval_strategy"] == "no":
        return
    if "load_best_model_at_end" not in laid:
        values["load_best_model_at_end"] = values["save_strategy"] != "no"
    if not values["load_best_model_at_end"] or values["save_strategy"] == "best":
        return
    if values["save_steps"] is None and values["save_strategy"] == "steps":
        values["save_strategy"] = "best"
        return
    evaluating, saving = (
        _rank(laid, "eval_strategy", "eval_steps"),
        _rank(laid, "save_strategy", "save_steps"),
    )
    for interval in ("strategy", "steps"):
        if evaluating > saving:
            values[f"save_{interval}"] = values[f"eval_{interval}"]
        # Settings of an earlier run, such as how often it saved without evaluation, contradict nothing.
        elif saving > evaluating or (switched_on and wanted > evaluating):
            values[f"eval_{interval}"] = values[f"save_{interval}"]
    if values["eval_strategy"] != values["save_strategy"]:
        raise UserError(
            "keeping the best checkpoint needs --save_strategy and --eval_strategy to be the same; "
            "make them so, or give --load_best_model_at_end false"
        )
    if values["eval_strategy"] == "steps" and not _is_multiple(values["save_steps"], values["eval_steps"]):
        raise UserError(
            f"keeping the best checkpoint needs --save_steps ({values['save_steps']:g}) to be a multiple of "
            f"--eval_steps ({values['eval_steps']:g}); change one, or give --load_best_model_at_end false"
        )


def _is_multiple(large: float, small: float) -> bool:
    return (large < 1) == (small < 1) and math.isclose(large / small, round(large / small), abs_tol=1e-6)
