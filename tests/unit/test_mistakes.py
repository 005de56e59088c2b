"""Mistakes at the command line: status 2 and one message of what is wrong, where, and what to do."""

from __future__ import annotations

import io
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from falcon_qlora import __main__ as cli
from falcon_qlora import config
from falcon_qlora.commands import train as launcher
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import other_names
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.config.parser import FalconParser
from falcon_qlora.config.trainer_arguments import INSTEAD
from falcon_qlora.config.verbs import VERBS
from falcon_qlora.processes import endings
from falcon_qlora.training import preflight, run
from tests.integration.refusals import only_message
from tests.integration.runs import each_once, write_jsonl

SETTINGS = FalconParser(LaunchArguments).settings


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line in a folder of rows, runs and broken files, and gives the one message."""

    def run_one(argv: list[str], folder: Path, meanwhile: Callable[[], None] = lambda: None) -> int:
        meanwhile()
        words = argv[argv.index("falcon_qlora.train") + 1 :]
        return endings.exit_status(lambda: run.train(config.parse(words)))

    monkeypatch.setattr(launcher, "_run_one", run_one)
    monkeypatch.setattr(launcher, "_launch", lambda argv, folder, **_: run_one(argv, folder))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Say 1.", "output": "1"}] * 8)
    for folder in ("empty", "run/adapter", "run/checkpoints", "whole/adapter"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("run", "whole"):
        (tmp_path / folder / "config.yaml").write_text("model_name_or_path: tiny\n")
    (tmp_path / "run/adapter/adapter_config.json").write_text("{}")
    (tmp_path / "whole/adapter/config.json").write_text("{}")
    (tmp_path / "begun/checkpoints/step-2").mkdir(parents=True)
    (tmp_path / "bare.csv").write_text("What is it?,It is.\nWho?,Me.\n")
    (tmp_path / "broken.yaml").write_text("seed: 1\nlora_r: 4: 5\n")
    return Refused(capsys, tmp_path)


class Refused:
    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path):
        self.capsys, self.folder = capsys, folder

    def __call__(self, words: str | list[str]) -> str:
        self.capsys.readouterr()
        assert cli.main(shlex.split(words) if isinstance(words, str) else words) == 2
        printed = self.capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return only_message(printed.err)


ROWS = "-m tiny --dataset_name rows.jsonl"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # Commands
        ("trian -m tiny", ["unknown command trian", "did you mean train?"]),
        ("finetune -m tiny", ["unknown command finetune", "did you mean train?"]),
        ("chat --adapter run", ["unknown command chat", "did you mean generate --chat?"]),
        ("merge-lora --adapter run", ["unknown command merge-lora", "did you mean merge?"]),
        ("train data -m tiny", ["unexpected argument 'data': one command at a time"]),
        ("--gpus 2 train", ["name a command before the flags"]),
        # Flags by meaning, and by spelling
        ("train --lr 3e-4", ["unknown flag --lr: give --learning_rate 3e-4"]),
        ("train --learning_rte 1", ["unknown flag --learning_rte", "did you mean --learning_rate?"]),
        ("train --batchsize 8", ["unknown flag --batchsize: give --per_device_train_batch_size 8"]),
        ("train --cutof_len 512", ["unknown flag --cutof_len", "did you mean --max_length?"]),
        ("train --cutoff_len 512", ["--cutoff_len (LLaMA-Factory's): give --max_length 512"]),
        ("train --val_size 0.1", ["--val_size (LLaMA-Factory's): give --eval_split 0.1"]),
        ("train --precision bf16-true", ["--precision (LitGPT's): give --compute_dtype bf16"]),
        ("train --quantize bnb.nf4", ["unknown flag --quantize: give --quantize_mode 4bit"]),
        ("train --train.micro_batch_size 2", ["give --per_device_train_batch_size 2"]),
        ("train --dataset a.json b.json", ["unknown flag --dataset: give --dataset_name a.json b.json"]),
        ("train --devices 2", ["unknown flag --devices: give --gpus 2"]),
        ("train --maxLength 512", ["unknown flag --maxLength", "did you mean --max_length?"]),
        ("train -model tiny", ["unknown flag -model: give --model_name_or_path tiny"]),
        ("train --fsdp full_shard", ["--fsdp is not taken: --sharding fsdp shares"]),
        ("train --deepspeed ds.json", ["--deepspeed is not taken: --sharding fsdp", "zero3"]),
        ("train --batch 3", ["unknown flag --batch: give --per_device_train_batch_size 3"]),
        ("train --use_peft", ["--use_peft is not taken: an adapter is always trained"]),
        ("train --zzz 1", ["unknown flag --zzz; --help-all lists every flag"]),
        ("data --temperature 1", ["unknown flag --temperature"]),
        ("train rows.jsonl", ["unexpected argument 'rows.jsonl'", "such as --dataset_name rows.jsonl"]),
        ("train mine.yaml", ["unexpected argument 'mine.yaml'", "such as --config mine.yaml"]),
        ("inspect", ["name one folder: falcon-qlora inspect DIR"]),
        # Values
        ("train --method qlora", ["--method: 'qlora' is not known; here that is lora (with -q 4bit"]),
        ("train --adapter qlora", ["--adapter: 'qlora' is not known; leave it out", "--method"]),
        ("train -q 3bit", ["-q: '3bit' is not known; here that is 4bit (the smallest there is)"]),
        ("train -q 5bits", ["-q: '5bits' is not one of 4bit, 8bit, 16bit"]),
        ("train -b 0", ["-b: 0 is too small; at least 1"]),
        ("train -q", ["-q: expected a value (one of 4bit, 8bit, 16bit)"]),
        ("train --no_packing false --packing", ["unexpected argument 'false'", "are the same setting"]),
        ("train --max_length 1e9", ["--max_length: '1e9' is not a whole number; write it out: 1000000000"]),
        ("train --lr_scheduler_kwargs {broken", ["--lr_scheduler_kwargs: not valid JSON"]),
        ("train --gpus 0", ["--gpus: 0 is too small; at least 1"]),
        ("train --gpus all", ["--gpus: 'all' is not known; leave it out (every visible GPU is used"]),
        ("train --gpus 8 -m random:falcon-7b --dataset_name sample --report_to none",
         ["random:falcon-7b has 6.9 billion parameters, and no GPU is visible", "--device cpu"]),
        ("bench --variants oours", ["--variants: there is no 'oours' (did you mean ours?)"]),
        ("compare --methods lora,dora", ["--methods: 'dora' is not one of"]),
        ('train -m tiny --output_dir ""', ["--output_dir: the value is empty; leave it out, or give text"]),
        ('eval -m tiny --adapter ""', ["--adapter: the value is empty; leave it out"]),
        ('merge --adapter "" --out x', ["--adapter: the value is empty; give text"]),
        ('merge --adapter run --out ""', ["--out: the value is empty; give text"]),
        ('train -m tiny --dataset_name ""', ["--dataset_name: the value is empty"]),
        ('generate -m tiny --prompt " "', ["--prompt: the value is empty"]),
        ("generate -m tiny", ["no prompt: standard input is empty. Give --prompt TEXT, or --chat"]),
        # Files, folders and splits
        (f"train {ROWS} --eval_split 5%", ["--eval_split: 5% is no file; as a fraction it is 0.05"]),
        ("data -m tiny --dataset_name bare.csv",
         ["It has 'It is.', 'What is it?'. ", "write a header above it, such as: instruction,output"]),
        ("generate --adapter whole/adapter --prompt x", ["It holds a model: give it as -m whole/adapter"]),
        ("inspect .", ["no run, checkpoint, adapter, merge or model lies there. Runs in it: begun, run"]),
        ("inspect begun/checkpoints", ["model lies there. Checkpoints in it: begun/checkpoints/step-2"]),
        ("inspect rows.jsonl", ["this is a file; name", "rows shown by falcon-qlora data --dataset_name"]),
        ("prepare -m tiny --output_dir whole", ["whole: exists already and is not a prepared base"]),
        ("generate --adapter begun --prompt x", ["give its checkpoint begun/checkpoints/step-2"]),
        (f"data {ROWS} --eval_split validation", ["--eval_split: 'validation' is no", "split:validation"]),
        ("data -m tiny --dataset_name row.jsonl", ["file not found: row.jsonl (did you mean rows.jsonl?)"]),
        ("data -m tiny --dataset_name empty", ["empty: the folder holds no .jsonl"]),
        ("data -m nowhere/ --dataset_name sample", ["There is no folder 'nowhere/'"]),
        ("train -m run", ["holds an adapter, not a model: name it with --adapter"]),
        ("train -m whole", ["whole holds no config.json", "did you mean", "whole/adapter?"]),
        ("generate --adapter nowhere --prompt x", ["nowhere: there is no such folder", "hf download"]),
        ("train --config empty", ["empty: this is a folder; name the file of settings"]),
        ("train --config run", ["run: this is a folder; did you mean run/config.yaml?"]),
        ("train --config broken.yaml", ["broken.yaml, line 2: not valid YAML"]),
        ("train --config none.yaml", ["there is no file none.yaml"]),
        ("train --recipe lamda-7b-4bit", ["unknown recipe lamda-7b-4bit", "did you mean lambda-7b-4bit?"]),
        ("train --resume", ["--resume needs to know the run: give --output_dir"]),
        ("eval -m tiny", ["no text to measure on: name it with --dataset_name FILE"]),
    ],
)  # fmt: skip
def test_one_message_says_what_and_what_to_do(refused: Refused, words: str, parts: list[str]) -> None:
    message = refused(words)
    assert all(part in message for part in parts), message


def test_all_that_is_wrong_is_told_at_once_in_the_order_in_which_it_was_typed(refused: Refused) -> None:
    message = refused(
        "train --lr 1 -b two --cutoff_len 9 -m tiny b.csv --use_peft --zzz -q 4bit --seed -1 stray"
    )
    assert message.splitlines() == [
        "8 things to mend",
        "  unknown flag --lr: give --learning_rate 1",
        "  -b: 'two' is not a whole number",
        "  unknown flag --cutoff_len (LLaMA-Factory's): give --max_length 9",
        "  unexpected argument 'b.csv': every setting is given by its flag, such as --dataset_name b.csv",
        "  --use_peft is not taken: an adapter is always trained",
        "  unknown flag --zzz; --help-all lists every flag",
        "  --seed: -1 is too small; at least 0",
        "  unexpected argument 'stray': every setting is given by its flag, see --help-all",
    ]


def test_what_does_not_go_together_is_told_at_once(refused: Refused) -> None:
    assert refused("train -m tiny --bf16 --fp16 --sharding zero3").splitlines() == [
        "2 things to mend",
        "  bf16 and fp16 are both on; choose one with --compute_dtype",
        (
            "  --sharding zero3 is for --method full: --sharding fsdp shares out the frozen weights under an "
            "adapter"
        ),
    ]
    message = refused("train -m tiny --streaming --resume --overwrite --sample_prompts Hello")
    assert message.splitlines()[0] == "4 things to mend"
    (refused.folder / "mine.yaml").write_text("seed: -1\nlora_dropout: 1\nlearning_rte: 3\n")
    assert refused("train --config mine.yaml").splitlines() == [
        "mine.yaml: 3 lines to mend",
        "  seed: -1 is too small; at least 0",
        "  lora_dropout: 1.0 is too large; it must be below 1",
        "  unknown key learning_rte (did you mean learning_rate?)",
    ]


AXOLOTL = """
base_model: tiiuae/falcon-7b
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_target_linear: true
micro_batch_size: 2
optimizer: paged_adamw_32bit
train_on_inputs: false
val_set_size: 0.05
bf16: auto
special_tokens:
  pad_token: <|endoftext|>
