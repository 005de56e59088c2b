"""Every setting that is accepted changes something: a run, its files, or whether it is refused.

`REFUSED` are those that the short run of these tests cannot have, with the words that say why. Each of
`CHANGED` is given another value, and what the run leaves is compared with what it leaves without. `ELSEWHERE`
names the test that sees what a run of one process does not show. A setting that is in none of them fails.

What takes most of such a run's time and is not looked at is left out: the picture of the loss, PEFT's card,
long answers.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import memory
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file, save_file

import falcon_qlora
from falcon_qlora import config
from falcon_qlora.commands import launch_flags
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.settings import settings_of
from falcon_qlora.config.arguments import LaunchArguments, our_settings
from falcon_qlora.config.configuration import _start_process_group
from falcon_qlora.config.trainer_arguments import TrainerArguments
from falcon_qlora.inference import evaluation, sample_answers
from falcon_qlora.models import hub
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.processes import meeting
from falcon_qlora.step import loss as step_loss
from falcon_qlora.terminal import charts
from falcon_qlora.training import trainer as training
from falcon_qlora.training.trainer import FalconTrainer
from tests.integration.runs import metrics, write_jsonl

NAMES = ("river", "mill", "bridge", "bird", "tree", "town", "cat", "house")
ROWS = [
    {
        "text": f"The {name} is old.",
        "body": f"A {name} may be new.",
        "instruction": f"Name the {name}.",
        "question": f"Which {name}?",
        "input": f"It is by the {name}.",
        "context": f"No {name} is there.",
        "output": f"It is the {name}, and it is as old as all the others that are near to it.",
        "answer": f"None but the {name}.",
        "prompt": f"Say {name}.",
        "ask": f"Tell {name}.",
        "completion": f"{name}!",
        "reply": f"{name}?",
        "messages": [{"role": "user", "content": name}, {"role": "assistant", "content": f"The {name}."}],
        "chat": [{"role": "user", "content": name}, {"role": "assistant", "content": f"A {name}."}],
        "conversations": [{"from": "human", "value": name}, {"from": "gpt", "value": f"That {name}."}],
        "talk": [{"from": "human", "value": name}, {"from": "gpt", "value": f"This {name}."}],
    }
    for name in NAMES
]


@dataclass(frozen=True)
class Case:
    """Another value of a setting.

    Attributes:
        beside: settings that both runs have.
        seen: what to look at; None: what the runs leave.
        without: what the setting is in the other run, where that is not the default.
        refusal: part of what is said where this value is refused.
    """

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)
    seen: Callable[[Any], Any] | None = None
    without: Any = None
    refusal: str = ""


def _spoken(output: str, label: str) -> str:
    """A line of what a run says at its start."""
    return next(line for line in output.splitlines() if line.strip().startswith(label))


def _threads(_: Any) -> Any:
    return os.environ.pop("RAYON_NUM_THREADS", None)


def _deterministic(_: Any) -> bool:
    found = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    return found


def _activations(seen: Any) -> str:
    return _spoken(seen.output, "memory")


def _files_of_checkpoints(seen: Any) -> set[str]:
    return {path.name for path in (seen.folder / "checkpoints").rglob("*")}


EVALUATED = {"eval_split": 0.25, "eval_steps": 1, "save_steps": 1}
ADAPTER = {"method": "adapter", "lora_r": None}
ALPACA = {"dataset_format": "alpaca"}
INT8 = {"quantize_mode": "8bit", "kernels": "off", "max_steps": 1}
LOW = {"compute_dtype": "bf16"}
NO_PACKING = {"packing": False}
OPTIM = {"max_steps": 3}

CHANGED: dict[str, Case] = {
    # Model
    "model_name_or_path": Case("other"),
    "quantize_mode": Case("4bit"),
    "tokenizer_name_or_path": Case("tokenizer"),
    "compute_dtype": Case("bf16"),
    "double_quantization": Case(False, {"quantize_mode": "4bit"}),
    # Of bitsandbytes, which takes it on the CPU and computes without.
    "llm_int8_threshold": Case(3.0, INT8, lambda seen: seen.thresholds),
    "norms_in_float32": Case(True, LOW),
    "kernels": Case("off"),
    # Data
    "dataset_name": Case(["more.jsonl"]),
    "dataset_weights": Case([1.0, 9.0], {"dataset_name": ["rows.jsonl", "more.jsonl"]}),
    "dataset_train_split": Case("test", {"dataset_name": ["splits"]}),
    "dataset_format": Case("text", without="alpaca"),
    "text_column": Case("body", {"dataset_format": "text"}),
    "instruction_column": Case("question", ALPACA),
    "input_column": Case("context", ALPACA),
    "output_column": Case("answer", ALPACA),
    "prompt_column": Case("ask", {"dataset_format": "prompt_completion"}),
    "completion_column": Case("reply", {"dataset_format": "prompt_completion"}),
    "messages_column": Case("chat", {"dataset_format": "chat"}),
    "conversations_column": Case("talk", {"dataset_format": "sharegpt"}),
    "template": Case("guanaco"),
    "train_on": Case("all"),
    "append_end_token": Case(False),
    "max_length": Case(48),
    "overlong": Case("truncate", {"max_length": 32, "train_on": "all"}),
    "packing": Case(False),
    "padding": Case("max_length", NO_PACKING),
    "train_sampling_strategy": Case("sequential"),
    "eval_split": Case(0.25),
    "streaming": Case(True),
    "max_rows": Case(5),
    "dataset_num_proc": Case(2, {"cache_dir": "fresh"}, _threads),
    "cache_dir": Case("elsewhere", seen=lambda seen: (seen.folder.parent / "elsewhere").is_dir()),
    # Method
    "method": Case("adapter", {"lora_r": None}),
    "lora_r": Case(8),
    "lora_alpha": Case(32),
    "lora_dropout": Case(0.5),
    "lora_target_modules": Case(["dense"]),
    "lora_slices": Case(["value"]),
    "use_rslora": Case(True),
    "use_dora": Case(True),
    "new_tokens": Case(["<river>"]),
    "adapter_prefix_length": Case(3, ADAPTER),
    "adapter_first_block": Case(1, ADAPTER),
    # Run
    "recipe": Case("recipe.yaml"),
    "adapter": Case("earlier", {"lora_r": None}),
    "adapter_sha256": Case(
        "0" * 64, {"adapter": "earlier", "lora_r": None}, refusal="the SHA-256 of its weights is "
    ),
    "output_dir": Case("run-elsewhere", seen=lambda seen: seen.folder.name),
    "config": Case("recipe.yaml"),
    "resume": Case("latest", refusal="there is no such folder"),
    "overwrite": Case(True, {"output_dir": "there"}),
    "num_train_epochs": Case(2.0, {"max_steps": -1, "per_device_train_batch_size": 8}),
    "max_steps": Case(1, without=2),
    "per_device_train_batch_size": Case(1),
    "gradient_accumulation_steps": Case(2),
    "global_batch_size": Case(4),
    "batch_tokens": Case(64, seen=lambda seen: _spoken(seen.output, "steps")),
    "checkpointing": Case("full", seen=_activations),
    "offload_base": Case(True, seen=lambda seen: "frozen weights are in CPU memory" in seen.output),
    "max_bad_steps": Case(1, {"model_name_or_path": "broken"}, without=0, refusal="1 steps in a row"),
    "save_every_minutes": Case(1e-6, {"save_strategy": "no"}),
    "early_stopping": Case(1, EVALUATED | {"learning_rate": 1e-20, "max_steps": 4}),
    "generate_samples": Case(1, EVALUATED),
    "sample_prompts": Case(["Hello"], EVALUATED | {"generate_samples": 1}),
    "report_to": Case(["tensorboard"], without=["none"], refusal="pip install tensorboard"),
    "seed": Case(7),
    # Optimizer
    "learning_rate": Case(1e-3),
    "lr_scheduler_type": Case("constant", OPTIM),
    "lr_scheduler_kwargs": Case({"num_cycles": 1.0}, OPTIM),
    "warmup_steps": Case(2, OPTIM),
    "optim": Case("sgd"),
    "optim_args": Case("momentum=0.9", OPTIM | {"optim": "sgd"}),
    "weight_decay": Case(0.5),
    "adam_beta1": Case(0.5, OPTIM),
    "adam_beta2": Case(0.5, OPTIM),
    "adam_epsilon": Case(1.0),
    "max_grad_norm": Case(1e-3, {"optim": "sgd"}),
    "neftune_noise_alpha": Case(5.0),
    "bf16": Case(True),
    "fp16": Case(True, {"max_steps": 1}),
    "gradient_checkpointing": Case(True, seen=_activations),
    # Log
    "logging_strategy": Case("epoch", {"logging_steps": None}),
    "logging_steps": Case(2, without=1),
    "logging_first_step": Case(True, {"logging_steps": 2}),
    # Evaluation
    "eval_strategy": Case("epoch", {"eval_split": 0.25, "load_best_model_at_end": False, "max_steps": 3}),
    "eval_steps": Case(2, {"eval_split": 0.25, "save_steps": 2, "max_steps": 4}, without=1),
    "eval_delay": Case(2, EVALUATED),
    "eval_on_start": Case(True, EVALUATED),
    "per_device_eval_batch_size": Case(
        1, {"eval_split": "rows.jsonl", "eval_steps": 2}, lambda seen: seen.evaluated
    ),
    # Checkpoints
    "save_strategy": Case("no"),
    "save_steps": Case(1),
    "save_total_limit": Case(1, {"save_steps": 1}),
    "save_only_model": Case(True, seen=_files_of_checkpoints),
    "load_best_model_at_end": Case(
        False, EVALUATED | {"learning_rate": 3.0, "lr_scheduler_type": "constant", "max_steps": 4}
    ),
    # Reproducibility
    "full_determinism": Case(True, seen=_deterministic),
}

# What the run of these tests cannot have: words, and what is said.
REFUSED: dict[str, tuple[list[str], str]] = {
    "model_revision": (["--model_revision", "main"], "--model_revision is a setting of what lies on the hub"),
    "dataset_config": (["--dataset_config", "x"], "--dataset_config is a setting of what lies on the hub"),
    "tf32": (["--tf32"], "--tf32 requires Ampere"),
    "run_name": (["--run_name", "x"], "--run_name is not read with --report_to none"),
    "wandb_project": (["--wandb_project", "x"], "--wandb_project is a setting of --report_to wandb"),
    "wandb_entity": (["--wandb_entity", "x"], "--wandb_entity is a setting of --report_to wandb"),
    "project": (["--project", "x"], "--project is a setting of --report_to trackio"),
    "trackio_space_id": (["--trackio_space_id", "x"], "is a setting of --report_to trackio"),
    "trackio_bucket_id": (["--trackio_bucket_id", "x"], "is a setting of --report_to trackio"),
    "trackio_static_space_id": (["--trackio_static_space_id", "x"], "is a setting of --report_to trackio"),
    "node_rank": (["--node_rank", "1"], "--node_rank is a setting of several nodes"),
    "master_port": (["--master_port", "1"], "--master_port is a setting of several nodes"),
    "rdzv_backend": (["--rdzv_backend", "c10d"], "--rdzv_backend is a setting of several nodes"),
    "rdzv_id": (["--rdzv_id", "x"], "--rdzv_id is a setting of several nodes"),
    "rdzv_conf": (["--rdzv_conf", "x=1"], "--rdzv_conf is a setting of several nodes"),
    "local_addr": (["--local_addr", "a"], "--local_addr is a setting of several nodes"),
    "nnodes": (["--nnodes", "2"], "--nnodes 2: say where the nodes meet"),
}

# Setting → module and name of the test that sees it at work.
_HERE = "tests.integration.test_every_setting"
_MATRIX = "tests.integration.test_interruption_matrix"
_SHARDING = "tests.integration.test_sharding"
ELSEWHERE = {
    "meet_minutes": "tests.integration.test_meeting:start",
    "hang_minutes": f"{_MATRIX}:test_a_process_that_hangs_is_named_and_the_run_ends",
    "max_restarts": f"{_MATRIX}:test_torchruns_restarts_resume_by_themselves",
    "sharding": f"{_SHARDING}:test_two_processes_with_half_of_the_model_each_train_what_one_does",
    "dry_run": "tests.integration.test_dry_run:test_one_rank_in_python",
    "gpus": "tests.unit.test_cli:TestLauncher.test_every_process_gets_its_place_and_the_users_flags",
    "device": "tests.unit.test_mistakes:test_a_large_model_computes_on_the_cpu_where_device_says_so",
    "master_addr": f"{_HERE}:test_where_nodes_meet",
    "rdzv_endpoint": f"{_HERE}:test_where_nodes_meet",
    "dataloader_num_workers": f"{_HERE}:test_what_is_handed_to_torch",
    "dataloader_pin_memory": f"{_HERE}:test_what_is_handed_to_torch",
    "ddp_backend": f"{_HERE}:test_how_processes_meet",
    "ddp_timeout": f"{_HERE}:test_how_processes_meet",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision"),
        f"{_HERE}:test_the_adapter_is_uploaded",
    ),
}


def test_every_setting_is_seen_at_work() -> None:
    settings = [*our_settings(), *settings_of(TrainerArguments), *settings_of(LaunchArguments)]
    assert {each.name for each in settings} == CHANGED.keys() | REFUSED.keys() | ELSEWHERE.keys()
    for name, test in ELSEWHERE.items():
        module, function = test.split(":")
        assert name in inspect.getsource(attrgetter(function)(import_module(module))), (name, test)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    words, told = REFUSED[name]
    words = ["-m", "tiny", "--dataset_name", "sample", "--report_to", "none", *words]
    with pytest.raises(UserError) as caught:
        configuration = config.parse(words, extra_arguments=LaunchArguments)
        launch_flags.check(configuration.extra)
        _ = configuration.training
    assert told in str(caught.value)


def test_all_flags_of_several_nodes_are_named_on_one() -> None:
    with pytest.raises(UserError) as caught:
        launch_flags.check(LaunchArguments(rdzv_id="x", local_addr="a"))
    heading, *lines = caught.value.lines
    assert heading == "2 things to mend"
    assert [line.split()[0] for line in lines] == ["--rdzv_id", "--local_addr"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a second model and tokenizer, a recipe, and a run to go on from."""
    made = tmp_path_factory.mktemp("every")
    write_jsonl(made / "rows.jsonl", ROWS)
    more = [{name: value.upper() for name, value in row.items() if isinstance(value, str)} for row in ROWS]
    write_jsonl(made / "more.jsonl", more)
    (made / "splits").mkdir()
    write_jsonl(made / "splits" / "train.jsonl", ROWS[:4])
    write_jsonl(made / "splits" / "test.jsonl", ROWS[4:])
    (made / "recipe.yaml").write_text("lora_alpha: 64\n")
    other = shutil.copytree(tiny_path(), made / "other")
    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: 2 * each if "ln_f" in name else each for name, each in tensors.items()},
        other / "model.safetensors",
    )
    broken = shutil.copytree(tiny_path(), made / "broken")
    save_file({name: each * float("nan") for name, each in tensors.items()}, broken / "model.safetensors")
    (made / "tokenizer").mkdir()
    for file in tiny_path().glob("tokenizer*"):
        text = json.loads(file.read_text())
        if file.name == "tokenizer.json":
            text["normalizer"] = {"type": "Lowercase"}
        (made / "tokenizer" / file.name).write_text(json.dumps(text))
    return made


