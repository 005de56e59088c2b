"""Files that others wrote: crafted ones, each refused with its reason, and fuzzing of the rest."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from falcon_qlora import __main__ as cli
from falcon_qlora.commands.inspection import inspect_folder
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import file_beside, read_json
from falcon_qlora.methods.adapter_folder import read_adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.interface import method_of
from falcon_qlora.methods.open_adapter import load_adapter
from falcon_qlora.models.folder import parameter_shapes, write_configuration
from falcon_qlora.models.load import load_model
from falcon_qlora.models.prefix import prefixes
from falcon_qlora.models.tensor_files import write_model
from falcon_qlora.models.tiny import tiny_path
from tests.fuzzing import EXPLODED, JSON, Bomb, change, fresh_copy, fuzz, guarded, read_or_refused
from tests.layouts import LAYOUTS, attach_lora, tiny_model

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
COMMANDS = ["merge --out out", "generate --prompt x", "eval --dataset_name sample"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good adapter and a good model of two files."""
    folder = tmp_path_factory.mktemp("good")
    base = tiny_model("falcon-7b")
    config = base.config
    tensors = {name: p.detach() for name, p in base.named_parameters() if name != "lm_head.weight"}
    (folder / "model").mkdir()
    write_model(
        folder / "model",
        parameter_shapes(config),
        tensors.items(),
        dtype=torch.float32,
        max_shard_bytes=600_000,
    )
    write_configuration(folder / "model", config, torch.float32)
    assert (folder / "model" / "model.safetensors.index.json").is_file()
    model = attach_lora(base, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    prefixed = AdapterV2(prefix_length=3, first_block=1).attach(tiny_model("falcon-7b"))
    prefixes(prefixed)[0].gate.data.fill_(1.0)
    method_of(prefixed).save(prefixed, folder / "adapter_v2")
    (folder / "adapter_v2" / "falcon_qlora.json").write_text('{"method": "adapter_v2", "lora_slices": null}')
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(good, tmp_path / "copy")
    yield copy
    assert not (tmp_path / EXPLODED).exists(), "a crafted file was executed"


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def open_everything(adapter: Path) -> None:
    """Everything that reads an adapter, in the order in which merging does."""
    saved = read_adapter(adapter)
    base = tiny_model("falcon-7b")
    saved.check(base.config)
    load_adapter(adapter, base_model=base)


class TestCraftedAdapters:
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"peft_type": "PREFIX_TUNING"}, "only LORA"),
            ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config is"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
            ({"layer_replication": [[0, 10**9]]}, "layer_replication is"),
            ({"rank_pattern": {"(a+)+$": 10**6}}, "rank_pattern is"),
            ({"target_modules": "(a+)+$"}, "target_modules is"),
            ({"target_modules": ".*.*.*.*.*.*x"}, "target_modules is"),  # in a time that grows with each
            ({"target_modules": r"(.*)\1\1"}, "target_modules is"),
            ({"target_modules": "("}, "target_modules is"),
            ({"target_modules": [".*"]}, "target_modules is"),
            ({"target_modules": [["dense"]]}, "target_modules is"),
            ({"target_modules": r".*\.0\..*"}, "target_modules is"),  # which PEFT would open in part
            ({"target_modules": ["../../etc"]}, "target_modules is"),
            ({"exclude_modules": "(x+)+$"}, "exclude_modules is"),
            ({"init_lora_weights": "pissa"}, "would change the base model"),
            ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is"),
            ({"trainable_token_indices": [1]}, "trainable_tokens_delta is missing"),
            ({"trainable_token_indices": [2**23]}, "is it another base"),
            ({"trainable_token_indices": [2**40]}, "expected ids"),
            ({"bias": "all"}, "trained biases"),
            ({"r": 10**12}, "r is '1000000000000'"),
            ({"r": -4}, "r is '-4'"),
            ({"r": 3.5}, "r is '3.5'"),
            ({"r": True}, "r is 'True'"),
            ({"r": 8}, "has the shape"),
            ({"lora_alpha": 1e300}, "lora_alpha is"),
            ({"base_model_name_or_path": ["tiny"]}, "base_model_name_or_path is"),
            ({"unheard_of": {"__reduce__": 1}}, "unheard_of is"),
        ],
    )
    def test_settings(self, folder, changes, told):
        change_json(folder / "adapter" / SETTINGS, **changes)
        with pytest.raises(UserError, match=told):
            open_everything(folder / "adapter")

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"method": "builtins.eval"}, "method 'builtins.eval' is not known"),
            ({"method": ["adapter"]}, "is not known"),
            ({"method": "full"}, "which needs no base"),
            ({"method": "lora"}, "peft_type is None"),
            ({"method": "adapter"}, "belongs to no part"),
            ({"settings": None}, "settings must be"),
            ({"settings": {"prefix_length": 3}}, "settings must be"),
            ({"settings": {"prefix_length": 3, "first_block": 1, "name": "x"}}, "settings must be"),
            ({"settings": {"prefix_length": 10**12, "first_block": 1}}, "0 is too large"),
            ({"settings": {"prefix_length": 10**400, "first_block": 1}}, "0 is too large"),
            ({"settings": {"prefix_length": 0, "first_block": 1}}, "prefix_length: 0 is too small"),
            ({"settings": {"prefix_length": 3, "first_block": -1}}, "first_block: -1 is too small"),
            ({"settings": {"prefix_length": 3, "first_block": True}}, "first_block: True is not a whole"),
            ({"settings": {"prefix_length": 3, "first_block": 2}}, "no block would have"),
            ({"settings": {"prefix_length": 4, "first_block": 1}}, "has the shape"),
            ({"settings": {"prefix_length": 3, "first_block": 0}}, "is missing"),
        ],
    )
    def test_settings_of_other_methods(self, folder, changes, told):
        change_json(folder / "adapter_v2" / SETTINGS, **changes)
        with pytest.raises(UserError, match=told):
            load_adapter(folder / "adapter_v2", base_model=tiny_model("falcon-7b"))

    @pytest.mark.parametrize(
        ("slices", "told"),
        [
            ("query", "slices of query_key_value alone"),
            ([1], "lora_slices: '1' is not one of"),
            (["querry"], "did you mean query"),
            (["query", "key", "value"], "not divisible by 3 slices"),
            (["query", "value"], "slices of query_key_value alone"),
        ],
    )
    def test_slices(self, folder, slices, told):
        (folder / "adapter" / "falcon_qlora.json").write_text(json.dumps({"lora_slices": slices}))
        with pytest.raises(UserError, match=told):
            open_everything(folder / "adapter")

    def test_modules_that_would_be_imported_by_name_are_not(self, folder, monkeypatch):
        (Path("evil_module.py")).write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(".")
        mapping = {"base_model_class": "X", "parent_library": "evil_module"}
        change_json(folder / "adapter" / SETTINGS, auto_mapping=mapping)
        open_everything(folder / "adapter")

    @pytest.mark.parametrize("name", ["adapter", "adapter_v2"])
    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda good: {"a": Bomb()}, "holds more than tensors"),
            (lambda good: good | {"a": [1]}, "holds more than plain tensors"),
            (lambda good: good | {1: torch.zeros(1)}, "holds more than plain tensors"),
            (lambda good: list(good), "holds a list"),
            (lambda good: good | {"a": torch.zeros(1).expand(2**40)}, "a belongs to no part"),
            (lambda good: {key: each.expand(2**40, *each.shape) for key, each in good.items()}, "shape"),
            (lambda good: {key: each.to_sparse() for key, each in good.items()}, "plain tensors"),
            (lambda good: {key: each * float("nan") for key, each in good.items()}, "non-finite"),
        ],
    )
    def test_torch_files(self, folder, name, change, told):
        good = load_file(folder / name / WEIGHTS)
        (folder / name / WEIGHTS).unlink()
        torch.save(change(good), folder / name / "adapter_model.bin")
        with pytest.raises(UserError, match=told):
            load_adapter(folder / name, base_model=tiny_model("falcon-7b"))
        (folder / name / "adapter_model.bin").write_bytes(b"PK\3\4" + bytes(100))
        with pytest.raises(UserError, match="damaged"):
            load_adapter(folder / name, base_model=tiny_model("falcon-7b"))

    @pytest.mark.parametrize("name", ["adapter", "adapter_v2"])
    def test_a_pickle_under_the_name_of_safetensors(self, folder, name):
        (folder / name / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError, match="is damaged"):
            load_adapter(folder / name, base_model=tiny_model("falcon-7b"))

    @pytest.mark.parametrize(
        "header",
        [
            {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}},
            {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
            {"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}},
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        ],
    )
    def test_absurd_shapes(self, folder, header):
        text = json.dumps(header).encode()
        (folder / "adapter" / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(UserError, match="is damaged"):
            open_everything(folder / "adapter")

    def test_a_header_that_claims_to_be_huge(self, folder):
        (folder / "adapter" / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")
        with pytest.raises(UserError, match="is damaged"):
            open_everything(folder / "adapter")

    def test_tensors_of_integers(self, folder):
        tensors = {name: t.to(torch.int32) for name, t in load_file(folder / "adapter" / WEIGHTS).items()}
        save_file(tensors, folder / "adapter" / WEIGHTS)
        with pytest.raises(UserError, match="not floating-point"):
            open_everything(folder / "adapter")

    def test_a_record_of_another_kind(self, folder):
        (folder / "adapter" / "falcon_qlora.json").write_text('{"base_model": {"a": 1}}')
        with pytest.raises(UserError, match="base_model is a dict"):
            open_everything(folder / "adapter")

    @pytest.mark.parametrize(
        "command", ["merge --out out", "generate --prompt x", "eval --dataset_name sample"]
    )
    @pytest.mark.parametrize("name", ["/etc", "../../elsewhere", "~/models", "./here", "a/../../b", "mine"])
    def test_a_base_model_outside_is_read_only_where_the_user_says_so(self, folder, capsys, command, name):
        Path("mine").mkdir()  # where a model of that name on the hub would be looked for first
        change_json(folder / "adapter" / SETTINGS, base_model_name_or_path=name)
        # As its run would name it too.
        (folder / "config.yaml").write_text(f"model_name_or_path: {name}\n")
        words = command.split()
        assert cli.main([words[0], "--adapter", str(folder / "adapter"), *words[1:]]) == 2
        said = capsys.readouterr().err
        if name in ("/etc", "mine"):
            assert f"{name}' as its base model" in said
        else:
            assert f"The base model folder {name}" in said
            assert "is gone" in said
        assert "--model_name_or_path FOLDER" in said

    @pytest.mark.parametrize(
        "command", ["merge --out out", "generate --prompt x", "eval --dataset_name sample"]
    )
    def test_a_tokenizer_outside_too(self, folder, capsys, command):
        record = {"base_model": "tiny", "method": "lora", "tokenizer": str(tiny_path())}
        (folder / "adapter" / "falcon_qlora.json").write_text(json.dumps(record))
        words = command.split()
        assert cli.main([words[0], "--adapter", str(folder / "adapter"), *words[1:]]) == 2
        said = capsys.readouterr().err
        assert "as its tokenizer, but records no fingerprint" in said
        assert "--tokenizer_name_or_path FOLDER" in said

    def test_inspect_does_not_look_at_a_base_model_outside(self, folder, capsys):
        (folder / "elsewhere").mkdir()
        (folder / "elsewhere" / "config.json").write_text("secret")
        change_json(folder / "adapter" / SETTINGS, base_model_name_or_path=str(folder / "elsewhere"))
        assert cli.main(["inspect", str(folder / "adapter")]) == 0
        assert "configuration is not here" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("evil\u0000/$(id)/x", "There is no folder"),
            ("http://evil/\u0000$(id)", "of addresses only s3:// and gs:// are supported"),
        ],
    )
    def test_a_name_that_is_neither_folder_nor_hub_id(self, folder, capsys, name, told):
        change_json(folder / "adapter" / SETTINGS, base_model_name_or_path=name)
        assert cli.main(["merge", "--adapter", str(folder / "adapter"), "--out", "out"]) == 2
        assert told in capsys.readouterr().err


class TestCraftedModels:
    @pytest.mark.parametrize(
        "name", ["../outside.safetensors", "/etc/passwd", "..", "a/b.safetensors", 7, None]
    )
    def test_an_index_that_leads_out_of_its_folder(self, folder, name):
        (folder / "outside.safetensors").write_bytes(b"")
        index = folder / "model" / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        change_json(index, weight_map={**weight_map, "transformer.ln_f.weight": name})
        with pytest.raises(UserError, match="is not a file of its own folder"):
            load_model(str(folder / "model"), device="cpu", quantize_mode="16bit")

    @pytest.mark.parametrize(
        "content", ["[]", "{", '{"weight_map": []}', "{}", "\xff", '{"weight_map": NaN}']
    )
    def test_an_index_that_is_none(self, folder, content):
        (folder / "model" / "model.safetensors.index.json").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match="is not valid"):
            load_model(str(folder / "model"), device="cpu")

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": 2**40},
            {"num_hidden_layers": 10**9},
            {"vocab_size": -1},
            {"hidden_size": "192"},
            {"num_attention_heads": 7},
            {"num_attention_heads": 0},
            {"num_hidden_layers": True},
            {"layer_norm_epsilon": "small"},
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            {"model_type": ["falcon"]},
        ],
    )
    def test_absurd_configurations(self, folder, changes):
        change_json(folder / "model" / "config.json", **changes)
        with pytest.raises(UserError):
            load_model(str(folder / "model"), device="cpu")

    def test_remote_code_is_never_run(self, folder):
        """Published Falcons name it; it stays where it is."""
        (folder / "model" / "evil.py").write_text("open('exploded', 'w')\nclass C: pass\n")
        change_json(folder / "model" / "config.json", auto_map={"AutoModelForCausalLM": "evil.C"})
        assert load_model(str(folder / "model"), device="cpu", quantize_mode="16bit") is not None

    @pytest.mark.parametrize("legacy", [False, True])
    def test_pickles_in_torch_files(self, folder, legacy):
        for file in (folder / "model").glob("model*"):
            file.unlink()
        content = {"transformer.ln_f.weight": Bomb()}
        torch.save(content, folder / "model" / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match="holds more than tensors, or is damaged"):
            load_model(str(folder / "model"), device="cpu")


