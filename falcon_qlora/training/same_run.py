"""Whether a run that is resumed stays the same run: its settings, its batch and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from falcon_qlora.checkpoint import manifest
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import plain
from falcon_qlora.common.quantities import counted
from falcon_qlora.common.settings import settings_of
from falcon_qlora.common.untrusted import is_count
from falcon_qlora.config import Configuration
from falcon_qlora.config.arguments import DataArguments
from falcon_qlora.config.paths import settings_of_run
from falcon_qlora.config.trainer_arguments import TrainerArguments
from falcon_qlora.data.stream import changed_source
from falcon_qlora.methods.adapter_folder import RECORD, read_record
from falcon_qlora.methods.open_adapter import is_as_recorded
from falcon_qlora.processes import ranks
from falcon_qlora.run_folder.directory import RunDirectory, batch_of
from falcon_qlora.terminal.console import note
from falcon_qlora.training import sharding
from falcon_qlora.training.rows import TrainingData, global_batch

# A run that resumes with another value of one of these is another run.
_DECISIVE = (
    "adapter adapter_sha256 model_name_or_path model_revision quantize_mode double_quantization "
    "norms_in_float32 llm_int8_threshold compute_dtype "
    "tokenizer_name_or_path template train_on append_end_token max_length overlong packing padding streaming "
    "train_sampling_strategy method optim optim_args learning_rate lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha seed"
).split()
# These too for streams, which have no fingerprint that would show a change of the data.
_DECISIVE_FOR_STREAMS = (
    "dataset_weights dataset_config dataset_train_split dataset_format text_column instruction_column "
    "input_column output_column prompt_column completion_column messages_column conversations_column max_rows"
).split()
# The version of how a run draws, which checkpoints record from 2 on. In older ones weighted rows were drawn
# once for all epochs, and NEFTune's noise was scaled by the length of a micro-batch.
DRAWING = 2
# These may change; a note says what follows.
_MAY_CHANGE = {
    "max_steps": "the learning-rate schedule changes",
    "num_train_epochs": "the learning-rate schedule changes",
    "kernels": "the losses agree up to rounding",
    "per_device_train_batch_size": "the losses agree up to rounding, but not with dropout",
    "batch_tokens": "the losses agree up to rounding, but not with dropout",
    "eval_split": "held-out losses before and after are of other rows, also where the best is chosen by them",
    "sharding": "the losses agree up to rounding",
    "tf32": "the losses agree up to rounding",
}


def adopt(configuration: Configuration, checkpoint: str) -> None:
    """Take over the global batch size of the run to resume; refuse settings that make it another run.

    Raises:
        UserError: naming the setting.
    """
    record = manifest.read_manifest(Path(checkpoint))
    run, batch = configuration.run, record["global_batch"]
    if run.global_batch_size not in (None, batch):
        raise UserError(
            f"--global_batch_size {run.global_batch_size}: the run to resume has a global batch of {batch} "
            "sequences; leave the flag out"
        )
    if global_batch(run) != batch:
        note(f"keeping the run's global batch size of {batch}")
    run.global_batch_size = batch
    _compare_settings(configuration, Path(checkpoint), record)
    noise = configuration.trainer.get("neftune_noise_alpha") is not None
    if record.get("drawing") != DRAWING:
        _refuse_other_drawing(configuration.data, noise=noise)
    _say_what_differs(record["processes"], draws=configuration.method.draws or noise)


def _refuse_other_drawing(data: DataArguments, *, noise: bool) -> None:
    told = None
    if data.dataset_weights is not None and not data.streaming:
        told = "drew the rows by --dataset_weights once for all epochs, and they are drawn anew in each now"
    elif noise and data.packing:
        told = "had --neftune_noise_alpha by the length of a micro-batch, and it is by each document's now"
    if told is not None:
        raise UserError(f"--resume: the run to resume {told}. Start a new run")


def compared_settings(configuration: Configuration) -> dict[str, Any]:
    """The settings that a checkpoint records, for `adopt` to compare: the run's config.yaml may be edited."""
    settings = plain(configuration.resolved())
    of_batch = ("global_batch_size", "gradient_accumulation_steps")
    names = (*_DECISIVE, *_decisive_of_method(configuration), *_DECISIVE_FOR_STREAMS, *_MAY_CHANGE, *of_batch)
    return {name: settings[name] for name in names if name in settings}


