"""Which command trains each of several methods on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.files import plain
from falcon_qlora.config import Configuration, as_words, to_be_written
from falcon_qlora.config.paths import settings_of_run
from falcon_qlora.config.trainer_arguments import INSTEAD
from falcon_qlora.methods import table as methods
from falcon_qlora.run_folder.directory import RunDirectory

# Name → what --method takes, and the recipe that has the settings.
METHODS = {
    "adapter": ("adapter", "lit-adapter"),
    "adapter_v2": ("adapter_v2", "lit-adapter-v2"),
    "lora": ("lora", "lit-lora"),
    "qlora": ("lora", "lit-qlora"),
    "full": ("full", "lit-full"),
}

# What all must have alike, so that a row is the same text and a step the same rows.
_SHARED = (
    "model_name_or_path dataset_name dataset_weights dataset_config dataset_train_split dataset_format "
    "template train_on append_end_token max_length overlong packing padding train_sampling_strategy "
    "eval_split streaming max_rows num_train_epochs max_steps seed"
).split()


@dataclass(frozen=True, kw_only=True)
class Planned:
    """How one method is trained.

    Attributes:
        name: of METHODS.
        settings: that `train` is given, but for where it writes; the recipe has the others.
    """

    name: str
    settings: dict[str, Any]

    @property
    def words(self) -> list[str]:
        """The command line after ``falcon-qlora train``, as it may be written down."""
        return as_words(to_be_written(self.settings))


def plan(
    given: Mapping[str, Any],
    *,
    names: Sequence[str],
    recipes: Sequence[str],
    learning_rates: Sequence[str],
) -> list[Planned]:
    """The settings of each method.

    Args:
        given: the settings for training that the user gave, by name.
        names: of METHODS, in order, each once.
        recipes: ``METHOD=RECIPE`` for those that are not to take their own.
        learning_rates: ``METHOD=RATE``, likewise.

    Raises:
        UserError: for a method that is not known.
    """
    chosen = [_known(name, "--methods") for name in names]
    if not chosen:
        raise UserError(f"--methods names none; give some of {', '.join(METHODS)}")
    recipe_of, rate_of = _pairs(recipes, "--recipes"), _pairs(learning_rates, "--learning_rates")
    for flag, pairs in (("--recipes", recipe_of), ("--learning_rates", rate_of)):
        for name in pairs.keys() - set(chosen):
            raise UserError(f"{flag}: {name} is not among --methods")
    for key in given:
        if not any(_concerns(key, name) for name in chosen):
            raise UserError(f"--{key} does nothing with --methods {','.join(chosen)}")
    planned = []
    for name in chosen:
        method, recipe = METHODS[name]
        settings = {"recipe": recipe_of.get(name, recipe), "method": method}
        if "dataset_name" in given and name not in recipe_of:
            # The recipes say what the reference's rows are; these are others.
            settings |= {"dataset_format": "auto", "template": "auto"}
        settings |= {key: value for key, value in given.items() if _concerns(key, name)}
        if name in rate_of:
            settings["learning_rate"] = rate_of[name]
        planned.append(Planned(name=name, settings=settings))
    return planned


def for_any_method(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are read to learn what is compared, before there is a method."""
    taken = {name: value for name, value in given.items() if _concerns(name, "lora")}
    return {"recipe": METHODS["lora"][1], **taken}


def check_same_rows(configurations: dict[str, Configuration]) -> None:
    """Check that all methods take the same steps over the same rows.

    Raises:
        UserError: naming the setting in which two differ.
    """
    (first, expected), *others = ((name, _rows_of(each)) for name, each in configurations.items())
    for name, rows in others:
        for setting, value in rows.items():
            if value != expected[setting]:
                raise UserError(
                    f"{setting} is {expected[setting]} with {first} and {value} with {name}, but all methods "
                    f"must see the same rows: give it as a flag, or recipes that agree"
                )


def read_alike(run: Path, configuration: Configuration) -> bool:
    """Whether the run in this folder was made with this configuration."""
    from falcon_qlora.training import sharding  # imports torch, for which a help page should not wait

    directory = RunDirectory(run)
    if not directory.config_file.exists():
        return False
    before, now = settings_of_run(directory.read_config(), run), plain(configuration.resolved())
    # Runs of before wrote down the settings of all methods, and what changed nothing.
    for flag in (methods.method_settings().keys() | INSTEAD.keys()) - configuration.method.flags().keys():
        before.pop(flag, None)
    if (
        sharding.has_unsuitable_optimizer_of_recipe(configuration)
        and before.get("optim") == sharding.OPTIMIZER
    ):
        del before["optim"], now["optim"]
    if configuration.run.global_batch_size is None:
        # A run that went on has written down what the size of its steps had come to.
        for settings in (before, now):
            for name in ("global_batch_size", "gradient_accumulation_steps"):
                settings.pop(name, None)
    return before == now


def _rows_of(configuration: Configuration) -> dict[str, object]:
    resolved, run = configuration.resolved(), configuration.run
    batch = run.global_batch_size or run.per_device_train_batch_size * run.gradient_accumulation_steps
    return {name: resolved[name] for name in _SHARED} | {"global_batch_size": batch}


def _concerns(setting: str, name: str) -> bool:
    method = methods.METHODS[METHODS[name][0]]
    if setting == "sharding":
        return method.is_whole
    return setting not in methods.method_settings() or setting in method().flags()


def _pairs(words: Sequence[str], flag: str) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise UserError(f"{flag}: {word!r} is not METHOD=VALUE, such as {next(iter(METHODS))}=...")
        pairs[_known(name, flag)] = value
    return pairs


def _known(name: str, flag: str) -> str:
    if name not in METHODS:
        raise UserError(f"{flag}: {name!r} is not one of {', '.join(METHODS)}{nearest(name, METHODS)}")
    return name
