"""The resolved configuration, and how it is made from a command line."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common import stores
from falcon_qlora.common.by_url import bring_settings
from falcon_qlora.common.errors import UserError, printable, without_credentials
from falcon_qlora.common.record_files import AUTO, LATEST, is_record
from falcon_qlora.common.settings import settings_of
from falcon_qlora.common.untrusted import refuse_links
from falcon_qlora.config.arguments import (
    DataArguments,
    LaunchArguments,
    ModelArguments,
    RunArguments,
    our_settings,
)
from falcon_qlora.config.checks import faults_of
from falcon_qlora.config.help import print_help
from falcon_qlora.config.parser import (
    RECIPES,
    FalconParser,
    Layer,
    lay_over,
    recipe_file,
    recipe_names,
    refuse,
)
from falcon_qlora.config.paths import settings_of_run, with_absolute_paths
from falcon_qlora.config.quantized import follow_checkpoint
from falcon_qlora.config.settle import EVERY_STEP_UP_TO, Laid, settle
from falcon_qlora.config.trainer_arguments import SHARED
from falcon_qlora.config.verbs import VERBS
from falcon_qlora.methods.interface import Method
from falcon_qlora.methods.table import method_from

if TYPE_CHECKING:
    from trl import SFTConfig

# A re-run does not need to know where this run computed and wrote, or which run it resumed.
_NOT_RECORDED = frozenset({"output_dir", "config", "resume", "overwrite", "device", "dry_run"})
_NO_STEP = 10**9  # when saving by the clock: the trainer wants a number
_GROUP_SECONDS = 1800.0  # Transformers' own default of ddp_timeout


@dataclass(kw_only=True)
class Configuration:
    """Every setting of a command, in the groups that its users take.

    Attributes:
        model: which base model, how quantized.
        data: which rows, how they become sequences. `data.packing` is the user's; TRL's own stays off.
        method: what is trained, with its settings.
        run: length, batch, seed, where it writes. If `run.global_batch_size` is set, it decides the size of a
            step, and `run.gradient_accumulation_steps` is 1.
        trainer: SFTConfig's other settings that a recipe, a file or a flag gives.
        extra: an instance of the command's own dataclass, if it has one.
        explicit: setting to where it was given ("flag", "settings.yaml", "recipe lambda-7b-4bit"), without
            settings that only the default recipe gives.
        passed_over: for each file, the keys that are not settings but have values without effect.
        kept: settings of the run to resume for which a recipe that is named again says something else.
    """

    model: ModelArguments
    data: DataArguments
    method: Method
    run: RunArguments
    trainer: dict[str, Any]
    extra: Any
    explicit: dict[str, str]
    passed_over: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    kept: tuple[str, ...] = ()

    @functools.cached_property
    def training(self) -> SFTConfig:
        """The settings of TRL's trainer.

        Built at first use: it imports torch and TRL and, under torchrun, starts the process group. TRL's
        packing, padding-free and accumulation are off here, as our trainer does these itself.

        Raises:
            UserError: if this machine or TRL cannot do what is asked.
        """
        import torch
        from trl import SFTConfig

        from falcon_qlora.processes import devices, ranks

        on_gpu = torch.cuda.is_available()
        devices.check_served(devices.local_device())
        dtype = devices.compute_dtype(self.model.compute_dtype)
        values = dict(self.trainer)
        for group in (self.data, self.run):
            values |= {name: value for name, value in vars(group).items() if name in SHARED}
        values |= {
            "packing": False,
            "padding_free": False,
            "gradient_accumulation_steps": 1,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "use_cpu": not on_gpu,
        }
        if values["save_steps"] is None:
            values["save_steps"] = _NO_STEP
        _start_process_group(values, 60 * self.run.meet_minutes)
        if ranks.world_size() == 1:
            values.pop("ddp_backend", None)  # without a launcher there is no process group
        try:
            return SFTConfig(**copy.deepcopy(values))
        except ValueError as error:
            raise UserError(f"the trainer's settings do not go together: {error}") from None

    def log_steps_of_short_run(self, steps: int) -> None:
        """Log every step of a run of so few `steps`, unless the user says how many."""
        if steps <= EVERY_STEP_UP_TO and "logging_steps" not in self.explicit:
            self.trainer["logging_steps"] = self.training.logging_steps = 1

    @property
    def optimizer(self) -> str:
        """The optimizer's name, as in Transformers' `OptimizerNames`."""
        optim = self.training.optim
        return str(getattr(optim, "value", optim))

    def resolved(self) -> dict[str, Any]:
        """Every setting a re-run needs, for `config.yaml` and trackers: plain values, no secrets."""
        of_method = {"method": self.method.name, **self.method.flags()}
        record = {**vars(self.model), **vars(self.data), **of_method, **vars(self.run), **self.trainer}
        if self.run.global_batch_size is not None:
            del record["gradient_accumulation_steps"]
        if self.run.recipe not in recipe_names():
            del record["recipe"]
        if self.run.adapter is None:
            del record["adapter"], record["adapter_sha256"]
        recorded = {name: value for name, value in record.items() if name not in _NOT_RECORDED}
        return to_be_written(with_absolute_paths(recorded))


def parse(argv: list[str], *, verb: str | None = None, extra_arguments: type | None = None) -> Configuration:
    """Read a command line: `configure` with what `read_flags` finds."""
    settings = read_flags(argv, verb=verb, extra_arguments=extra_arguments)
    return configure(settings, verb=verb, extra_arguments=extra_arguments)


def read_flags(
    argv: list[str], *, verb: str | None = None, extra_arguments: type | None = None
) -> dict[str, Any]:
    """The settings that a command line gives, by name.

    Prints lines on standard error: a flag that is given twice, and the settings of `train` that the command
    does not use.

    Args:
        argv: the words after the command.
        verb: the command, of `VERBS`; None in a process started by torchrun.
        extra_arguments: a dataclass of settings that only this command has (flags only).

    Raises:
        UserError: for anything the user can fix; the message names the flag.
        SystemExit: with status 0 after `--help` or `--help-all`.
    """
    own = [extra_arguments] if extra_arguments else []
    if any(word in ("-h", "--help", "--help-all", "--help_all") for word in argv):
        parser = FalconParser(*own)
        everything = any(word in ("--help-all", "--help_all") for word in argv)
        print_help(parser, _default_recipe(parser).values, VERBS[verb or "train"], everything=everything)
        raise SystemExit(0)
    if verb is None:
        return FalconParser(*own).read_flags(argv)
    parser = FalconParser(LaunchArguments, *own)
    given = parser.read_flags(argv)
    for told in parser.replaced:
        print(printable(f"note: {told}"), file=sys.stderr)
    refuse([f"--{name} is not taken: {why}" for name, why in VERBS[verb].refuses.items() if name in given])
    unused = VERBS[verb].unused(given, (each.name for arguments in own for each in settings_of(arguments)))
    if unused:
        told = ", ".join(f"--{name}" for name in unused)
        manner = VERBS[verb].manner(given, unused)
        print(f"note: falcon-qlora {verb}{manner} does not use {told}", file=sys.stderr)
    # Where `resume` is not used, the settings of that run are not read either.
    dropped = {"resume", *(each.name for each in settings_of(LaunchArguments))}.intersection(unused)
    return {name: value for name, value in given.items() if name not in dropped}


def configure(
    settings: Mapping[str, Any], *, verb: str | None = None, extra_arguments: type | None = None
) -> Configuration:
    """Make the configuration; these settings win over those of files and recipes.

    Args:
        settings: by name, as flags would give them; `config` is a file with more. With `resume` and no
            `config`, settings that are not given are those of the resumed run.
        verb, extra_arguments: as for `read_flags`.

    Raises:
        UserError: for anything the user can fix; the message names the flag, or the file and key.
    """
    parser = FalconParser(*([extra_arguments] if extra_arguments else []))
    flags = parser.read_settings(_with_address(settings))
    layers = [_default_recipe(parser), flags]
    config_file = flags.values.get("config")
    of_run = config_file is not None and is_record(Path(config_file))
    if config_file is None:
        config_file = _settings_of_the_run(flags.values)
        of_run = True
    if config_file is not None:
        layer = parser.read_file(Path(config_file), config_file, rank=2)
        if of_run:
            values = settings_of_run(layer.values, Path(config_file).expanduser().parent)
            layer = dataclasses.replace(layer, values=values)
        layers.append(layer)
    recipe, named_by = lay_over(layers).get("recipe", ("default", flags))
    if of_run and named_by.rank == 2 and recipe not in recipe_names():
        raise UserError(
            f"recipe in {named_by.origin}: a run's settings must not name another file, and {recipe!r} was "
            "not opened. Remove the line, or name the recipe with --recipe"
        )
    kept: tuple[str, ...] = ()
    if recipe != "default":
        layer = parser.read_file(recipe_file(recipe), f"recipe {recipe}", rank=1)
        if "recipe" in layer.values:
            raise UserError(f"recipe {recipe} names another recipe; recipes do not nest, remove that line")
        kept = _kept(layers, layer) if of_run and named_by is flags else ()
        layers.append(layer)
    laid = lay_over(layers)
    # A run's own file may name any folder: none is looked into for its sake.
    trusts_base = not (of_run and "model_name_or_path" in laid and laid["model_name_or_path"][1].rank == 2)
    if trusts_base:
        follow_checkpoint(laid)
    trains = verb is None or "sharding" in VERBS[verb].uses()
    configuration = _configuration(parser, laid, recipe, extra_arguments, trains=trains)
    configuration.passed_over = {layer.origin: layer.passed_over for layer in layers if layer.passed_over}
    configuration.kept = kept
    return configuration


def _with_address(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """With `resume`, where it is a run's address, as that of `output_dir`."""
    resume = settings.get("resume")
    if resume is None or not stores.is_address(resume):
        return settings
    if settings.get("output_dir") not in (None, resume):
        raise UserError(f"--resume {resume}: a run goes on in its own folder; leave --output_dir out")
    if "/checkpoints/" in str(resume):
        raise UserError(
            f"--resume {resume}: name the run; of a run by address the newest checkpoint is gone on from"
        )
    return {**settings, "output_dir": resume, "resume": LATEST}


