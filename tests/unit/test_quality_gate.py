"""The quality gate in its tiny form: it passes what is right, and rejects every mutant."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from falcon_qlora.data import sample_data
from falcon_qlora.kernels import fp8, ops
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.models.tokenizer import load_tokenizer
from tests.benchmarks.quality import variants, workers
from tests.benchmarks.quality.__main__ import main
from tests.benchmarks.quality.base import (
    OUTLIER_CHANNELS,
    OUTLIER_FACTOR,
    configuration,
    put_outliers_in,
    train_base,
)
from tests.benchmarks.quality.corpus import gather
from tests.benchmarks.quality.distances import REACH
from tests.benchmarks.quality.learning import Job, Run, Schedule, batches, read_rows
from tests.benchmarks.quality.mutants import MUTANTS, OF_STATE_SPACES
from tests.benchmarks.quality.report import learning_rejections
from tests.benchmarks.quality.sizes import TINY_SHAPES
from tests.benchmarks.quality.variants import VARIANTS
from tests.layouts import FAMILIES, LAYOUTS, documents, plain_float32, tiny_model
from tests.tiny_model.english import write_documents
from tests.tiny_model.train import Settings

IN_FLOAT32 = ["--tiny", "--parts", "a", "--variants", "4bit-fp32"]


def gate(out, *flags):
    """Exit status and what was found."""
    status = main([*flags, "--out", str(out)])
    return status, json.loads((out / "quality.json").read_text())


def passed(out, *flags, of_h1=("falcon-h1",)):
    """What the gate found, where it has to pass and to reject every mutant; `of_h1` are labels of models."""
    status, found = gate(out, "--tiny", *flags)
    assert status == 0
    assert found["failures"] == {}
    for comparison in found["kernel"] + found["model"]:
        more = OF_STATE_SPACES if comparison["model"] in of_h1 else {}
        assert comparison["mutants"].keys() == MUTANTS.keys() | more.keys()
        assert all(comparison["mutants"].values()), comparison
        bound = {"4bit-fp32": 1e-4, "4bit-fp8": 0.35}.get(comparison["variant"], 0.05)
        assert comparison["distances"]["fast"].pop(REACH) == {"all": 0}
        for of_group in comparison["distances"]["fast"].values():
            assert 0 < max(of_group.values()) < bound
    return found


@pytest.mark.parametrize("name", ["4bit-fp32", pytest.param("all", marks=pytest.mark.slow)])
def test_it_passes_the_fast_path_and_rejects_every_mutant(tmp_path, capsys, name):
    asked = set(VARIANTS) if name == "all" else {name}
    with fp8.emulated():
        found = passed(tmp_path, "--parts", "a", *(["--variants", name] if name != "all" else []))
    assert not found["skipped"]
    assert len(found["kernel"]) == len(TINY_SHAPES) * len(asked)
    report = (tmp_path / "quality.md").read_text()
    assert report.startswith("# Quality gate: passed")
    assert report in capsys.readouterr().out


def test_so_it_does_on_a_trained_model(tmp_path):
    assert len(passed(tmp_path, "--parts", "b", "--variants", "4bit-fp32")["model"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["falcon3", "falcon-h1"])
def test_so_it_does_on_a_trained_model_of_another_family(tmp_path, family):
    """Half a minute of training takes it from the 5.5 nats of single tokens' frequencies to 2.9 or 3.4."""
    tokenizer = load_tokenizer("tiny")
    texts = list(islice(write_documents(seed=0), 1500))
    np.save(tmp_path / "tokens.npy", np.concatenate([[*ids, 0] for ids in tokenizer(texts)["input_ids"]]))
    settings = Settings(
        minutes=5, epochs=1, batch_tokens=512, learning_rate=1e-2, compile_model=False, seed=0
    )
    config = configuration(family, len(tokenizer), 64, 2)
    *_, last = train_base(tmp_path / "tokens.npy", tmp_path / "base", config, settings, torch.device("cpu"))
    assert last["held_out_loss"]["text"] < 4
    flags = ["--family", family, "--base", str(tmp_path / "base"), "--parts", "b", "--minutes_b", "20"]
    of_h1 = ("plain", "outliers") if family == "falcon-h1" else ()
    flags += ["--variants", "4bit-fp32", "4bit", *(["4bit-fp8"] if of_h1 else [])]
    with fp8.emulated():
        found = passed(tmp_path, *flags, of_h1=of_h1)
    assert len(found["model"]) == (6 if of_h1 else 4)


