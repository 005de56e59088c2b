"""Where the optional kernel libraries keep what they compile, and what leaves them out."""

import os
from pathlib import Path

import pytest
import torch

from falcon_qlora.bench.documents import made_up
from falcon_qlora.bench.runners import Settings, build
from falcon_qlora.bench.variants import VARIANTS
from falcon_qlora.config import parse
from falcon_qlora.kernels import flash_attention, fp8
from falcon_qlora.kernels.gelu_products import GeluProducts
from falcon_qlora.kernels.libraries import usable
from falcon_qlora.models import fast_path
from falcon_qlora.models.fast_path import choose_kernels
from tests.layouts import VOCABULARY, tiny_model
from tests.unit.test_fast_path import adapted

NAMES = (
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
    "QUACK_CACHE_DIR",
)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_users_own_cache_is_named_before_the_import(on_hopper: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_hopper.setenv("XDG_CACHE_HOME", str(tmp_path))
    on_hopper.setenv("QUACK_CACHE_DIR", "/mine")
    assert usable("json")
    folder = os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]
    assert (os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"], folder.startswith(str(tmp_path))) == (
        "1",
        True,
    )
    assert os.environ["QUACK_CACHE_DIR"] == "/mine"  # a user's own setting stays


def test_a_cache_that_cannot_be_written_is_left_out(on_hopper: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    on_hopper.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert usable("json")
    assert not any(name in os.environ for name in NAMES)


def test_older_gpus_and_missing_libraries_have_none(on_hopper: pytest.MonkeyPatch) -> None:
    assert not usable("no_such_library")
    on_hopper.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert not usable("json")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU that has both libraries, as far as choosing goes."""
    monkeypatch.setattr(fast_path, "takes_varlen", lambda *_: True)
    monkeypatch.setattr(flash_attention, "flash_attention_4", object)
    monkeypatch.setattr(fast_path, "_gelu_products", lambda base: GeluProducts(print, print))


WITH, WITHOUT = ("FlashAttention-4", "in products"), ("variable-length kernel", "PyTorch")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], WITH), (["--kernels", "required"], WITH), (["--kernels", "portable"], WITHOUT)],
    ids=str,
)
def test_portable_kernels_are_pytorchs_and_tritons(flags: list[str], expected: tuple[str, str]) -> None:
    settings = parse(flags).model
    model = adapted("falcon-7b", "4bit", compute_dtype="bf16")
    report = choose_kernels(model, kernels=settings.kernels, compute_dtype=settings.compute_dtype)
    attention, gelu = expected
    said = f"fast (attention: {attention}, weights: NF4 dequantized, GELU: {gelu}, between: PyTorch)"
    assert list(report.values()) == [said] * 2


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("mode", ["", "-8bit", "-16bit"])
@pytest.mark.parametrize("dtype", ["", "-fp8"])
def test_a_benchmark_without_libraries_has_none(mode: str, dtype: str) -> None:
    base = tiny_model("falcon-7b", VARIANTS[f"ours{mode}"].quantize_mode, compute_dtype="bf16")
    notes = []
    with fp8.emulated():
        for end in ("", "-no-libraries"):
            with build(VARIANTS[f"ours{mode}{dtype}{end}"], base, Settings(r=4, max_length=24), {}) as runner:
                (note,) = runner.notes  # type: ignore[attr-defined]
                notes.append(note)
    attentions = [note.partition("attention: ")[2].partition(",")[0] for note in notes]
    gelus = [note.partition("GELU: ")[2].partition(",")[0] for note in notes]
    assert attentions == [WITH[0], WITHOUT[0]]
    assert gelus == ["PyTorch" if dtype else WITH[1], WITHOUT[1]]


@pytest.mark.parametrize("mode", ["", "-8bit", "-16bit"])
def test_a_benchmark_that_keeps_fp8_weights_makes_none_in_a_step(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model("falcon-7b", VARIANTS[f"ours{mode}"].quantize_mode, compute_dtype="bf16")
    made = []
    quantize = fp8.quantize_weight
    monkeypatch.setattr(fp8, "quantize_weight", lambda *a: made.append(a) or quantize(*a))
    counts = []
    with fp8.emulated():
        for end in ("", "-kept"):
            variant = VARIANTS[f"ours{mode}-fp8{end}"]
            with build(variant, base, Settings(r=4, max_length=24), {}) as runner:
                before = len(made)
                runner.step(runner.prepare(made_up(2, 24, VOCABULARY, seed=0)))
                counts.append((before, len(made) - before))
            made.clear()
    weights = 2 * 4  # blocks, linears
    # One for each pass, but none back into the first block's input; or in both layouts before the first step.
    assert counts == [(0, 2 * weights - 2), (2 * weights, 0)]
