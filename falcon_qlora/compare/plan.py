"""Plan the commands that train several methods on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.files import plain
from falcon_qlora.config import Configuration, as_words, configure, to_be_written
from falcon_qlora.config.parser import refuse
from falcon_qlora.config.paths import settings_of_run
from falcon_qlora.config.trainer_arguments import INSTEAD
from falcon_qlora.methods import table as methods
from falcon_qlora.run_folder.directory import RunDirectory

# Name → the value of --method, and settings that apply unless a flag, file or recipe sets them.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter": ("adapter", {"learning_rate": 9e-3}),
    "adapter_v2": ("adapter_v2", {"learning_rate": 3e-3}),
    "lora": ("lora", {"quantize_mode": "16bit"}),
    "qlora": ("lora", {"quantize_mode": "4bit"}),
    "full": ("full", {"learning_rate": 5e-5}),
}
_HELD_OUT = "0.05"
_WHY = {
    "learning_rate": "the rate of its recipe lit-*; train's is LoRA's",
    "quantize_mode": "here lora is LoRA on a base that is not quantized, and qlora on one that is",
    "eval_split": "methods are compared by the loss on held-out rows (not with --eval_strategy no)",
    "eval_on_start": "the loss before training is shown beside the one after",
}

# Settings that all methods must share, so that a row is the same text and a step the same rows.
_SHARED = (
    "model_name_or_path dataset_name dataset_weights dataset_config dataset_train_split dataset_format "
    "template train_on append_end_token max_length overlong packing padding train_sampling_strategy "
    "eval_split streaming max_rows num_train_epochs max_steps seed"
).split()


@dataclass(frozen=True, kw_only=True)
class Planned:
    """How one run is trained.

    Attributes:
        name: a key of METHODS.
        folder: the name of its folder.
        settings: those given to `train`, except where it writes.
        configuration: what these settings make.
        instead: setting → its value here and the one that `train` would use with the user's flags; only
            those that differ.
    """

    name: str
    folder: str
    settings: dict[str, Any]
    configuration: Configuration
    instead: dict[str, tuple[Any, Any]]

    @property
    def words(self) -> list[str]:
        """The command line after ``falcon-qlora train``, in a form that may be written to files."""
        return as_words(to_be_written(self.settings))


def plan(
    given: Mapping[str, Any],
    *,
    names: Sequence[str],
    recipes: Sequence[str],
    learning_rates: Sequence[str],
    extra_arguments: type,
) -> tuple[list[Planned], dict[str, str]]:
    """Plan how each method is trained, or say why it cannot be.

    Args:
        given: the user's settings for `train`, by name.
        names: keys of METHODS, in order, each once.
        recipes: ``METHOD=RECIPE`` for methods with a recipe of their own.
        learning_rates: ``METHOD=RATE`` for methods with a learning rate of their own.
        extra_arguments: settings of `train` that are not part of the configuration.

    Returns:
        The methods that can be trained, all on the same rows; and name → reason for the others.

    Raises:
        UserError: for an unknown method, or if none can be trained.
    """
    chosen = [_known(name, "--methods") for name in names]
    if not chosen:
        raise UserError(f"--methods names none; give some of {', '.join(METHODS)}")
    recipe_of, rate_of = _pairs(recipes, "--recipes"), _pairs(learning_rates, "--learning_rates")
    faults = [
        f"{flag}: {name} is not among --methods"
        for flag, pairs in (("--recipes", recipe_of), ("--learning_rates", rate_of))
        for name in pairs
        if name not in chosen
    ]
    faults += [
        f"--{key} does nothing with --methods {','.join(chosen)}"
        for key in given
        if not any(_concerns(key, name) for name in chosen)
    ]
    refuse(faults)
    planned: list[Planned] = []
    refused: dict[str, str] = {}
    for name in chosen:
        settings = {key: value for key, value in given.items() if _concerns(key, name)}
        settings |= {"recipe": recipe_of[name]} if name in recipe_of else {}
        settings |= {"learning_rate": rate_of[name]} if name in rate_of else {}
        try:
            one = _planned(name, settings, extra_arguments)
        except UserError as error:
            refused[name] = str(error)
            continue
        resolved = one.configuration.resolved()
        same = [each.name for each in planned if each.configuration.resolved() == resolved]
        if name == "qlora" and resolved["quantize_mode"] == "16bit":
            refused[name] = "QLoRA is LoRA on a quantized base, and --quantize_mode is 16bit"
        elif same:
            refused[name] = f"with these settings it is the same as {same[0]}"
        else:
            planned.append(one)
    if not planned:
        raise UserError(next(iter(refused.values())))
    check_same_rows({each.name: each.configuration for each in planned})
    return planned, refused


def _planned(name: str, given: Mapping[str, Any], extra_arguments: type) -> Planned:
    method, needs = METHODS[name]
    settings = {"method": method, **given}
    as_train = configure(settings, extra_arguments=extra_arguments)
    before, needs = as_train.resolved(), dict(needs)
    if before["eval_split"] is None and not before["streaming"]:  # nothing can be held out of a stream
        needs["eval_split"] = _HELD_OUT
    if before["eval_split"] is not None or "eval_split" in needs:
        needs["eval_on_start"] = True
    if before["eval_strategy"] == "no" and "eval_strategy" in as_train.explicit:
        needs = {key: value for key, value in needs.items() if not key.startswith("eval_")}
    instead = {
        key: (value, before.get(key))
        for key, value in needs.items()
        if key not in as_train.explicit and value != before.get(key)
    }
    settings |= {key: value for key, (value, _) in instead.items()}
    configuration = configure(settings, extra_arguments=extra_arguments)
    return Planned(name=name, folder=name, settings=settings, configuration=configuration, instead=instead)


def with_seed(planned: Planned, number: int, extra_arguments: type) -> Planned:
    """The same run with `number` added to its seed, in a folder of its own; 0 returns it unchanged."""
    if number == 0:
        return planned
    seed = planned.configuration.run.seed + number
    settings = planned.settings | {"seed": seed}
    configuration = configure(settings, extra_arguments=extra_arguments)
    folder = f"{planned.name}-seed-{seed}"
    return replace(planned, folder=folder, settings=settings, configuration=configuration)


def differences(planned: Sequence[Planned], *, seeds: int) -> list[str]:
    """Where the comparison departs from `train` with the user's flags, and why; one line each."""
    concerned: dict[str, list[str]] = {}
    for each in planned:
        for key, (here, in_train) in each.instead.items():
            unlike = "" if in_train is None else f", not {as_words({key: in_train})[-1]}"
            line = f"{' '.join(as_words({key: here}))}{unlike}: {_WHY[key]}"
            concerned.setdefault(line, []).append(each.name)
    lines = [
        f"{'all' if len(names) == len(planned) else ', '.join(names)}: {line}"
        for line, names in concerned.items()
    ]
    held_out = planned[0].configuration.data.eval_split
    if seeds > 1:
        from falcon_qlora.data.selection import is_fraction  # imports NumPy, as below

        of_rows = ", which also draws the held-out rows: name a file with --eval_split to have them alike"
        drawn = held_out is not None and is_fraction(held_out)
        lines.append(f"all: {seeds} runs, each with a --seed of its own{of_rows * drawn}")
    return lines