@pytest.mark.slow
def test_so_it_does_on_a_trained_model_in_bfloat16(tmp_path):
    """Minutes, where processors compute in bfloat16 by halves."""
    found = passed(tmp_path, "--parts", "b", "--variants", "4bit", "--minutes_b", "20")
    assert len(found["model"]) == 2


def test_a_slightly_wrong_function_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "gelu", lambda x, out: out.copy_(F.gelu(x, approximate="tanh")))
    status, found = gate(tmp_path, *IN_FLOAT32)
    assert status == 1
    assert found["failures"].keys() == {"4bit-fp32"}
    assert "# Quality gate: failed" in (tmp_path / "quality.md").read_text()


def test_a_mutant_that_passes_fails_the_gate(tmp_path, monkeypatch):
    monkeypatch.setitem(MUTANTS, "none at all", lambda model: nullcontext())
    status, found = gate(tmp_path, *IN_FLOAT32)
    assert status == 1
    assert found["failures"].keys() == {"mutant: none at all"}


def test_a_variant_that_users_get_unasked_and_that_cannot_run_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "apply_fast_path", lambda model, **how: {"h.0": "reference: a reason"})
    status, found = gate(tmp_path, *IN_FLOAT32)
    assert status == 1
    assert found["kernel"] == []
    assert found["failures"] == {
        "4bit-fp32": ["was not run: 1 blocks do not take the fast path: reference: a reason"]
    }


@pytest.mark.parametrize("layout", [*FAMILIES, "falcon-h1"])
def test_outliers_change_no_function(layout):
    model = plain_float32(tiny_model(layout))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = documents([40])[0][None]
    with torch.no_grad():
        expected = model(ids).logits
        put_outliers_in(model)
        found = model(ids).logits
    assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    norms = [n for n in before if re.search(r"\d+\.\w*(norm|ln_)", n)]
    vectors = 2 if layout in LAYOUTS else 1
    assert len(norms) == 2 * vectors * (1 if layout in ("falcon-7b", "falcon-11b") else 2)
    parameters = dict(model.named_parameters())
    for name in norms:
        factors = parameters[name] / before[name]
        assert int((factors > 0.99 * OUTLIER_FACTOR).sum()) == OUTLIER_CHANNELS, name
        assert int((factors == 1).sum()) == factors.numel() - OUTLIER_CHANNELS, name


def run_of(path, *, untrained=3.0, own=2.0, by_stock=2.0):
    job = Job(base="plain", folder="", variant=VARIANTS["4bit"], path=path, seed=0)
    return Run(job=job, untrained=untrained, own=own, by_stock=by_stock, steps=1, seconds=1)


@pytest.mark.parametrize(
    ("losses", "reasons"),
    [
        ({"own": 2.0019}, []),
        ({"own": 1.9981}, []),
        ({"own": 2.0021}, ["own path"]),
        ({"own": 1.9979}, ["own path"]),
        ({"by_stock": 2.0021}, ["stock path"]),
        ({"own": float("nan")}, ["own path", "nothing to compare"]),
        ({"untrained": 2.2}, ["nothing to compare"]),
    ],
)
def test_how_far_a_loss_may_be(losses, reasons):
    found = learning_rejections(run_of("fast", **losses), run_of("stock"))
    assert len(found) == len(reasons), found
    assert all(reason in line for reason, line in zip(reasons, found, strict=True))


def test_both_paths_get_the_same_batches_and_never_a_held_out_row():
    rows = read_rows(sample_data.path(), tiny_path(), held_out=50, limit=300)
    again = read_rows(sample_data.path(), tiny_path(), held_out=50, limit=300)
    assert len(rows.evaluation) == 50
    assert not {d.content for d in rows.evaluation} & {d.content for d in rows.training}
    first, second = (batches(each.training, 512, 2, 7) for each in (rows, again))
    other = batches(rows.training, 512, 2, 8)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].input_ids, other[0].input_ids)
    assert max(batch.tokens for batch in first) <= 512
    assert sum(batch.tokens for batch in first) == 2 * sum(len(d.input_ids) for d in rows.training)


