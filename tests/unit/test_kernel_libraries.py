"""The optional kernel libraries: where they keep what they compile, what leaves them out, how they fail."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from falcon_qlora.bench.documents import made_up
from falcon_qlora.bench.runners import Settings, build
from falcon_qlora.bench.variants import VARIANTS
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.kernels import flash_attention, fp8, ops
from falcon_qlora.kernels.fp8_gelu_products import PLAIN, fp8_gelu_products
from falcon_qlora.kernels.gelu_products import GeluProducts, gelu_products
from falcon_qlora.kernels.libraries import Loaded, usable
from falcon_qlora.models import fast_path
from falcon_qlora.models.fast_path import choose_kernels, failed_libraries
from tests.layouts import VOCABULARY, tiny_model
from tests.unit.test_fast_path import adapted

NAMES = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "QUACK_CACHE_DIR")


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_users_own_cache_is_named_before_the_import(on_hopper: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_hopper.setenv("XDG_CACHE_HOME", str(tmp_path))
    on_hopper.setenv("QUACK_CACHE_DIR", "/mine")
    assert usable("pytest")
    folder = os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]
    assert (os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"], folder.startswith(str(tmp_path))) == (
        "1",
        True,
    )
    assert os.environ["QUACK_CACHE_DIR"] == "/mine"  # a user's own setting stays


def test_a_cache_that_cannot_be_written_is_left_out(on_hopper: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    on_hopper.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert usable("pytest")
    assert not any(name in os.environ for name in NAMES)


def test_older_gpus_and_missing_libraries_have_none(on_hopper: pytest.MonkeyPatch) -> None:
    assert not usable("no_such_library")
    on_hopper.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert not usable("pytest")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU that has both libraries, as far as choosing goes."""
    monkeypatch.setattr(fast_path, "takes_varlen", lambda *_: True)
    monkeypatch.setattr(flash_attention, "flash_attention_4", lambda *_: Loaded(True))
    monkeypatch.setattr(fast_path, "_gelu_products", lambda base: Loaded(GeluProducts(print, print)))
    monkeypatch.setattr(fast_path, "_fp8_gelu_products", lambda base: Loaded(PLAIN))


# What an incomplete or another version of a library does, in its module and where it is first used.
BROKEN = {
    "a part is missing": "import nvidia_cutlass_dsl_libs_core",
    "a .so is missing": "raise OSError('libcute_runtime.so: cannot open shared object file')",
    "it refuses": "raise RuntimeError('the driver is too old [12.4]\\nUpdate it')",
    "an older version": "import os; os.gemm_epilogue",
    "no interface": "",
    "its first use fails": "def _flash_attn_fwd(*a, **k): raise ValueError('no such tile')\n"
    "class _E:\n    def __call__(self, *a, **k): raise ValueError('no such tile')\n    gemm = __call__\n"
    "def gemm_epilogue(**k): return lambda f: _E()",
}
ERRORS = {
    "a part is missing": "ModuleNotFoundError: No module named 'nvidia_cutlass_dsl_libs_core'",
    "a .so is missing": "OSError: libcute_runtime.so: cannot open shared object file",
    "it refuses": "RuntimeError: the driver is too old (12.4)",
    "an older version": "AttributeError: module 'os' has no attribute 'gemm_epilogue'",
    "no interface": {
        "flash-attn-4": "AttributeError: module 'flash_attn.cute.interface' has no attribute",
        "quack-kernels": "ImportError: cannot import name 'gemm_epilogue'",
    },
    "its first use fails": "ValueError: no such tile",
}


