"""Help pages: what a command uses and no more, short lines, a line a choice; flags that it does not use."""

from __future__ import annotations

import re
import shlex

import pytest

from falcon_qlora import __main__ as cli
from falcon_qlora.commands.eval import EvalArguments
from falcon_qlora.commands.generate import GenerateArguments
from falcon_qlora.config import read_flags
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.config.help import COMMON
from falcon_qlora.config.parser import FalconParser, recipe_names
from falcon_qlora.config.verbs import VERBS

SETTINGS = FalconParser(LaunchArguments).settings
SHARED = FalconParser().settings.keys()
PAGES = [verb for verb in VERBS if verb != "inspect"]  # which takes a folder and no flags


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    assert caught.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-\w, )?--(\w+)", text, re.M))


@pytest.mark.parametrize("verb", PAGES)
def test_a_page_has_what_the_command_uses(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    page, whole = (shown(capsys, verb, flag) for flag in ("--help", "--help-all"))
    uses = VERBS[verb].uses()
    own = flags_in(whole) - uses
    assert uses <= flags_in(whole)
    assert own & SHARED <= {"adapter"}  # which generate, eval and merge have in a meaning of their own
    assert uses & COMMON <= flags_in(page) <= (uses & COMMON) | own
    assert all(len(line) <= 110 for line in page.splitlines())
    for name in flags_in(page) & SETTINGS.keys():
        setting = SETTINGS[name]
        _, *lines = setting.help.split("\n")
        if lines:  # one a choice
            assert {line.partition(": ")[0] for line in lines} >= set(setting.choices or ())
            assert all(re.search(rf"^ +{re.escape(line.partition(': ')[0])}  ", page, re.M) for line in lines)
        else:
            assert setting.choices is None or name == "report_to"
    for words in VERBS[verb].examples:
        assert f"\n  falcon-qlora {verb} {words}\n" in page


@pytest.mark.parametrize(
    ("verb", "told", "not_told"),
    [
        ("generate", "unset: the adapter's own", "(default: ybelkada"),
        ("eval", "unset: those that the run held out", "(default: timdettmers"),
        ("merge", "Replace what --out holds", "Replace the run"),
        ("prepare", "Folder for the quantized base", "a fresh one under runs/"),
    ],
)
def test_a_page_tells_no_default_or_meaning_of_train_that_is_another_here(
    capsys: pytest.CaptureFixture[str], verb: str, told: str, not_told: str
) -> None:
    page = " ".join(shown(capsys, verb, "--help").split())
    assert told in page
    assert not_told not in page
    assert VERBS[verb].means.keys() <= VERBS[verb].uses()


def test_the_page_of_train_describes_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "train", "--help")
    for name in recipe_names():
        assert re.search(rf"^  {name}  +\w.{{30}}", page, re.M), name
    for flag in ("compute_dtype", "checkpointing", "packing", "overwrite", "gpus"):
        assert f"--{flag}" in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "params -m tiny --gpus 2 --learning_rate 1 --recipe lit-lora",
            "note: falcon-qlora params does not use --gpus, --learning_rate\n",
        ),
        ("params -m tiny --recipe lit-lora --lora_r 4", ""),
        (
            "bench --list_variants --gpus 1 -b 4 --warmup 2",
            "note: falcon-qlora bench with --gpus does not use --per_device_train_batch_size\n",
        ),
        (
            "bench --list_variants -b 4 --kernels off --lora_r 2",
            "note: falcon-qlora bench does not use --kernels, --per_device_train_batch_size\n",
        ),
        (
            "bench --list_variants --template none --max_rows 2 --max_length 64",
            "note: falcon-qlora bench without --dataset_name does not use --max_rows, --template\n",
        ),
        ("bench --list_variants --template none --dataset_name sample", ""),
        ("bench --list_variants --template none --gpus 1", ""),
        (
            "estimate -m tiny --dataset_name sample -s 2 --dry_run --save_steps 5 --optim sgd",
            "note: falcon-qlora estimate does not use --dry_run, --save_steps\n",
        ),
        (
            "estimate -m tiny --dataset_name sample -s 2 --output_dir runs/x --overwrite",
            "note: falcon-qlora estimate without --resume does not use --output_dir, --overwrite\n",
        ),
        (
            "estimate --table -m tiny --gpu t4 -q 4bit --seed 2 --no_packing",
            "note: falcon-qlora estimate with --table does not use --seed\n",
        ),
        (
            "params -m tiny --lora_r 4 --lora_r 4 --lora_alpha 1 --lora_alpha 2",
            "note: --lora_alpha is given twice: 2 counts, not 1\n",
        ),
        (
            "bench --list_variants --dataset_name a.jsonl b --dataset_name 'c d'",
            (
                "note: --dataset_name is given twice: 'c d' counts, not a.jsonl b. For both: "
                "--dataset_name a.jsonl b 'c d'\n"
            ),
        ),
    ],
)
def test_a_flag_that_changes_nothing_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    assert cli.main(shlex.split(words)) == 0
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("verb", "words", "told"),
    [
        ("data", "-s 5 -b 2", " without --streaming does not use --max_steps"),
        ("data", "--streaming -s 5 -b 2", " with --streaming does not use --per_device_train_batch_size"),
        ("data", "--streaming false -s 5 -b 2", " without --streaming does not use --max_steps"),
        ("data", "--config a.yaml -s 5", None),
        ("generate", "--seed 3 --temperature 0", " without --temperature does not use --seed"),
        ("generate", "--seed 3 --temperature 0.7", None),
        ("eval", "--tasks x --template none --seed 1", " with --tasks does not use --seed, --template"),
        ("params", "--resume runs/x --nnodes 2", " does not use --nnodes, --resume"),
    ],
)
def test_a_setting_that_another_one_needs_is_told_without_it(
    capsys: pytest.CaptureFixture[str], verb: str, words: str, told: str | None
) -> None:
    own = {"generate": GenerateArguments, "eval": EvalArguments}.get(verb)
    given = read_flags(shlex.split(words), verb=verb, extra_arguments=own)
    assert capsys.readouterr().err == (f"note: falcon-qlora {verb}{told}\n" if told else "")
    assert not {"resume", "nnodes"} & given.keys()  # a run to go on from would give its own settings