class Ran:
    """What a run left, and said.

    Args:
        refusal: why there was no run; None where there was.
        evaluated: micro-batches.
        thresholds: of the linears in int8.
    """

    def __init__(
        self, folder: Path, output: str, refusal: str | None, evaluated: int, thresholds: set[float]
    ):
        self.folder, self.output, self.refusal = folder, output, refusal
        self.evaluated, self.thresholds = evaluated, thresholds

    def left(self) -> dict[str, Any]:
        """Names of files, weights, and every figure that is no time."""
        if self.refusal is not None:
            return {"refusal": self.refusal}
        found: dict[str, Any] = {
            "files": sorted(
                str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()
            )
        }
        for file in sorted(self.folder.rglob("adapter/*.safetensors")):
            found |= {name: each.tolist() for name, each in load_file(file).items()}
        timed = ("per_second", "seconds", "memory", "time")
        found["metrics"] = [
            {name: value for name, value in line.items() if not any(word in name for word in timed)}
            for line in metrics(self.folder)
        ]
        for name in ("kernels.json", "data.json", "samples.jsonl"):
            if (self.folder / name).exists():
                found[name] = (self.folder / name).read_text()
        return found


DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "quantize_mode": "16bit",
    "dataset_name": ["rows.jsonl"],
    "dataset_format": "alpaca",
    "max_length": 64,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "lora_r": 4,
    "logging_steps": 1,
    "report_to": ["none"],
    "cache_dir": "cache",
}


