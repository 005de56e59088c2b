"""Checks of the settled values, each alone and against the others, and of flags that have no effect."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.fp8 import fp8_excludes
from falcon_qlora.common.record_files import AUTO, LATEST
from falcon_qlora.common.settings import settings_of
from falcon_qlora.config.parser import as_words
from falcon_qlora.config.paths import on_the_hub
from falcon_qlora.config.settle import Values
from falcon_qlora.config.trainer_arguments import TrainerArguments
from falcon_qlora.methods.interface import Method
from falcon_qlora.methods.table import method_from

_DEFAULTS = {each.name: each.default for each in settings_of(TrainerArguments)}
_SCHEDULES = next(
    each.choices or () for each in settings_of(TrainerArguments) if each.name == "lr_scheduler_type"
)
# Settings that are read in some modes only: their names, the setting that decides, and its values at which
# they are read. Of two deciding settings, each with one value, either is enough.
_MODES: tuple[tuple[str, str, Sequence[Any]], ...] = (
    ("double_quantization", "quantize_mode", ["4bit"]),
    ("llm_int8_threshold", "quantize_mode", ["8bit"]),
    ("llm_int8_threshold", "kernels", ["off"]),  # our kernels dequantize
    ("padding", "packing", [False]),
    ("batch_tokens", "packing", [True]),
    ("train_sampling_strategy dataset_num_proc", "streaming", [False]),
    ("logging_steps", "logging_strategy", ["steps"]),
    ("save_steps", "save_strategy", ["steps"]),
    ("eval_steps", "eval_strategy", ["steps"]),
    ("eval_delay per_device_eval_batch_size load_best_model_at_end", "eval_strategy", ["steps", "epoch"]),
    ("hub_token hub_model_id hub_revision", "push_to_hub", [True]),
    ("hub_private_repo", "push_to_hub report_to", [True, "trackio"]),
    ("project trackio_space_id trackio_bucket_id trackio_static_space_id", "report_to", ["trackio"]),
    (
        "run_name",
        "report_to",
        ["wandb", "tensorboard", "trackio", "mlflow", "dagshub", "comet_ml", "swanlab"],
    ),
    ("wandb_project wandb_entity", "report_to", ["wandb"]),
    ("lr_scheduler_kwargs", "lr_scheduler_type", [each for each in _SCHEDULES if "constant" not in each]),
    (
        "warmup_steps",
        "lr_scheduler_type",
        [each for each in _SCHEDULES if each not in ("constant", "reduce_lr_on_plateau", "greedy")],
    ),
)
_FEW = 3  # the most values that a message names

_SPLITS = frozenset("validation valid val test eval dev train".split())
TEMPLATES = ("auto", "format", "alpaca", "guanaco", "falcon-instruct", "none", "tokenizer")


def faults_of(values: Values, where: dict[str, str], *, trains: bool) -> Iterator[str]:
    """What is wrong with the settled values, each with what is valid.

    Args:
        values: every setting's value.
        where: how to name each given setting to the user.
        trains: whether they are for training; what is opened later may lie elsewhere than it was trained.
    """

    def name(setting: str) -> str:
        return where.get(setting, f"--{setting}")

    for setting in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        value = values.get(setting)
        if value is not None and value > 1 and value != int(value):
            yield f"{name(setting)}: {value} is neither a number of steps nor a ratio below 1"
    if values["max_steps"] < 1 and values["max_steps"] != -1:
        yield f"{name('max_steps')}: must be at least 1, or -1 for whole epochs"
    if trains and values["learning_rate"] == 0:
        yield f"{name('learning_rate')}: a rate of 0 trains nothing; give one above 0"
    if values["batch_tokens"] != "auto":
        yield from _batch_tokens_faults(values, name("batch_tokens"))
    template = values["template"]
    if template not in TEMPLATES and not template.endswith(".jinja"):
        yield (
            f"{name('template')}: {template!r} is not one of {', '.join(TEMPLATES)} or a .jinja file"
            f"{nearest(template, TEMPLATES)}"
        )
    yield from _data_faults(values, name)
    yield from _unread(values, where)
    if values["report_to"] != ["none"] and "none" in values["report_to"]:
        yield f"{name('report_to')}: none excludes other trackers; drop none or the others"
    try:
        method = method_from(values, name("method"))
    except UserError as error:
        yield str(error)
    else:
        excluded = fp8_excludes(kernels=values["kernels"], **method.fp8_facts())
        if excluded is not None and values["compute_dtype"] == "fp8":
            yield f"{name('compute_dtype')}: {excluded}"
        if trains:
            yield from _base_faults(values, name, method)
    if trains and values["adapter_sha256"] and not values["adapter"]:
        yield f"{name('adapter_sha256')} is the hash of an adapter's weights: give --adapter too"
    if values["resume"] and values["overwrite"]:
        yield "--resume goes on with a run and --overwrite replaces it; give one of them"
    if values["resume"] and values["dry_run"]:
        yield "--dry_run tries a run from its first step: leave out --resume (inspect checks a checkpoint)"
    if values["resume"] in (LATEST, AUTO) and values["output_dir"] is None:
        yield "--resume needs to know the run: give --output_dir, or the checkpoint as --resume PATH"
    for setting in ("early_stopping", "generate_samples", "eval_on_start"):
        if values.get(setting) and (values["eval_split"] is None or values["eval_strategy"] == "no"):
            yield f"{name(setting)} happens at evaluations: give --eval_split, such as --eval_split 0.05"
    if values["eval_strategy"] != "no" and values["eval_split"] is None:
        yield f"{name('eval_strategy')}: evaluation needs held-out rows: give --eval_split, such as 0.05"
    if values.get("push_to_hub") and not values.get("hub_model_id"):
        yield f"{name('push_to_hub')} needs to know where to: give --hub_model_id NAME/MODEL"
    if values["sample_prompts"] and not values["generate_samples"]:
        yield f"{name('sample_prompts')} needs --generate_samples, the number of answers to generate"


def _base_faults(values: Values, name: Callable[[str], str], method: Method) -> Iterator[str]:
    """What is wrong with where the base's frozen weights are to lie."""
    offloaded, shared = values["offload_base"], values["sharding"] == "fsdp" and not method.is_whole
    if offloaded and method.is_whole:
        other = "" if values["sharding"] == "zero3" else ", or give an adapter's method"
        yield f"{name('offload_base')}: --method full trains every weight; drop it{other}"
    elif method.why_base_stays_whole is not None:
        for wanted, flag in (offloaded, name("offload_base")), (shared, "--sharding fsdp"):
            if wanted:
                yield f"{flag}: {method.why_base_stays_whole}; drop it, or --use_dora"
    if offloaded and values["sharding"] == "fsdp":
        yield f"{name('offload_base')} and --sharding fsdp both say where the base lies; give one of them"