def test_names_of_files_and_large_or_deep_json(tmp_path):
    assert file_beside(tmp_path / "index.json", "a.safetensors") == tmp_path / "a.safetensors"
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "large.json").write_text("{}" + " " * 100)
    with pytest.raises(UserError, match="102 bytes"):
        read_json(tmp_path / "large.json", limit_bytes=101)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def fuzzed(draw: Any, folder: Path, *, named_by_user: bool = False) -> Path:
    """The folder, with one of its files changed."""
    files = sorted(path for path in folder.iterdir() if path.suffix != ".md")
    change(draw, draw(st.sampled_from(files)), named_by_user=named_by_user)
    return folder


@fuzz(60)
@given(data=st.data(), name=st.sampled_from(["adapter", "adapter_v2"]))
def test_no_adapter_makes_the_reader_crash(good, scratch, data, name):
    refused_or_opened(fuzzed(data.draw, fresh_copy(good / name, scratch)))


@fuzz(20)
@given(data=st.data())
def test_no_torch_file_of_an_adapter_makes_the_reader_crash(good, scratch, data):
    adapter = fresh_copy(good / "adapter", scratch)
    file = adapter / "adapter_model.pt"  # whose kind `change` knows
    torch.save(load_file(adapter / WEIGHTS), file)
    (adapter / WEIGHTS).unlink()
    change(data.draw, file, named_by_user=False)
    if file.exists():
        file.rename(file.with_suffix(".bin"))
    refused_or_opened(adapter)


