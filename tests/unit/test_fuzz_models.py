"""A base model's tokenizer, template, card and torch files, changed at random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falcon_qlora.commands import prepare
from falcon_qlora.commands.opening import merge_record
from falcon_qlora.common.files import write_json
from falcon_qlora.common.record_files import CERTIFICATE, PREPARED
from falcon_qlora.merge.certificate import licence_of
from falcon_qlora.models.fingerprint import model_fingerprint
from falcon_qlora.models.folder import copy_tokenizer, write_configuration, write_generation_config
from falcon_qlora.models.load import load_model
from falcon_qlora.models.tokenizer import check_vocabulary, load_tokenizer, tokenizer_fingerprint
from tests.fuzzing import change, fresh_copy, fuzz, read_or_refused
from tests.layouts import LAYOUTS, tiny_model
from tests.small_tokenizer import small_tokenizer

TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
COPIED = ["tokenizer_config.json", "generation_config.json", "config.json", "README.md"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    model = tiny_model("falcon-7b")
    write_configuration(folder, model.config, torch.float32)
    tensors = {name: p.detach() for name, p in model.named_parameters() if name != "lm_head.weight"}
    torch.save(tensors, folder / "pytorch_model.bin")
    small_tokenizer().save_pretrained(folder)
    write_json(folder / "special_tokens_map.json", {"eos_token": small_tokenizer().eos_token})
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    write_generation_config(folder, model.config, None)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\nA model.\n")
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@fuzz(15)
@given(data=st.data(), name=st.sampled_from(TOKENIZER))
def test_tokenizer(good, scratch, data, name):
    folder = fresh_copy(good, scratch)
    change(data.draw, folder / name, named_by_user=True)

    def read() -> None:
        tokenizer = load_tokenizer(str(folder))
        tokenizer_fingerprint(tokenizer)
        check_vocabulary(tokenizer, 1000, name=str(folder))
        assert all(0 <= token < 1000 for token in tokenizer("one two", add_special_tokens=False)["input_ids"])

    read_or_refused(folder, read)


@fuzz(12)
@given(data=st.data(), name=st.sampled_from(COPIED))
def test_what_a_merge_takes_from_it(good, scratch, data, name):
    folder = fresh_copy(good, scratch)
    change(data.draw, folder / name, named_by_user=True)
    out = folder.parent / "out"

    def read() -> None:
        out.mkdir()
        load_tokenizer(str(folder))  # as merging does
        write_generation_config(out, tiny_model("falcon-7b").config, folder)
        copy_tokenizer(out, folder)
        licence = licence_of("x", folder)
        assert licence is None or len(licence) < 100
        model_fingerprint(str(folder))

    read_or_refused(folder, read)


@fuzz(8)
@given(data=st.data())
def test_what_answers_take_from_a_merge(good, scratch, data):
    folder = fresh_copy(good, scratch)
    told = {"origin": {"template": "alpaca", "template_sha256": "0" * 64}}
    write_json(folder / CERTIFICATE, told)
    change(data.draw, folder / CERTIFICATE, named_by_user=True)

    def read() -> None:
        template = merge_record(str(folder)).get("template")
        assert template is None or isinstance(template, str)

    read_or_refused(folder, read)


@fuzz(8)
@given(data=st.data())
def test_torch_files(good, scratch, data):
    folder = fresh_copy(good, scratch)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model.pt")  # whose kind `change` knows
    change(data.draw, folder / "pytorch_model.pt", named_by_user=True)
    if (folder / "pytorch_model.pt").exists():
        (folder / "pytorch_model.pt").rename(folder / "pytorch_model.bin")
    read_or_refused(folder, lambda: load_model(str(folder), device="cpu", quantize_mode="16bit"))


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared base."""
    folder = tmp_path_factory.mktemp("quantized") / "base"
    words = ["-m", LAYOUTS["falcon-7b"], "-q", request.param, "--output_dir", str(folder)]
    assert prepare.main(words) == 0
    return folder


@fuzz(30)
@given(
    data=st.data(), name=st.sampled_from(["config.json", "model.safetensors", PREPARED]), alone=st.booleans()
)
def test_quantized(quantized, scratch, data, name, alone):
    folder = fresh_copy(quantized, scratch)
    change(data.draw, folder / name, named_by_user=True)
    if alone:  # as others' checkpoints are; with the record every change of the others is found by it
        (folder / PREPARED).unlink(missing_ok=True)

    def read() -> None:
        model_fingerprint(str(folder))
        load_model(str(folder), device="cpu")

    read_or_refused(folder, read)