class Runs:
    """The runs of these tests, in the folder of `folder`; one that has been is not made again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._capsys, self._evaluated, self._thresholds = capsys, 0, set[float]()
        make = Linear8bitLt.__init__

        def made(linear: Any, *args: Any, threshold: float, **kwargs: Any) -> None:
            self._thresholds.add(threshold)
            make(linear, *args, threshold=threshold, **kwargs)

        monkeypatch.setattr(Linear8bitLt, "__init__", made)

        def evaluated(*args: Any, **kwargs: Any) -> Any:
            self._evaluated += 1
            return step_loss.evaluated(*args, **kwargs)

        monkeypatch.setattr(evaluation, "evaluated", evaluated)
        monkeypatch.setattr(charts, "draw_loss", lambda lines, file, title: file.touch())
        monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)
        monkeypatch.setattr(sample_answers, "_MOST_NEW_TOKENS", 4)
        monkeypatch.setattr(memory, "clear_device_cache", lambda **_: None)

    def __call__(self, **settings: Any) -> Ran:
        number = next(_NUMBERS)
        given = {"output_dir": f"run-{number}"} | DEFAULTS | settings
        if given["cache_dir"] == "fresh":
            given["cache_dir"] = f"cache-{number}"
        self._capsys.readouterr()
        self._evaluated, self._thresholds, refusal = 0, set(), None
        try:
            run = falcon_qlora.train(**{name: value for name, value in given.items() if value is not None})
        except UserError as error:
            run, refusal = Path(given["output_dir"]), str(error)
        output = self._capsys.readouterr().out
        return Ran(run.absolute(), output, refusal, self._evaluated, self._thresholds)

    def kept(self, **settings: Any) -> Ran:
        key = json.dumps(settings, sort_keys=True)
        if key not in _DONE:
            _DONE[key] = self(**settings)
        return _DONE[key]


_DONE: dict[str, Ran] = {}
_NUMBERS = itertools.count()


@pytest.fixture
def runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runs:
    monkeypatch.chdir(folder)
    made = Runs(monkeypatch, capsys)
    if not Path("earlier").exists():
        made(output_dir="earlier", seed=3)
        shutil.copytree("earlier", "there")
    return made


@pytest.mark.slow
def test_the_same_settings_leave_the_same(runs: Runs) -> None:
    settings = {
        "eval_split": 0.25,
        "eval_steps": 1,
        "save_steps": 1,
        "output_dir": "twice",
        "overwrite": True,
    }
    first = runs(**settings).left()
    assert first["metrics"]
    assert runs(**settings).left() == first


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_another_value_changes_what_a_run_leaves(name: str, runs: Runs) -> None:
    case = CHANGED[name]
    seen = case.seen or (lambda ran: ran.left())
    before = runs.kept(**case.beside | ({} if case.without is None else {name: case.without}))
    assert before.refusal is None or name in ("overwrite", "max_bad_steps")
    without = seen(before)
    ran = runs(**case.beside | {name: case.value})
    assert case.refusal in (ran.refusal or "")
    assert bool(case.refusal) == bool(ran.refusal), ran.refusal
    assert seen(ran) != without


def test_what_is_handed_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "DataLoader", lambda _, **settings: settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for workers, pinned in ((0, True), (3, False)):
        args = SimpleNamespace(dataloader_num_workers=workers, dataloader_pin_memory=pinned)
        handed = FalconTrainer.get_train_dataloader(SimpleNamespace(args=args, steps=[]))
        assert (handed["num_workers"], handed["pin_memory"]) == (workers, pinned)


@pytest.mark.parametrize("words", [["--master_addr", "a"], ["--rdzv_endpoint", "a:1"]])
def test_where_nodes_meet(words: list[str]) -> None:
    launch = config.parse(["--nnodes", "2", *words], extra_arguments=LaunchArguments).extra
    launch_flags.check(launch)
    assert f"{words[0].replace('_', '-')}={words[1]}" in launch_flags.torchrun_flags(launch, 1)


def test_how_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[dict[str, Any]] = []
    monkeypatch.setattr(meeting, "fresh_store", lambda patience, seconds: (patience, seconds))
    monkeypatch.setattr(accelerate, "PartialState", lambda **settings: met.append(settings))
    configuration = config.parse(["--ddp_timeout", "7", "--ddp_backend", "gloo"])
    _start_process_group({"use_cpu": True, **configuration.trainer}, 60)
    assert (met[0]["backend"], met[0]["timeout"].seconds, met[0]["store"]) == ("gloo", 7, (60, 7))


@pytest.mark.slow
def test_the_adapter_is_uploaded(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, at the end, with the login asked for before anything is loaded."""
    asked: list[Any] = []

    class Hub:
        def __init__(self, token: str | None = None):
            self.token = token

        def whoami(self) -> None:
            asked.append(self.token)

        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> Any:
            asked.append((self.token, repository, private))
            return SimpleNamespace(repo_id=repository)

        def upload_folder(self, *, folder_path: Path, revision: str, **_: Any) -> None:
            asked.append((revision, sorted(path.name for path in folder_path.glob("adapter_model.*"))))

    monkeypatch.setattr(hub, "HfApi", Hub)
    settings = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_token": "hf_x", "hub_revision": "draft"}
    ran = runs(**settings, hub_private_repo=True)
    assert asked == ["hf_x", ("hf_x", "me/mine", True), ("draft", ["adapter_model.safetensors"])]
    assert "uploaded to" in ran.output

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the disk quota is used up")

    monkeypatch.setattr(Hub, "upload_folder", refuse)
    kept = runs(**settings, lora_r=2)
    assert "was not uploaded to me/mine: the disk quota is used up" in kept.output
    assert (kept.refusal, (kept.folder / "adapter" / "adapter_model.safetensors").is_file()) == (None, True)
