"""What a message proposes is done, as it stands there: the command that was refused then goes on.

Each case is a command line that is refused, and what of the message is followed: a pattern whose group is the
advice, the words that it takes the place of ("" for none: it is added), and a value where the message leaves
that to the user. Training itself is left out of those that are refused before it begins.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from falcon_qlora import __main__ as cli
from falcon_qlora import config
from falcon_qlora.commands import bench, scaling
from falcon_qlora.commands import train as launcher
from falcon_qlora.commands.bench import BenchArguments
from falcon_qlora.commands.compare import CompareArguments
from falcon_qlora.commands.data import DataReportArguments
from falcon_qlora.commands.estimate import EstimateArguments
from falcon_qlora.commands.eval import EvalArguments
from falcon_qlora.commands.generate import GenerateArguments
from falcon_qlora.commands.merge import MergeArguments
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.config.parser import FalconParser
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.processes import endings
from falcon_qlora.training import run
from tests.integration.refusals import only_message
from tests.integration.runs import write_jsonl

PACKAGE = Path(cli.__file__).parent
TRAIN = "train -m tiny --dataset_name rows.jsonl --report_to none"
MERGE = "merge --base dequantized --held_out_tokens 64"
SHORT = f"{TRAIN} -s 1 -q 16bit --max_length 64"
DATA = "data -m tiny --dataset_name"
OLD_RUN = Path(__file__).resolve().parents[1] / "integration" / "old_run"
DROP = "(?:drop it|[Ll]eave it out|leave the flag out)()"
MEANT = r"did you mean (\S+)\?"
Step = tuple[str, str, str]

ADVICE: list[tuple[str, list[Step]]] = [
    # Commands, and flags by meaning and by spelling
    ("finetune -m tiny --dataset_name rows.jsonl", [("did you mean (train)", "finetune", "")]),
    (f"{TRAIN} --lr 3e-4", [("give (--learning_rate 3e-4)", "--lr 3e-4", "")]),
    (f"{TRAIN} --cutoff_len 512", [("give (--max_length 512)", "--cutoff_len 512", "")]),
    (f"{TRAIN} --precision bf16-true", [("give (--compute_dtype bf16)", "--precision bf16-true", "")]),
    (f"{TRAIN} --learning_rte 1e-4", [(MEANT, "--learning_rte", "")]),
    (f"{TRAIN} --gpus all", [(DROP, "--gpus all", "")]),
    (f"{TRAIN} --use_cpu", [("use (--device cpu)", "--use_cpu", "")]),
    (f"{TRAIN} --trust_remote_code --warmup_ratio 0.1",
     [("(--warmup_steps) takes a ratio", "--trust_remote_code --warmup_ratio", "")]),
    ("train -m tiny rows.jsonl", [("such as (--dataset_name rows.jsonl)", "rows.jsonl", "")]),
    ("train mine.yaml -m tiny --dataset_name rows.jsonl",
     [("such as (--config mine.yaml)", "mine.yaml", "")]),
    # Values
    (f"{TRAIN} --max_length 1e2", [("write it out: (100)", "1e2", "")]),
    (f"{TRAIN} --method qlora", [(r"here that is (lora)", "qlora", "")]),
    (f"{TRAIN} --optim adamw_torhc", [(MEANT, "adamw_torhc", "")]),
    (f"{TRAIN} --template alpacca", [(MEANT, "alpacca", "")]),
    (f"{TRAIN} --dataset_format alpaca --template alpaca --recipe lamda-7b-4bit",
     [(MEANT, "lamda-7b-4bit", "")]),
    (f"{TRAIN} --config runs/old", [(MEANT, "runs/old", "")]),
    (f"{TRAIN} --lora_target_modules dens", [(MEANT, "dens", "")]),
    # What does not go together
    (f"{TRAIN} -q 8bit --double_quantization", [(DROP, "--double_quantization", "")]),
    (f"{TRAIN} --padding max_length", [("is a setting of (--packing false)", "", "")]),
    (f"{TRAIN} --hub_model_id me/mine", [("is a setting of (--push_to_hub true)", "", "")]),
    (f"{TRAIN} --push_to_hub", [("give (--hub_model_id NAME/MODEL)", "", "")]),
    (f"{TRAIN} --eval_steps 5", [("hold out rows with (--eval_split)", "", " 0.5")]),
    (f"{TRAIN} --early_stopping 3", [("such as (--eval_split 0.05)", "", "")]),
    (f"{TRAIN} --eval_strategy epoch", [("give (--eval_split), such as 0.05", "", " 0.05")]),
    (f"{TRAIN} --sample_prompts Hello",
     [("needs (--generate_samples)", "", " 1"), ("such as (--eval_split 0.05)", "", "")]),
    (f"{TRAIN} --streaming", [("give (--max_steps)", "", " 2")]),
    (f"{TRAIN} --streaming -s 2 --save_strategy epoch", [("give (steps) instead", "epoch", "")]),
    (f"{TRAIN} --bf16 --fp16", [("choose one with (--compute_dtype)", "--bf16 --fp16", " bf16")]),
    (f"{TRAIN} --bf16 --compute_dtype fp16",
     [("give (--compute_dtype) alone", "--bf16 --compute_dtype", "")]),
    (f"{TRAIN} --compute_dtype fp8 --kernels off", [("drop --kernels off()", "--kernels off", "")]),
    (f"{TRAIN} --compute_dtype fp8 --lora_dropout 0.1",
     [("set (--lora_dropout 0)", "--lora_dropout 0.1", "")]),
    (f"{TRAIN} --train_sampling_strategy group_by_length", [("needs (--packing false)", "", "")]),
    (f"{TRAIN} --method full -q 4bit", [("give (--quantize_mode 16bit)", "-q 4bit", "")]),
    (f"{TRAIN} --method full -q 4bit", [("such as (--method lora)", "--method full", "")]),
    (f"{TRAIN} --sharding zero3", [("full: (--sharding fsdp) shares", "--sharding zero3", "")]),
    (f"{TRAIN} --sharding zero3", [("is for (--method full):", "", "")]),
    (f"{TRAIN} --sharding zero3 --offload_base", [(DROP, "--sharding zero3", "")]),
    (f"{TRAIN} --sharding zero3 --use_dora", [(DROP, "--sharding zero3", "")]),
    (f"{TRAIN} --sharding fsdp --use_dora", [("drop it, or (--use_dora)", "--use_dora", " false")]),
    (f"{TRAIN} --method full -q 16bit --offload_base",
     [("give an (adapter)'s", "full", "")]),
    (f"{TRAIN} --method full -q 16bit --offload_base --sharding zero3",
     [("weight; drop it()$", "--offload_base", "")]),
    (f"{TRAIN} --method full -q 4bit --sharding zero3",
     [("give (--quantize_mode 16bit)$", "-q 4bit", "")]),
    (f"{TRAIN} --method adapter --lora_r 8", [(DROP, "--lora_r 8", "")]),
    (f"{TRAIN} --lora_slices query --lora_target_modules dense",
     [("leave out --lora_target_modules()", "--lora_target_modules dense", "")]),
    (f"{TRAIN} --eval_split 0.1 --eval_steps 10 --save_steps 15",
     [("give (--load_best_model_at_end false)", "", "")]),
    (f"{TRAIN} --eval_split 0.1 --eval_strategy epoch --save_strategy steps",
     [("give (--load_best_model_at_end false)", "", "")]),
    ("train -m tiny --dataset_name rows.jsonl --report_to none wandb",
     [("drop (none) or", "none wandb", "")]),
    (f"{TRAIN} --node_rank 1", [(DROP, "--node_rank 1", "")]),
    (f"{TRAIN} --nnodes 2", [("with (--rdzv_backend c10d --rdzv_endpoint HOST:PORT)", "", "")]),
    (f"{TRAIN} --adapter_sha256 0", [("give (--adapter) too", "", " runs/old")]),
    (f"{TRAIN} --dataset_weights 2", [(DROP, "--dataset_weights 2", "")]),
    # Folders, files, splits
    ("train -m runs/old --dataset_name rows.jsonl",
     [("name it with (--adapter),", "-m", ""), ]),
    ("train -m whole --dataset_name rows.jsonl", [(MEANT, "whole", "")]),
    ("train -m random:falcon-7bb --dataset_name rows.jsonl",
     [(MEANT, "falcon-7bb", "")]),
    ("train -m tiny --dataset_name row.jsonl", [(MEANT, "row.jsonl", "")]),
    (f"{DATA} splits --eval_split validation",
     [(r"give (split:validation)", "validation", "")]),
    (f"{TRAIN} --resume", [("give (--output_dir)", "", " runs/old")]),
    (f"{TRAIN} --resume", [("as (--resume) PATH", "--resume", " runs/old")]),
    (f"{TRAIN} --output_dir runs/old", [(r"\((--resume)\)", "", "")]),
    (f"{TRAIN} --output_dir runs/old", [(r"\((--overwrite)\)", "", "")]),
    (f"{TRAIN} --dry_run --output_dir runs/old",
     [(r"already\. Replace it \((--overwrite)\)", "", "")]),
    (f"{TRAIN} --resume runs/old --output_dir new", [("leave --output_dir out()", "--output_dir new", "")]),
    # Rows
    (f"{DATA} odd.jsonl", [("Name your columns with (--text_column)", "", " words")]),
    (f"{DATA} rows.jsonl --dataset_format alpacca", [(MEANT, "alpacca", "")]),
    (f"{DATA} odd.jsonl --text_column wordz", [(MEANT, "wordz", "")]),
    (f"{DATA} rows.jsonl --template none", [("use (--template alpaca)", "--template none", "")]),
    (f"{DATA} texts.jsonl --template alpaca",
     [("use (--template none)", "--template alpaca", "")]),
    (f"{DATA} pairs.jsonl", [("(--completion_column chosen) beside", "", "")]),
    (f"{DATA} rows.jsonl --template alpacca", [(MEANT, "alpacca", "")]),
    (f"{DATA} rows.jsonl --eval_split 1.5", [("such as (0.05)", "1.5", "")]),
    # Measuring
    ("bench --models tiny --variants oours", [(MEANT, "oours", "")]),
    ("bench --models tiny --variants zzz", [("(--list_variants)", "", "")]),
    ("bench --models tiny --fixed global", [("such as (--gpus 1,2)", "", "")]),
    ("bench --models tiny --method adapter", [("(--gpus) measures", "", " 1")]),
]  # fmt: skip
# What opens models, in seconds.
WITH_MODELS: list[tuple[str, list[Step]]] = [
    (f"{SHORT} --optim sgd --adam_beta1 0.5", [(DROP, "--adam_beta1 0.5", "")]),
    (f"{SHORT} --method full --sharding fsdp", [("or (--sharding none)", "--sharding fsdp", "")]),
    (f"{SHORT} --kernels off --checkpointing selective",
     [("give (--checkpointing full),", "--checkpointing selective", "")]),
    (f"{SHORT} --adapter runs/old --lora_r 5", [(DROP, "--lora_r 5", "")]),
    (f"{SHORT} --resume light/checkpoints/step-2",
     [(r"a new run from it with (--adapter \S+)", "--resume light/checkpoints/step-2", "")]),
    (f"{SHORT} --output_dir begun --resume", [("start it again with (--overwrite)", "--resume", "")]),
    *((f"{SHORT} --output_dir others {way}", [("; name another (folder)", "others", "_of_mine")])
      for way in ("", "--overwrite")),
    (f"{SHORT} --output_dir others --resume auto", [("; name another (folder)$", "others", "_of_mine")]),
    (f"{SHORT} --output_dir others --resume",
     [("; name another (folder)$", "others --resume", "_of_mine")]),
    ("chat -m tiny", [("did you mean (generate --chat)", "chat", "")]),
    ("generate -m tiny --max_new_tokens 2 --prompt Hi --prompt_file prompts.json",
     [("--prompt and (--prompt_file): give one", "--prompt Hi --prompt_file", "")]),
    ("generate -m tiny --chat --prompt Hi", [("leave out --prompt,()", "--prompt Hi", "")]),
    ("generate -m tiny --compare --max_new_tokens 2 --prompt Hi",
     [("needs (--adapter)", "-m tiny", " runs/old")]),
    ("generate -m runs/old --max_new_tokens 2 --prompt Hi", [("name it with (--adapter),", "-m", "")]),
    ("generate --adapter gone --max_new_tokens 2 --prompt Hi",
     [("give (--model_name_or_path) FOLDER", "", " tiny")]),
    ("eval -m tiny", [("with (--dataset_name) FILE", "", " rows.jsonl")]),
    ("eval --adapter runs/old --eval_split none.jsonl",
     [("(--eval_split) FILE", "--eval_split none.jsonl", " rows.jsonl")]),
    (f"{MERGE} --adapter runs/old", [("merge --adapter DIR (--out) DIR", "", " merged")]),
    (f"{MERGE} --adapter runs/old --out empty", [(r"\((--overwrite)\)", "", "")]),
    ("inspect", [("falcon-qlora (inspect) DIR", "inspect", " runs/old/checkpoints/step-2")]),
    ("compare runs/old -s 8", [(DROP, "-s 8", "")]),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of several kinds, a run, and the same with a base that is gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Say 1."))
    rows = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(8)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "odd.jsonl", [{"words": "Some text.", "number": 1}] * 2)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "Some text."}] * 2)
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "Say 1.", "chosen": "1", "rejected": "2"}] * 2)
    for name in ("splits", "empty", "whole"):
        (tmp_path / name).mkdir()
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "splits" / f"{split}.jsonl", rows)
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "config.yaml").write_text("format: 2\n")
    (tmp_path / "others" / "adapter").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    (tmp_path / "prompts.json").write_text('["Hi"]')
    shutil.copytree(tiny_path(), tmp_path / "whole" / "adapter")
    shutil.copytree(OLD_RUN / "runs", tmp_path / "runs")
    light = shutil.copytree(tmp_path / "runs" / "old", tmp_path / "light") / "checkpoints/step-2"
    told = json.loads((light / "manifest.json").read_text())
    (light / "manifest.json").write_text(json.dumps(told | {"resumable": False}))
    gone = shutil.copytree(tmp_path / "runs" / "old" / "adapter", tmp_path / "gone")
    for name, key in (
        ("falcon_qlora.json", "base_model"),
        ("adapter_config.json", "base_model_name_or_path"),
    ):
        record = json.loads((gone / name).read_text())
        (gone / name).write_text(json.dumps(record | {key: "./there_no_more"}))
    return tmp_path


def follow(words: str, steps: list[Step], capsys: pytest.CaptureFixture[str]) -> None:
    """Do what the messages say, one after another, and see that the last is taken."""
    for pattern, instead, more in steps:
        capsys.readouterr()
        assert cli.main(shlex.split(words)) == 2, words
        message = only_message(capsys.readouterr().err)
        advised = re.search(pattern, message)
        assert advised is not None, message
        assert instead in words
        taken = f"{advised[1]}{more}"
        words = words.replace(instead, taken, 1) if instead else f"{words} {taken}"
    capsys.readouterr()
    status = cli.main(shlex.split(words))
    assert status == 0, f"{words}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(("words", "steps"), ADVICE, ids=[words for words, _ in ADVICE])
def test_what_a_message_proposes_is_taken(
    words: str,
    steps: list[Step],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def begun(
        argv: list[str], folder: Path, meanwhile: Callable[[], None] = lambda: None, **of_agent: object
    ) -> int:
        meanwhile()
        if "falcon_qlora.train" in argv:
            config.parse(argv[argv.index("falcon_qlora.train") + 1 :])
        return 0

    monkeypatch.setattr(launcher, "_run_one", begun)
    monkeypatch.setattr(launcher, "_launch", begun)
    monkeypatch.setattr(bench, "_bench", lambda *_: 0)
    monkeypatch.setattr(scaling, "run", lambda *_: 0)
    follow(words, steps, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "steps"), WITH_MODELS, ids=[words for words, _ in WITH_MODELS])
def test_and_by_what_opens_models(
    words: str,
    steps: list[Step],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(argv: list[str], folder: Path, meanwhile: Callable[[], None]) -> int:
        meanwhile()
        parsed = argv[argv.index("falcon_qlora.train") + 1 :]
        return endings.exit_status(lambda: run.train(config.parse(parsed)))

    monkeypatch.setattr(launcher, "_run_one", train)
    follow(words, steps, capsys)


# Of torchrun, srun, hf, wandb, nvidia-smi, TensorBoard, git, and inspect (no settings); and a spelling.
_OTHERS = frozenset(
    "log-dir module local-addr local-dir local-ranks-filter logdir relogin query-gpu format id loop-ms "
    "nproc-per-node nproc_per_node ntasks markdown signals-to-handle porcelain show-toplevel untracked-files "
    "batchSize".split()
)
_OF_COMMANDS = (
    BenchArguments,
    CompareArguments,
    DataReportArguments,
    EstimateArguments,
    EvalArguments,
    GenerateArguments,
    MergeArguments,
)


def test_every_flag_that_the_package_speaks_of_is_there() -> None:
    known = {"help", "help-all", "help_all", "version"} | _OTHERS
    for parser in (FalconParser(LaunchArguments), *map(FalconParser, _OF_COMMANDS)):
        for each in parser.settings.values():
            known |= {flag.lstrip("-") for flag in (*each.flags, *each.flags_off)}
    unknown = {
        (name, str(file.relative_to(PACKAGE)))
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in re.findall(r"(?<![\w-])--([a-z][A-Za-z0-9_-]+)", node.value)
        if name not in known and f"{name}_" not in known
    }
    assert not unknown
