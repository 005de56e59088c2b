"""Merging through the command line: PEFT's own merge is the oracle, plain Transformers the reader."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.commands import merge as merging
from falcon_qlora.merge import build
from falcon_qlora.merge.tensors import merged_tensors
from falcon_qlora.methods.adapter_folder import RECORD, read_adapter
from falcon_qlora.methods.lora import Lora
from falcon_qlora.methods.open_adapter import load_adapter
from falcon_qlora.models import hub
from falcon_qlora.models.folder import parameter_shapes, published_config, write_configuration
from falcon_qlora.models.load import load_model
from falcon_qlora.models.locate import open_checkpoint
from falcon_qlora.models.tensor_files import write_model
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.models.tokenizer import load_tokenizer
from tests.integration.refusals import contents, only_message
from tests.integration.runs import room_for, write_jsonl
from tests.layouts import FAMILIES, UNTIED, attach_lora, documents, plain_float32, tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["query_key_value", "dense_4h_to_h"]},
    "slices": {"slices": ["query", "value"]},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit run on sums that the packaged model gets wrong at first, with rows held out."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [
        {"instruction": f"What is {a} and {b}?", "output": f"It is {a + b}."}
        for a in range(9)
        for b in range(8)
    ]
    return falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name=write_jsonl(folder / "rows.jsonl", rows),
        output_dir=folder / "run",
        max_length=64,
        max_steps=10,
        learning_rate=2e-3,
        lora_r=8,
        per_device_train_batch_size=8,
        eval_split=0.25,
        report_to="none",
        cache_dir=folder / "cache",
    )


def merge(*words: Any) -> int:
    return cli.main(["merge", *map(str, words)])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def random_adapter(folder: Path, base: Any, record: dict[str, Any] | None = None, **options: Any) -> Path:
    """An adapter that changes every logit, without a training run."""
    model = attach_lora(base, r=4, alpha=6, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
            elif parameter.requires_grad:
                parameter.mul_(1 + 0.05 * torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / RECORD).write_text(json.dumps(record or {}))
    return folder


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("lora", "16bit"),
        pytest.param("rslora", "dequantized", marks=pytest.mark.slow),
        ("dora", "dequantized"),
        ("slices", "16bit"),
        pytest.param("lora", "dequantized", marks=pytest.mark.slow),
        pytest.param("rslora", "16bit", marks=pytest.mark.slow),
        pytest.param("dora", "16bit", marks=pytest.mark.slow),
    ],
)
def test_the_merge_is_pefts_own_in_plain_transformers(tmp_path, variant, base):
    record = {"base_model": "tiny", "quantize_mode": "4bit", "lora_slices": VARIANTS[variant].get("slices")}
    quantized = load_model("tiny", device="cpu")
    oracle_base = (
        plain_float32(quantized)
        if base == "dequantized"
        else AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    )
    adapter = random_adapter(tmp_path / "adapter", quantized, record, **VARIANTS[variant])
    limits = (
        "--max_loss_increase",
        9,
        "--max_kl_divergence",
        9,
        "--held_out_tokens",
        500,
        "--max_length",
        128,
    )
    words = ("--adapter", adapter, "--base", base, *limits)
    assert merge(*words, "--out", tmp_path / "exact", "--dtype", "fp32") == 0
    assert merge(*words, "--out", tmp_path / "bf16") == 0

    ids = load_tokenizer("tiny")("A river runs through the old town.", return_tensors="pt")["input_ids"]
    opened = PeftModel.from_pretrained(oracle_base, adapter).eval()
    with torch.no_grad():
        expected = opened(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "exact").eval()
        assert merged.dtype == torch.float32
        assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    oracle = opened.merge_and_unload(safe_merge=True).state_dict()
    for stored in (weights_of(tmp_path / "exact"), weights_of(tmp_path / "bf16")):
        assert set(stored) == set(oracle) - {"lm_head.weight"}
        for name, tensor in stored.items():
            assert_close(
                tensor, oracle[name].to(tensor.dtype), rtol=1e-5 if tensor.itemsize == 4 else 8e-3, atol=1e-6
            )
    same = [
        (tensor == oracle[name].to(torch.bfloat16)).float().mean().item()
        for name, tensor in weights_of(tmp_path / "bf16").items()
    ]
    assert min(same) > 0.999, "the sums are not rounded once"
    certificate = json.loads((tmp_path / "bf16" / "certificate.json").read_text())
    assert (certificate["origin"]["adapter"]["r"], certificate["origin"]["adapter"]["alpha"]) == (4, 6)
    before = load_file(tiny_path() / "model.safetensors")
    changed = [n for n, t in weights_of(tmp_path / "bf16").items() if not torch.equal(t, before[n])]
    assert len(changed) >= len(load_file(adapter / "adapter_model.safetensors")) // 3 > 0


@pytest.mark.parametrize("layout", FAMILIES)
def test_names_and_configuration_are_the_published_ones(tmp_path, layout):
    """What vLLM's and llama.cpp's readers of Falcon take from a folder, and that Transformers agrees."""
    base = tiny_model(layout)
    plain = plain_float32(base)
    adapter = random_adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    out.mkdir()
    checkpoint = open_checkpoint(FAMILIES[layout], seed=1)
    stream = merged_tensors(
        checkpoint,
        read_adapter(adapter),
        onto="16bit",
        quantize_mode="16bit",
        double_quantization=True,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    write_model(
        out, parameter_shapes(checkpoint.config), stream, dtype=torch.float32, max_shard_bytes=100_000
    )
    write_configuration(out, checkpoint.config, torch.float32)
    opened = PeftModel.from_pretrained(plain, adapter).eval()
    ids = documents([12])[0][None]
    expected = opened(ids).logits
    assert_close(AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)

    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    names = set(weights_of(out))
    assert names >= (
        {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"}
        if layout == "falcon3"
        else {"transformer.word_embeddings.weight", "transformer.h.1.self_attention.query_key_value.weight"}
    )
    assert ("lm_head.weight" in names) == (layout in UNTIED)

    raw = json.loads((out / "config.json").read_text())
    kind = "Llama" if layout == "falcon3" else "Falcon"
    assert (raw["model_type"], raw["architectures"]) == (kind.lower(), [f"{kind}ForCausalLM"])
    # llama.cpp: as many key/value heads as num_kv_heads says, or one; the fused weight in such groups.
    if layout in ("falcon-7b", "falcon-11b", "falcon-40b", "falcon-180b"):
        kv_heads = raw.get("num_kv_heads") or 1
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        fused = weights_of(out)["transformer.h.0.self_attention.query_key_value.weight"]
        fused.view(kv_heads, heads // kv_heads + 2, hidden // heads, hidden)
    again = AutoConfig.from_pretrained(out)
    ignored = {"transformers_version", "_name_or_path", "dtype", "architectures"}
    ours, theirs = checkpoint.config.to_dict(), again.to_dict()
    assert {k: v for k, v in ours.items() if k not in ignored} == {
        k: v for k, v in theirs.items() if k not in ignored
    }


def test_the_7b_configuration_says_what_the_published_one_says():
    """Against tiiuae/falcon-7b's config.json, whose names of 2023 are n_head and n_layer."""
    config = published_config(open_checkpoint("random:falcon-7b").config, torch.bfloat16)
    published = {
        "alibi": False,
        "attention_dropout": 0.0,
        "bias": False,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "hidden_dropout": 0.0,
        "hidden_size": 4544,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 65024,
    }
    assert {name: config[name] for name in published} == published
    assert "num_kv_heads" not in config