def check_same_rows(configurations: dict[str, Configuration]) -> None:
    """Check that all methods take the same steps over the same rows.

    Raises:
        UserError: naming a setting in which two differ.
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
    from falcon_qlora.training import sharding  # imports torch, which would slow a help page

    directory = RunDirectory(run)
    if not directory.config_file.exists():
        return False
    before, now = settings_of_run(directory.read_config(), run), plain(configuration.resolved())
    # Earlier releases also wrote settings of other methods, and settings without effect.
    for flag in (methods.method_settings().keys() | INSTEAD.keys()) - configuration.method.flags().keys():
        before.pop(flag, None)
    if (
        sharding.has_unsuitable_optimizer_of_recipe(configuration)
        and before.get("optim") == sharding.OPTIMIZER
    ):
        del before["optim"], now["optim"]
    if configuration.run.global_batch_size is None:
        # A resumed run has written the global batch size that it used.
        for settings in (before, now):
            for name in ("global_batch_size", "gradient_accumulation_steps"):
                settings.pop(name, None)
    before.setdefault("batch_tokens", "auto")  # of an earlier release
    return before == now


def _rows_of(configuration: Configuration) -> dict[str, object]:
    resolved, run = configuration.resolved(), configuration.run
    batch = run.global_batch_size or run.per_device_train_batch_size * run.gradient_accumulation_steps
    return {name: resolved[name] for name in _SHARED} | {"global_batch_size": batch}


def _concerns(setting: str, name: str) -> bool:
    method = methods.METHODS[METHODS[name][0]]
    if setting == "sharding":  # adapters are compared on replicas
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
