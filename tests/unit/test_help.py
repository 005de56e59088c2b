"""Help pages: what a command uses and no more, short lines, a line a choice; flags that it does not use."""

from __future__ import annotations

import re
import shlex

import pytest

from falcon_qlora import __main__ as cli
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