def refused_or_opened(adapter: Path) -> None:
    def check() -> bool:
        saved = read_adapter(adapter)
        saved.check(tiny_model("falcon-7b").config)
        return True

    if read_or_refused(adapter, check):
        # What is let through, opens.
        with guarded(adapter):
            load_adapter(adapter, base_model=tiny_model("falcon-7b"))


@fuzz(60)
@given(data=st.data(), name=st.sampled_from(["adapter", "adapter_v2", "model"]))
def test_no_folder_makes_inspect_crash(good, scratch, data, name):
    folder = fuzzed(data.draw, fresh_copy(good / name, scratch), named_by_user=name == "model")
    read_or_refused(folder, lambda: inspect_folder(folder))


@fuzz(60)
@given(data=st.data())
def test_no_model_makes_the_loader_crash(good, scratch, data):
    folder = fuzzed(data.draw, fresh_copy(good / "model", scratch), named_by_user=True)
    read_or_refused(folder, lambda: load_model(str(folder), device="cpu", quantize_mode="16bit"))


@fuzz(60)
@given(certificate=JSON)
def test_no_certificate_makes_inspect_crash(good, scratch, certificate):
    folder = fresh_copy(good / "model", scratch)
    (folder / "certificate.json").write_text(json.dumps(certificate))
    found = read_or_refused(folder, lambda: inspect_folder(folder))
    assert found.faults


def test_the_layouts_of_the_corpus_are_read_when_nothing_is_wrong(folder):
    open_everything(folder / "adapter")
    assert not inspect_folder(folder / "model").faults
    assert not inspect_folder(folder / "adapter").faults
    assert load_adapter(folder / "adapter_v2", base_model=tiny_model("falcon-7b")) is not None
    settings = json.loads((folder / "adapter" / SETTINGS).read_text())
    assert settings["base_model_name_or_path"].startswith(LAYOUTS["falcon-7b"])