def test_a_corpus_has_each_text_once_and_only_text(tmp_path):
    words = "the rest is real and reads as it should do, line for line\n" * 10
    folder = tmp_path / "package"
    folder.mkdir()
    for name, text in {
        "one.py": words,
        "same.md": words,
        "two.rst": words + "and one more",
        "table.txt": "0123456789 " * 100,
        "other.txt": "пусть здесь не латиница " * 100,
        "short.py": "x = 1",
        "binary.so": words + "not read",
    }.items():
        (folder / name).write_text(text)
    out = tmp_path / "tokens.npy"
    count = gather(out, tiny_path(), megabytes=1, processes=1, roots=[tmp_path])
    tokens = np.load(out)
    text = load_tokenizer("tiny").decode(tokens)
    assert tokens.dtype == np.uint16
    assert len(tokens) == count
    assert sorted(text.split("<|endoftext|>")) == ["", words, words + "and one more"]


COMMAND = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.quality"]


def run_gate(out, *flags):
    """The command itself and what was found, of float32, where both paths have to agree."""
    flags = ["--tiny", "--variants", "4bit-fp32", "--seeds", "0", "--workers", "2", *flags]
    flags += ["--data", str(sample_data.path()), "--out", str(out)]
    ran = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=300, check=False)
    found = json.loads((out / "quality.json").read_text())
    assert found["missing"] == {}, ran.stderr
    assert ran.stdout.endswith((out / "quality.md").read_text() + "\n")
    return ran, found


@pytest.mark.slow
def test_the_command_fine_tunes_in_processes_and_passes(tmp_path):
    ran, found = run_gate(tmp_path, "--parts", "b", "c")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert found["failures"] == {}
    assert len(found["model"]) == 2
    assert "- (b) outliers, 4bit-fp32, fast: block outputs" in ran.stdout
    assert len(found["learning"]) == 2 * 2 + 2 + 1
    for run in found["learning"]:
        job = run["job"]
        assert f"- (c) {job['base']}, 4bit-fp32, {job['mutant'] or job['path']}, seed 0" in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("family", ["falcon", "falcon-h1"])
def test_the_command_trains_a_base_on_given_text(tmp_path, family):
    words = "".join(f"{n} apples and {n + 1} pears are {2 * n + 1} pieces of fruit.\n" for n in range(3000))
    (tmp_path / "text.txt").write_text(words)
    flags = ["--parts", "b", "--text", str(tmp_path / "text.txt"), "--seconds", "10", "--family", family]
    ran, found = run_gate(tmp_path, *flags)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "held-out loss" in found["about"]["base"]
    assert {path.name for path in (tmp_path / "base").iterdir()} >= {"config.json", "model.safetensors"}
    assert len(found["model"]) == 2


@pytest.mark.slow
def test_a_process_that_dies_ends_the_waiting():
    setting = workers.Setting(
        data=sample_data.path(),
        tokenizer=tiny_path(),
        held_out=5,
        limit=10,
        schedule=Schedule(),
        device=torch.device("cpu"),
    )
    with workers.started(1, setting) as pool:
        assert list(workers.outcomes(pool, int, ["7", "seven"], 100)) == [
            ("7", 7),
            ("seven", "ValueError: invalid literal for int() with base 10: 'seven'"),
        ]
        started = time.monotonic()
        assert list(workers.outcomes(pool, time.sleep, [60], 0.5)) == [(60, "not reached in 0.0 minutes")]
        assert time.monotonic() - started < 10
    with workers.started(1, setting) as pool:
        assert list(workers.outcomes(pool, os._exit, [3, 4], 100)) == [(3, workers.DIED), (4, workers.DIED)]
        assert list(workers.outcomes(pool, os._exit, [5], 100)) == [(5, workers.DIED)]


def test_what_is_not_reached_in_time_is_said_and_fails_a_default(tmp_path):
    status, found = gate(tmp_path, *IN_FLOAT32, "--minutes_a", "0")
    assert status == 1
    assert found["kernel"] == []
    assert found["failures"]["4bit-fp32"] == [
        f"(a) {name}: not reached in 0.0 minutes" for name in TINY_SHAPES
    ]


def test_given_text_is_read_as_it_is_by_several_processes(tmp_path):
    lines = [f"line {n} of a long text, Zeile {n} ü\n" for n in range(40_000)]
    given = tmp_path / "given.txt"
    given.write_text("".join(lines), encoding="utf-8")
    out = tmp_path / "tokens.npy"
    gather(out, tiny_path(), megabytes=1, processes=2, text=given)
    documents_found = load_tokenizer("tiny").decode(np.load(out)).split("<|endoftext|>")
    assert all(document.endswith("\n") for document in documents_found[:-1])
    assert len(documents_found) == 4
    found = "".join(documents_found)
    assert "".join(lines).startswith(found)
    assert 1e6 <= len(found) < 1e6 + 100