"""
LITGPT = """
checkpoint_dir: checkpoints/tiiuae/falcon-7b
quantize: bnb.nf4
devices: 4
lora_query: true
train:
  micro_batch_size: 1
  epochs: 2
"""
LLAMA_FACTORY = """
stage: sft
finetuning_type: lora
lora_target: all
cutoff_len: 1024
quantization_bit: 4
preprocessing_num_workers: 16
"""


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (AXOLOTL, [
            "base_model (Axolotl's): give model_name_or_path: tiiuae/falcon-7b",
            "datasets (Axolotl's): give dataset_name: tatsu-lab/alpaca",
            "adapter: 'qlora' is not known; leave it out (",
            "sequence_len (Axolotl's): give max_length: 2048",
            "sample_packing (Axolotl's): give packing: true",
            "lora_target_linear (Axolotl's): leave it out (",
            "micro_batch_size (Axolotl and LitGPT's): give per_device_train_batch_size: 2",
            "optimizer: give optim: paged_adamw_32bit",
            "train_on_inputs (Axolotl's): give train_on: answers",
            "val_set_size (Axolotl's): give eval_split: 0.05 (",
            "bf16: 'auto' is not known; leave it out (",
            "special_tokens (Axolotl's): leave it out (",
        ]),
        (LITGPT, [
            "checkpoint_dir: give model_name_or_path: checkpoints/tiiuae/falcon-7b (",
            "quantize: give quantize_mode: 4bit",
            "devices: give --gpus 4",
            "lora_query (LitGPT's): give lora_slices: query",
            "train.micro_batch_size (Axolotl and LitGPT's): give per_device_train_batch_size: 1",
            "train.epochs: give num_train_epochs: 2",
        ]),
        (LLAMA_FACTORY, [
            "stage (LLaMA-Factory's): leave it out (",
            "finetuning_type (LLaMA-Factory's): give method: lora",
            "lora_target (LLaMA-Factory's): give lora_target_modules: all-linear",
            "cutoff_len (LLaMA-Factory's): give max_length: 1024",
            "quantization_bit (LLaMA-Factory's): give quantize_mode: 4bit",
            "preprocessing_num_workers (LLaMA-Factory's): give dataset_num_proc: 16",
        ]),
    ],
    ids=["axolotl", "litgpt", "llama-factory"],
)  # fmt: skip
def test_a_file_of_another_tool_is_translated_line_by_line(
    refused: Refused, text: str, lines: list[str]
) -> None:
    (refused.folder / "other.yaml").write_text(text)
    first, *told = refused("train --config other.yaml").splitlines()
    assert first == f"other.yaml: {len(lines)} lines to mend"
    told = [line.strip().removeprefix("unknown key ") for line in told]
    assert [line[: len(start)] for line, start in zip(told, lines, strict=True)] == lines


def test_what_is_told_of_other_tools_names_is_taken_here() -> None:
    """Every name leads to a setting that is there, with values that it takes."""
    assert not other_names.NAMES.keys() & (SETTINGS.keys() | INSTEAD.keys())
    assert len({other_names.plain(name) for name in other_names.NAMES}) == len(other_names.NAMES)
    written: list[tuple[str, str]] = []

    def write(setting: str, value: str) -> str:
        written.append((setting, value))
        return ""

    for name in other_names.NAMES:
        for value in (None, True, False):
            assert other_names.answer(name, value, write)
    for setting, given in written:
        here = SETTINGS[setting]
        if given not in ("", "true", "false"):  # those that were given
            here.read(given.split() if here.is_list else given, setting)
    for setting, values in other_names.VALUES.items():
        for elsewhere, here in values.items():
            assert elsewhere == elsewhere.lower()
            value = here.partition("; ")[0]
            if value:
                SETTINGS[setting].read(value, setting)
            if SETTINGS[setting].choices or SETTINGS[setting].kind is not str:
                with pytest.raises(UserError):
                    SETTINGS[setting].read(elsewhere, setting)
    for command in other_names.COMMANDS.values():
        assert command.split()[0] in VERBS
    assert not other_names.COMMANDS.keys() & VERBS.keys()


def test_a_token_given_by_another_name_is_not_repeated(refused: Refused) -> None:
    message = refused("train --access_token hf_SeCrEt --lr https://me:SeCrEt@host/x")
    assert "give --hub_token" in message
    assert "SeCrEt" not in message


def test_a_call_is_told_all_at_once() -> None:
    with pytest.raises(
        UserError, match="2 things to mend\n  unknown flag --lr: give --learning_rate 1\n  unk"
    ):
        config.configure({"lr": 1, "cutoff_len": 9})


def test_values_of_dictionaries_are_one_word() -> None:
    words = ["--lr_scheduler_kwargs", json.dumps({"num_cycles": 2}), "-b8", "--seed=3"]
    assert config.read_flags(words) == {
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "per_device_train_batch_size": 8,
        "seed": 3,
    }


def test_a_large_model_computes_on_the_cpu_where_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    asked = config.parse(["-m", "random:falcon-7b", "--device", "cpu"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "device" not in asked.resolved()
    preflight._check_model(asked)
    asked.run.device = "auto"
    with pytest.raises(UserError, match="--device cpu"):
        preflight._check_model(asked)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("-m falcon_qlora train -m tiny --seed 1 --seed=2", "-m falcon_qlora train -m tiny --seed=2"),
        ("train -b 1 --lr 1 x -b 2", "train --lr 1 x -b 2"),
        ("train rows.jsonl --eval_split a b --eval_split c", "train rows.jsonl --eval_split c"),
        ("train --seed -1 --seed -2", "train --seed -2"),
        ("-m falcon_qlora.train -m a -m b", "-m falcon_qlora.train -m b"),
        ("-m pytest -m a -m b", "-m pytest -m a -m b"),
    ],
)
def test_commands_of_tests_have_the_last_of_each_flag(words: str, kept: str) -> None:
    assert each_once(words.split()) == kept.split()