def recorded_cut(checkpoint: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The recorded settings of a run to resume, and how its steps were cut: see `Cutter.record`.

    Returns:
        The settings, none of an older release; and ``tokens``, ``card_gib``, ``gib`` and ``as_before``, or
        None likewise.

    Raises:
        UserError: if the record is not what training wrote.
    """
    record = manifest.read_manifest(Path(checkpoint))
    cut = record.get("cut")
    if cut is None:
        return record.get("settings") or {}, None
    sizes = [cut.get("card_gib"), cut.get("gib")] if isinstance(cut, dict) else [""]
    if not all(isinstance(size, float | None) for size in sizes) or not is_count(cut.get("tokens"), least=2):
        raise not_what_training_wrote(Path(checkpoint), "cut", cut)
    known = {name: cut.get(name) for name in ("tokens", "card_gib", "gib")}
    return record.get("settings") or {}, known | {"as_before": cut.get("as_before") is True}


def _decisive_of_method(configuration: Configuration) -> list[str]:
    return [each.name for each in settings_of(type(configuration.method)) if each.decisive]


def _compare_settings(configuration: Configuration, checkpoint: Path, record: dict[str, Any]) -> None:
    run = RunDirectory(checkpoint.parent.parent)
    before = record.get("settings")
    if before is None:  # of an older release
        before = run.read_config() if run.config_file.exists() else {}
    if not isinstance(before, dict):
        raise not_what_training_wrote(checkpoint, "settings", before)
    if not before:
        return
    before = settings_of_run(before, run.path)
    batch = batch_of(before, record["processes"])
    if batch not in (None, record["global_batch"]):
        raise not_what_training_wrote(checkpoint, "global_batch", record["global_batch"])
    if before.get("optim") == sharding.OPTIMIZER and sharding.has_unsuitable_optimizer_of_recipe(
        configuration
    ):
        sharding.take_optimizer(configuration)
    # A run that began from no adapter records none.
    from_none: dict[str, Any] = {"adapter": None, "adapter_sha256": None}
    before, now = from_none | before, from_none | plain(configuration.resolved())
    defaults = {setting.name: setting.default for setting in settings_of(TrainerArguments)}
    of_streams = _DECISIVE_FOR_STREAMS if configuration.data.streaming else ()
    for name in (*_DECISIVE, *_decisive_of_method(configuration), *of_streams, *_MAY_CHANGE):
        # A setting of the library is not recorded if it was not given, nor one of ours that the
        # release did not have.
        if name not in defaults and not (name in before and name in now):
            continue
        was, is_now = (settings.get(name, defaults.get(name)) for settings in (before, now))
        if was == is_now:
            continue
        if _has_only_moved(name, is_now, checkpoint):
            note(f"{name} was {was} and is {is_now} now: the content is the same")
            continue
        if name not in _MAY_CHANGE:
            raise UserError(
                f"--resume: --{name} was {was} in the run to resume and is {is_now} now, which would make it "
                "another run. Leave it as it was, or start a new run"
            )
        note(f"{name} was {was} and is {is_now} now: {_MAY_CHANGE[name]}")


def _has_only_moved(name: str, is_now: Any, checkpoint: Path) -> bool:
    """Whether a base or a tokenizer has the same content, in another place."""
    what = {"model_name_or_path": "base model", "tokenizer_name_or_path": "tokenizer"}.get(name)
    if what is None or is_now is None or not (checkpoint / RECORD).is_file():
        return False
    return is_as_recorded(is_now, what, read_record(checkpoint)) is True


def _say_what_differs(processes: int, *, draws: bool) -> None:
    if processes == ranks.world_size():
        return
    changed = f"resuming on {counted(ranks.world_size(), 'process', 'processes')} instead of {processes}: "
    changed += "each step has the same documents"
    if draws:
        note(
            f"{changed}, but dropout and noise are drawn anew, so the losses will differ from an "
            "uninterrupted run's"
        )
    else:
        note(f"{changed}, and the losses agree up to the rounding of sums taken in another order")


def check_data(data: TrainingData, checkpoint: str | None, tokenizer: str) -> None:
    """Refuse to resume on other documents than the run began with; note what else has changed.

    Args:
        tokenizer: the name of the one that was used.

    Raises:
        UserError: if the rows or their tokens have changed.
    """
    if checkpoint is None:
        return
    record = manifest.read_manifest(Path(checkpoint))
    _tell_other_template(data, Path(checkpoint))
    if data.record.get("streaming"):
        changed = _changed_stream(record.get("stream"), data.record)
    else:
        before, now = record.get("data_fingerprint"), data.record.get("fingerprint")
        told = f"fingerprint {str(now)[:12]} instead of {str(before)[:12]}"
        changed = f" (its rows, or what became of them, have changed): {told}" if before != now else None
    if changed is not None:
        raise UserError(
            f"--resume: the data is not what the run began with{changed}. Bring the old data back, or start "
            "a new run"
        )
    folder = Path(checkpoint)
    if (folder / RECORD).is_file() and is_as_recorded(tokenizer, "tokenizer", read_record(folder)) is False:
        note(f"the tokenizer {tokenizer} has changed since the run began; the rows' tokens are the same")


def _tell_other_template(data: TrainingData, checkpoint: Path) -> None:
    before = read_record(checkpoint).get("template_fingerprint") if (checkpoint / RECORD).is_file() else None
    if before and before != data.record["template_fingerprint"]:
        note(f"the text of template {data.template} has changed since the run began")


def _changed_stream(before: dict[str, Any] | None, now: dict[str, Any]) -> str | None:
    if before is None:
        note("the checkpoint does not say what was streamed: whether the data has changed is not known")
        return None
    for name in ("template", "tokenizer"):
        if before[name] != now[name]:
            return f": its {name} has changed"
    source = changed_source(before["sources"], now["sources"])
    return None if source is None else f": {source}"


def not_what_training_wrote(checkpoint: Path, name: str, value: Any) -> UserError:
    return UserError(
        f"--resume {checkpoint}: its {manifest.MANIFEST} is not what training wrote ({name} is "
        f"{str(value)[:40]!r}). Resume from another checkpoint (--resume CHECKPOINT), or start the run again "
        "with --overwrite"
    )