def _kept(layers: list[Layer], recipe: Layer) -> tuple[str, ...]:
    """Settings for which a recipe that is named again says something else than the run to resume."""
    laid = lay_over(layers)
    return tuple(
        name
        for name, value in recipe.values.items()
        if name in laid and laid[name][1].rank == 2 and laid[name][0] != value
    )


def _default_recipe(parser: FalconParser) -> Layer:
    return parser.read_file(RECIPES / "default.yaml", "recipe default", rank=0)


def _settings_of_the_run(flags: Mapping[str, Any]) -> str | None:
    """The settings file of the run that `--resume` resumes; None if there is none."""
    resume, output = flags.get("resume"), flags.get("output_dir")
    by_folder = resume in (LATEST, AUTO)
    if not resume or (by_folder and output is None):
        return None
    if by_folder and stores.is_address(output):
        folder = bring_settings(str(output), begun=resume == AUTO)
    else:
        folder = Path(str(output) if by_folder else str(resume))
    if resume == AUTO and not any((folder / "checkpoints").glob("step-*")):
        return None  # a fresh run is what the command says
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    refuse_links(folder)
    return str(file)


def _configuration(
    parser: FalconParser, laid: Laid, recipe: str, extra_arguments: type | None, *, trains: bool
) -> Configuration:
    ours = {each.name for each in our_settings()}
    values = {name: copy.deepcopy(parser.settings[name].default) for name in ours}
    values |= {name: value for name, (value, _) in laid.items() if name not in parser.extra_names}
    values["recipe"] = recipe
    extra = {name: laid[name][0] for name in parser.extra_names if name in laid}
    given = {name: layer for name, (_, layer) in laid.items() if layer.rank > 0}
    contradictions = settle(values, laid)
    where = {name: layer.where(name) for name, layer in given.items()}
    refuse([*contradictions, *faults_of(values, where, trains=trains)])
    if values["device"] == "cpu":
        _hide_gpus()
    values = with_absolute_paths(values, data=False)

    def make(arguments: type) -> Any:
        return arguments(**{field.name: values[field.name] for field in dataclasses.fields(arguments)})

    return Configuration(
        model=make(ModelArguments),
        data=make(DataArguments),
        method=method_from(values, "--method"),
        run=make(RunArguments),
        trainer={name: value for name, value in values.items() if name not in ours},
        extra=extra_arguments(**extra) if extra_arguments else None,
        explicit={name: layer.origin for name, layer in given.items()},
    )


def _hide_gpus() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UserError("--device cpu: this process uses a GPU already; start a new process")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read at the first use of a GPU, here and in the workers


def _start_process_group(values: dict[str, Any], patience_seconds: float) -> None:
    """Have Accelerate start the process group on a fresh store, without entries from before a restart."""
    import torch.distributed as dist
    from accelerate import PartialState

    from falcon_qlora.processes import meeting, ranks

    seconds = float(values.get("ddp_timeout") or _GROUP_SECONDS)
    store = None if dist.is_initialized() else meeting.fresh_store(patience_seconds, seconds)
    if store is not None:
        PartialState(
            cpu=values["use_cpu"],
            backend=values.get("ddp_backend"),
            timeout=datetime.timedelta(seconds=seconds),
            store=store,
            rank=ranks.process_index(),
            world_size=ranks.world_size(),
        )


def to_be_written(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of these settings without secrets, and without credentials in URLs."""
    known = FalconParser().settings
    shown = (name for name in settings if name not in known or not known[name].secret)
    return {name: _without_credentials(copy.deepcopy(settings[name])) for name in shown}


def _without_credentials(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_credentials(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value