@pytest.fixture
def install(on_hopper: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Puts a made-up release of a library where Python finds it, on a CPU that says it is a Hopper GPU."""
    on_hopper.setattr(fast_path, "takes_varlen", lambda *_: True)
    on_hopper.setattr(fast_path, "_gelu_products", lambda base: gelu_products(base.device))
    on_hopper.setattr(fast_path, "_fp8_gelu_products", lambda base: fp8_gelu_products(base.device))
    on_hopper.setenv("XDG_CACHE_HOME", str(tmp_path))
    on_hopper.syspath_prepend(str(tmp_path))

    def put(library: str, code: str, distribution: str | None = None) -> None:
        module, more = {
            "flash-attn-4": ("flash_attn/cute/interface.py", {}),
            "quack-kernels": (
                "quack/epilogue/frontend.py",
                {
                    "quack/activation.py": "gelu_erf = dgelu_erf = print",
                    "quack/epilogue/ops.py": "ColVecLoad = str",
                },
            ),
        }[library]
        for name, text in ({module: code} | more).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        about = tmp_path / f"{(distribution or library).replace('-', '_')}-9.9.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Name: {distribution or library}\nVersion: 9.9\n")

    caches = flash_attention.flash_attention_4, gelu_products, fp8_gelu_products
    for cache in caches:
        cache.cache_clear()
    yield put
    for cache in caches:
        cache.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "quack")]:
        del sys.modules[name]


@pytest.mark.parametrize("library", ["flash-attn-4", "quack-kernels"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_library_that_is_installed_and_fails_is_told(
    library: str, how: str, install: Callable[..., None]
) -> None:
    install(library, BROKEN[how])
    error = ERRORS[how]
    told = f"{library} failed: {error if isinstance(error, str) else error[library]}"
    model = adapted("falcon-7b", "4bit", compute_dtype="bf16")
    report = choose_kernels(model, kernels="auto", compute_dtype="auto")
    (failure,) = failed_libraries(report)
    assert failure.startswith(told)
    part = "attention: variable-length kernel" if library == "flash-attn-4" else "GELU: PyTorch"
    assert all(what.startswith("fast") and f"{part} [{failure}]" in what for what in report.values())
    with pytest.raises(UserError) as refused:
        choose_kernels(model, kernels="required", compute_dtype="auto")
    assert str(refused.value).startswith(f"--kernels required: {failure}. ")
    left_out = choose_kernels(model, kernels="portable", compute_dtype="auto")
    assert not failed_libraries(left_out)
    with fp8.emulated():
        in_fp8 = choose_kernels(model, kernels="auto", compute_dtype="fp8")
    assert failed_libraries(in_fp8)[0].startswith(told)


def test_so_is_it_in_a_benchmarks_row(install: Callable[..., None]) -> None:
    install("flash-attn-4", BROKEN["a .so is missing"])
    base = tiny_model("falcon-7b", "4bit", compute_dtype="bf16")
    notes = []
    for end in ("", "-no-libraries"):
        with build(VARIANTS[f"ours{end}"], base, Settings(r=4, max_length=24), {}) as runner:
            notes += runner.notes  # type: ignore[attr-defined]
    assert [("libcute_runtime.so" in note) for note in notes] == [True, False]


@pytest.mark.parametrize(
    "why", ["not installed", "FlashAttention-2", "on an older GPU", "for SwiGLU", "ALiBi"]
)
def test_nothing_is_told_of_what_a_run_has_no_use_for(
    why: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = {"for SwiGLU": "falcon3", "ALiBi": "falcon-rw-1b"}.get(why, "falcon-7b")
    if why in ("for SwiGLU", "ALiBi"):
        install("quack-kernels", BROKEN["a part is missing"])
    if why == "ALiBi":
        install("flash-attn-4", BROKEN["a part is missing"])
    if why == "FlashAttention-2":
        install("flash-attn-4", BROKEN["a part is missing"], distribution="flash-attn")
    if why == "on an older GPU":
        install("flash-attn-4", BROKEN["a part is missing"])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    model = adapted(layout, "4bit", compute_dtype="bf16")
    assert not failed_libraries(choose_kernels(model, kernels="auto", compute_dtype="auto"))


def test_triton_that_fails_leaves_its_work_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    rows = pytest.importorskip("falcon_qlora.kernels.rows", reason="Triton is not installed")
    monkeypatch.setattr(rows, "copy_rows", no_compiler)
    found = ops.triton.__wrapped__(torch.device("cpu"))
    assert found.part is None
    assert found.failure == "triton failed: RuntimeError: Failed to find C compiler"


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
    last = ", feed-forward: of targets alone where they are at most 80% of tokens)"
    assert list(report.values()) == [said, said.removesuffix(")") + last]


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
    assert gelus == [WITH[1], WITHOUT[1]]


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