def test_a_merge_comes_with_its_certificate_and_the_better_is_kept(run, tmp_path, capsys, monkeypatch):
    """The certificate's figures, by plain Transformers a document at a time."""
    monkeypatch.setattr("falcon_qlora.terminal.console._PATIENCE_SECONDS", 0)
    out = tmp_path / "merged"
    assert merge("--adapter", run, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "(kept)" in printed
    for onto in ("16bit", "dequantized"):
        for doing in ("merging", "measuring the merge"):
            assert f"{doing} onto {onto}: block 5 of 5 …\n" in printed
    certificate = json.loads((out / "certificate.json").read_text())
    kept = certificate["merges"][certificate["merged_onto"]]
    assert kept["loss"] == min(each["loss"] for each in certificate["merges"].values())
    assert set(certificate["merges"]) == {"16bit", "dequantized"}
    held_out = certificate["held_out"]
    assert held_out["is_the_runs_own"]
    data = json.loads((run / "data.json").read_text())
    assert held_out["fingerprint"] == data["held_out"]["fingerprint"]
    assert held_out["target_tokens"] == data["held_out"]["target_tokens"]
    assert certificate["origin"]["data_fingerprint"] == data["fingerprint"]
    assert certificate["origin"]["licence"] == "apache-2.0"
    assert certificate["origin"]["settings"]["lora_r"] == 8
    summary = json.loads((run / "summary.json").read_text())
    # Measured in other batches than in the run: float32 sums differ from the sixth digit on.
    assert certificate["adapter_loss"] == pytest.approx(summary["best_eval_loss"], rel=1e-5)

    reference = load_adapter(run / "adapter", base_model="tiny", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    loss, kl, same, count = 0.0, 0.0, 0, 0
    for ids, mask in _held_out_documents(run):
        with torch.no_grad():
            theirs = merged(ids).logits[0, :-1].log_softmax(-1)[mask[1:]]
            ours = reference(ids).logits[0, :-1].log_softmax(-1)[mask[1:]]
        loss -= theirs.gather(-1, ids[0, 1:][mask[1:]][:, None]).sum().item()
        kl += (ours.exp() * (ours - theirs)).sum().item()
        same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        count += len(theirs)
    assert count == held_out["target_tokens"]
    assert kept["loss"] == pytest.approx(loss / count, rel=1e-4)
    assert kept["kl_divergence"] == pytest.approx(kl / count, rel=1e-2, abs=1e-6)
    assert kept["same_top_token"] == pytest.approx(same / count, abs=1.5 / count)  # one may be a tie

    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert f"{kept['loss']:.4f}" in card
    assert "`alpaca`" in card
    assert "### Instruction:\nQUESTION\n\n### Response:\n```" in card
    assert (
        AutoTokenizer.from_pretrained(out)("one")["input_ids"] == load_tokenizer("tiny")("one")["input_ids"]
    )
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "certificate.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def _held_out_documents(run: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from falcon_qlora.config import parse
    from falcon_qlora.training import rows

    settings = parse(["--config", str(run / "config.yaml")])
    corpus = rows.corpora(settings.data, load_tokenizer("tiny"), seed=settings.run.seed)[1]
    return [(torch.tensor([row["input_ids"]]), torch.tensor(row["mask"]).bool()) for row in corpus.dataset]


class TestDamage:
    """Each kind of damage between the adapter and the merge: status 2, and nothing is left."""

    def refused(self, run: Path, out: Path, capsys: Any, *words: Any) -> str:
        before = contents(out.parent)
        capsys.readouterr()
        assert merge("--adapter", run, "--out", out, *words) == 2
        assert contents(out.parent) == before, "something was left"
        return only_message(capsys.readouterr().err)

    @pytest.mark.parametrize("base", ["dequantized", "auto"])
    def test_half_the_scale(self, run, tmp_path, capsys, monkeypatch, base):
        def halved(checkpoint: Any, adapter: Any, **how: Any) -> Any:
            halved = dataclasses.replace(adapter.method, alpha=adapter.method.alpha / 2)
            return merged_tensors(checkpoint, dataclasses.replace(adapter, method=halved), **how)

        monkeypatch.setattr(build, "merged_tensors", halved)
        message = self.refused(run, tmp_path / "merged", capsys, "--base", base)
        assert "worse than the adapter" in message
        untried = {"dequantized": "--base 16bit, or --dtype fp32", "auto": "--dtype fp32"}
        assert message.endswith(f"Nothing was kept. Try {untried[base]}")

    def test_a_linear_that_is_left_out(self, run, tmp_path, capsys, monkeypatch):
        real = Lora.merged_weight
        monkeypatch.setattr(
            Lora,
            "merged_weight",
            lambda self, weight, module, *more: (
                weight if ".0." in module else real(self, weight, module, *more)
            ),
        )
        words = ("--base", "dequantized", "--max_loss_increase", "0.005", "--max_kl_divergence", "0.005")
        assert "worse than the adapter" in self.refused(run, tmp_path / "merged", capsys, *words)

    @pytest.mark.parametrize(
        "value", [0.01, *(pytest.param(each, marks=pytest.mark.slow) for each in (60.0, math.nan))]
    )
    def test_a_weight_altered_on_the_disk(self, run, tmp_path, capsys, monkeypatch, value):
        real = build.write_model

        def altering(folder: Path, *args: Any, **how: Any) -> Any:
            hashes = real(folder, *args, **how)
            tensors = load_file(folder / "model.safetensors")
            tensors["transformer.h.2.mlp.dense_4h_to_h.weight"][:8, 7] += value
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return hashes

        monkeypatch.setattr(build, "write_model", altering)
        message = self.refused(run, tmp_path / "merged", capsys, "--base", "dequantized")
        assert "h.2.mlp.dense_4h_to_h.weight reads back differently than it was written" in message

    @pytest.mark.parametrize("value", [60.0, math.nan])
    def test_a_weight_altered_before_it_is_written(self, run, tmp_path, capsys, monkeypatch, value):
        def altering(*args: Any, **how: Any) -> Any:
            for name, tensor in merged_tensors(*args, **how):
                if name == "transformer.h.2.mlp.dense_4h_to_h.weight":
                    tensor[:8, 7] += value
                yield name, tensor

        monkeypatch.setattr(build, "merged_tensors", altering)
        assert "worse than the adapter" in self.refused(run, tmp_path / "merged", capsys)

    def test_settings_that_were_altered_since_the_run(self, run, tmp_path, capsys):
        altered = shutil.copytree(run, tmp_path / "altered")
        settings = json.loads((altered / "adapter" / "adapter_config.json").read_text())
        settings["lora_alpha"] /= 4
        (altered / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        assert "altered since" in self.refused(altered, tmp_path / "merged", capsys)

    @pytest.mark.parametrize(
        ("part", "change", "told"),
        [
            ("lora_B", lambda t: t.zero_(), "zero throughout"),
            ("lora_A", lambda t: t.view(-1)[5:6].fill_(math.inf), "non-finite"),
        ],
    )
    def test_an_adapter_that_is_damaged_itself(self, run, tmp_path, capsys, part, change, told):
        adapter = shutil.copytree(run / "adapter", tmp_path / "damaged")
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors[next(name for name in tensors if part in name)])
        save_file(tensors, adapter / "adapter_model.safetensors")
        assert told in self.refused(adapter, tmp_path / "merged", capsys)


def test_what_is_refused_before_anything_is_computed(run, tmp_path, capsys, monkeypatch):
    def refused(*words: Any) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        assert merge(*words) == 2
        assert contents(tmp_path) == before
        return only_message(capsys.readouterr().err)

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("precious")
    words = ("--adapter", run, "--out", tmp_path / "there")
    assert refused(*words).endswith("there: exists already and is not a merge; name another folder")
    assert "is not a merge; name another folder, as --overwrite does not" in refused(*words, "--overwrite")
    assert "--out is needed" in refused("--adapter", run)
    assert "holds no adapter" in refused("--adapter", tmp_path, "--out", tmp_path / "out")
    out = ("--adapter", run, "--out", tmp_path / "out")
    below_a_file = tmp_path / "there" / "thesis.txt" / "out"
    assert "cannot write there (Not a directory)" in refused("--adapter", run, "--out", below_a_file)
    assert "--max_shard_size 5" in refused(*out, "--max_shard_size", "5")
    assert "--max_loss_increase" in refused(*out, "--max_loss_increase", "-1")
    assert "--hub_model_id" in refused(*out, "--push_to_hub")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    assert re.search(r"needs [\d.]+ MiB, only 9.5 MiB free: [\d.]+ MiB short", refused(*out))


def test_a_disk_that_fills_is_one_message_and_leaves_nothing(run, tmp_path, capsys):
    with room_for(1_000_000):
        assert merge("--adapter", run, "--out", tmp_path / "out", "--base", "dequantized") == 1
    assert re.fullmatch(
        r"/.*/out/.*model\.safetensors: File too large", only_message(capsys.readouterr().err)
    )
    assert list(tmp_path.iterdir()) == []


def test_overwriting_pushing_and_text_of_ones_own(run, tmp_path, capsys, monkeypatch):
    pushed, tokens = [], []

    class Hub:
        def __init__(self, token: str | None = None):
            tokens.append(token)

        def create_repo(self, repository: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repository)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> None:
            pushed.append((repo_id, {path.name for path in folder_path.iterdir()}))

    monkeypatch.setattr(hub, "HfApi", Hub)
    own = write_jsonl(tmp_path / "own.jsonl", [{"instruction": "What is 1 and 1?", "output": "It is 2."}])
    words = ("--adapter", run / "adapter", "--out", tmp_path / "merged", "--base", "dequantized")
    assert merge(*words, "--eval_split", own) == 0
    first = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert first["held_out"]["source"] == str(own)
    assert not first["held_out"]["is_the_runs_own"]
    assert merge(*words, "--overwrite", "--push_to_hub", "--hub_model_id", "me/mine") == 0
    assert pushed[0][0] == "me/mine"
    assert {"certificate.json", "model.safetensors", "config.json", "README.md"} <= pushed[0][1]
    assert {path.name for path in tmp_path.iterdir()} == {"own.jsonl", "merged"}
    # That a run was uploaded, or says so, is no wish to upload its merge too, nor to where.
    uploaded = shutil.copytree(run, tmp_path / "uploaded")
    with (uploaded / "config.yaml").open("a") as settings:
        settings.write("push_to_hub: true\nhub_model_id: them/theirs\nhub_token: theirs\n")
    words = ("--adapter", uploaded, "--out", tmp_path / "merged", "--base", "dequantized", "--overwrite")
    for name in ("_merge", "_tell"):  # the merge that is there stands for the next ones
        monkeypatch.setattr(merging, name, lambda *_: None)
    assert merge(*words) == 0
    assert len(pushed) == 1
    assert merge(*words, "--push_to_hub") == 2
    assert merge(*words, "--push_to_hub", "--hub_model_id", "me/mine") == 0
    assert [repository for repository, _ in pushed] == ["me/mine", "me/mine"]
    assert tokens == [None, None]


def test_a_merge_is_measured_in_16_bits_unless_a_flag_says_otherwise(tmp_path, capsys):
    """As transformers' own loss in float32 is; the packaged model stands for a merge."""
    model = shutil.copytree(tiny_path(), tmp_path / "merged")
    rows = [{"text": "One day Anna saw a small bird in a tree."}, {"text": "", "who": "x"}]
    text = write_jsonl(tmp_path / "text.jsonl", rows)
    words = ["eval", "-m", str(model), "--dataset_name", str(text), "--compute_dtype", "fp32"]

    def loss(*more: str) -> tuple[float, str]:
        assert cli.main([*words, *more, "--results", str(tmp_path / "figures.json")]) == 0
        return json.loads((tmp_path / "figures.json").read_text())["loss"], capsys.readouterr().err

    before, said = loss()
    assert "is a merge" not in said
    assert "note: dropped: 1 (empty" in said
    assert "note: columns not read: who (1 row)" in said
    (model / "certificate.json").write_text("{}")
    merged, said = loss()
    assert f"{model} is a merge, loaded in 16 bits" in said
    (tmp_path / "run.yaml").write_text("quantize_mode: 4bit\n")  # as a run's settings have it
    assert loss("--config", str(tmp_path / "run.yaml"))[0] == merged
    quantized, said = loss("-q", "4bit")
    assert "is a merge" not in said
    assert before == quantized != pytest.approx(merged, abs=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = load_tokenizer("tiny")
    ids = tokenizer(rows[0]["text"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert merged == pytest.approx(plain(ids, labels=ids).loss.item(), abs=1e-4)

    def answer(*more: str) -> str:
        words = ["generate", "-m", str(model), "--prompt", "A river runs", "--max_new_tokens", "40"]
        assert cli.main([*words, "--compute_dtype", "fp32", *more]) == 0
        return capsys.readouterr().out

    ids = tokenizer("A river runs", return_tensors="pt")["input_ids"]
    expected = plain.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert answer().strip() == text.strip() != answer("-q", "4bit").strip()


@pytest.mark.slow
def test_a_run_on_a_folder_of_this_machine_is_used_as_any_other(tmp_path, capsys):
    """Of a base and a tokenizer that are paths, as long as what lies there is what the run was trained on."""
    base, tokenizer = (shutil.copytree(tiny_path(), tmp_path / name) for name in ("base", "tokenizer"))
    run = falcon_qlora.train(
        model_name_or_path=str(base),
        tokenizer_name_or_path=str(tokenizer),
        dataset_name="sample",
        output_dir=tmp_path / "run",
        max_length=64,
        max_steps=4,
        save_steps=3,
        max_rows=16,
        eval_split=0.25,
        report_to="none",
        cache_dir=tmp_path / "cache",
    )
    ways = {
        "generate": ("--prompt", "x", "--max_new_tokens", "1"),
        "eval": ("--most_tokens", "64"),
        "merge": ("--out", tmp_path / "merged", "--base", "dequantized", "--overwrite"),
    }

    def statuses(folder: Path, *names: str) -> list[int]:
        return [cli.main([name, "--adapter", str(folder), *map(str, ways[name])]) for name in names or ways]

    capsys.readouterr()
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    for folder, names in ((run, ["eval"]), (run / "checkpoints" / "step-3", ["generate"]), (alone, [*ways])):
        if folder == alone:
            ways["eval"] = (*ways["eval"], "--dataset_name", "sample")
        assert statuses(folder, *names) == [0] * len(names), capsys.readouterr().err
        told = capsys.readouterr().err
        assert told.count(f"note: the base model is {base}, which") == len(names)
        assert told.count(f"note: the tokenizer is {tokenizer}, which") == len(names)
    assert cli.main(["inspect", str(run / "adapter")]) == 0
    assert "configuration is not here" not in capsys.readouterr().out
    (tokenizer / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text() + " ")
    assert statuses(run) == [2, 2, 2]
    assert capsys.readouterr().err.count("as its tokenizer") == 3


def test_an_adapter_from_elsewhere_is_measured_on_packaged_text_and_that_is_said(
    run, tmp_path, capsys, monkeypatch
):
    adapter = shutil.copytree(run / "adapter", tmp_path / "elsewhere")
    text = hashlib.sha256(b"{{ messages }}").hexdigest()  # of the template, as a run records it
    record = json.loads((adapter / RECORD).read_text()) | {"template_fingerprint": text}
    (adapter / RECORD).write_text(json.dumps(record))
    words = (
        "--adapter",
        adapter,
        "--out",
        tmp_path / "merged",
        "--held_out_tokens",
        800,
        "--max_length",
        256,
    )
    # Such text's loss says nothing of the adapter's rows: the nearer merge is kept, whatever its loss.
    monkeypatch.setattr(build, "mean_loss", lambda losses: next(falling))
    falling = iter([3.0, 2.0, 2.5])
    assert merge(*words) == 0
    assert "no held-out rows are known" in capsys.readouterr().out
    certificate = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    far, near = certificate["merges"]["16bit"], certificate["merges"]["dequantized"]
    assert (far["loss"], near["loss"]) == (2.0, 2.5)
    assert far["kl_divergence"] > near["kl_divergence"]
    assert (certificate["merged_onto"], certificate["chosen_by"]) == ("dequantized", "kl_divergence")
    monkeypatch.setattr(build, "mean_loss", lambda losses: next(falling))
    falling = iter([3.0, 2.0, 2.5])
    own = write_jsonl(tmp_path / "own.jsonl", [{"instruction": "What is 1 and 1?", "output": "It is 2."}])
    assert merge(*words[:2], "--out", tmp_path / "other", "--eval_split", own) == 0
    other = json.loads((tmp_path / "other" / "certificate.json").read_text())
    assert (other["merged_onto"], other["chosen_by"]) == ("16bit", "loss")
    assert "comes with falcon_qlora" in certificate["held_out"]["source"]
    assert certificate["held_out"]["tokens"] <= 800
    assert (certificate["origin"]["template"], certificate["origin"]["template_sha256"]) == ("alpaca", text)
    assert text in (tmp_path / "merged" / "README.md").read_text()


def test_eval_gives_what_transformers_gives(run, tmp_path, capsys):
    results = tmp_path / "figures.json"
    assert cli.main(["eval", "--adapter", str(run), "--results", str(results)]) == 0
    figures = json.loads(results.read_text())
    model = load_adapter(run / "adapter", base_model="tiny", device="cpu")
    every, answers = [], []
    for ids, mask in _held_out_documents(run):
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        every += scores.tolist()
        answers += scores[mask[1:]].tolist()
    assert figures["tokens"] == len(every)
    assert figures["perplexity"] == pytest.approx(math.exp(-sum(every) / len(every)), rel=1e-4)
    assert figures["answer_loss"] == pytest.approx(-sum(answers) / len(answers), rel=1e-4)
    capsys.readouterr()
    assert cli.main(["eval", "-m", "tiny", "-q", "16bit"]) == 2
    assert "--dataset_name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"), [("0.5", True), ("0.25", False), ("0.1", False), ("0.1 --seed 7", True)]
)
def test_eval_tells_where_the_run_was_trained_on_rows_of_the_share(run, words, told, capsys):
    """A smaller share of the same draw lies in the run's own, 0.25."""
    flags = ["--adapter", str(run), "--most_tokens", "64", "--eval_split", *words.split()]
    assert cli.main(["eval", *flags]) == 0
    assert ("the run was trained on some of these rows" in capsys.readouterr().err) == told