def _batch_tokens_faults(values: Values, where: str) -> Iterator[str]:
    given, longest = values["batch_tokens"], values["max_length"]
    if not given.isdecimal():
        yield f"{where}: {given!r} is neither auto nor a whole number of tokens"
    elif int(given) < longest and values["packing"]:
        yield (
            f"{where}: {given} is less than the {longest} tokens that a document may have: give at least so "
            "many, or a smaller --max_length"
        )


def why_unread(name: str, values: Values) -> str | None:
    """Why a setting has no effect with the other values; None if it has one."""
    if name in ("warmup_steps", "eval_delay") and not values[name]:
        return None  # 0: no warmup or delay
    for names, of, modes in _MODES:
        if name not in names.split():
            continue
        here = {each: values.get(each, _DEFAULTS.get(each)) for each in of.split()}
        if any(each in modes for value in here.values() for each in _listed(value)):
            continue
        wanted = dict(zip(here, modes, strict=True)) if len(here) > 1 else {of: list(modes)}
        what = f"is a setting of {_flags(wanted, ' or ')}, and this run has" if len(modes) <= _FEW else ""
        return f"{what or 'is not read with'} {_flags(here)}"
    return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _flags(settings: Values, between: str = " ") -> str:
    return between.join(" ".join(as_words({name: value})) for name, value in settings.items())


def _unread(values: Values, where: dict[str, str]) -> Iterator[str]:
    """Refuse flags that have no effect with the other values; in a file or a recipe they are accepted."""
    # An adapter's record decides how its base is quantized, unless `quantize_mode` is given.
    open_mode = "adapter" in where and "quantize_mode" not in where
    for name, given in where.items():
        if given != f"--{name}" or (open_mode and name in ("double_quantization", "llm_int8_threshold")):
            continue
        reason = why_unread(name, values) or _why_not_of_the_hub(name, values)
        if reason is not None:
            instead = ", or hold out rows with --eval_split" if "--eval_strategy no" in reason else ""
            yield f"{given} {reason}: drop it{instead}"


def _why_not_of_the_hub(name: str, values: Values) -> str | None:
    """Why a setting of hub models or datasets has no effect; None for others, or if it may have one."""
    named = {"model_revision": [values["model_name_or_path"]], "dataset_config": values["dataset_name"]}
    if name not in named or any(on_the_hub(each) for each in named[name]):
        return None
    return f"is a setting of what lies on the hub, and {', '.join(named[name])} does not"


def _data_faults(values: Values, name: Any) -> Iterator[str]:
    weights, datasets = values["dataset_weights"], values["dataset_name"]
    if weights is not None and len(datasets) == 1:
        yield f"{name('dataset_weights')}: one --dataset_name needs none; drop it"
    elif weights is not None and len(weights) != len(datasets):
        yield f"{name('dataset_weights')}: {len(weights)} for {len(datasets)} of --dataset_name; give as many"
    if values["streaming"] and values["max_steps"] < 1:
        yield f"{name('streaming')}: a stream's length is not known; give --max_steps"
    for setting in ("logging_strategy", "eval_strategy", "save_strategy"):
        if values["streaming"] and values.get(setting) == "epoch":
            yield f"{name(setting)} epoch: a stream's length is not known; give steps instead"
    if values["streaming"] and (values.get("dataloader_num_workers") or 0) > 1:
        yield f"{name('dataloader_num_workers')}: each worker would read the whole stream; give 1 or 0"
    split = values["eval_split"]
    if str(split).lower() in _SPLITS and not Path(split).exists():
        yield (
            f"{name('eval_split')}: {split!r} is no file or hub id; for that split of --dataset_name give "
            f"split:{split}"
        )
    try:
        fraction = float(str(split or "nan").removesuffix("%"))
    except ValueError:
        return
    if str(split).endswith("%"):
        if not Path(split).exists():
            yield f"{name('eval_split')}: {split} is no file; as a fraction it is {fraction / 100:g}"
        return
    if values["eval_split"] and values["streaming"]:
        yield (
            f"{name('eval_split')}: no fraction of a stream can be held out, its length is not known; "
            "name a file, or split:NAME of the same data"
        )
    elif values["eval_split"] and not 0 < fraction < 1:
        yield f"{name('eval_split')}: {values['eval_split']} is not a fraction between 0 and 1, such as 0.05"
