"""Tokens of one's own: the same model, gradients and files as PEFT's with resized embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from falcon_qlora.checkpoint.adapter_check import AdapterFaultError
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.kernels.cross_entropy import chunked_cross_entropy
from falcon_qlora.methods.adapter_folder import TENSORS, read_adapter
from falcon_qlora.methods.interface import trainable_count
from falcon_qlora.methods.lora import Lora
from falcon_qlora.methods.open_adapter import load_adapter
from falcon_qlora.models import token_rows
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.load import load_model
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.models.scaled import head_loss
from falcon_qlora.models.tokenizer import check_vocabulary, load_tokenizer
from tests.layouts import FALCON_H1, UNTIED, VOCABULARY, check_adapter, documents, plain_float32, tiny_model

NEW = (VOCABULARY, VOCABULARY + 1)
SPARE = (VOCABULARY - 1, VOCABULARY - 3)
LAYOUTS = ["falcon-7b", "falcon-11b", "falcon3"]


def method(ids: tuple[int, ...] = NEW, **settings: Any) -> Lora:
    return Lora(r=2, token_rows=ids, **settings)


def moved(model: Any) -> Any:
    """Give every trainable parameter a value that shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def peft_twin(plain: Any, ids: tuple[int, ...], ours: Any) -> Any:
    """PEFT's own model on Transformers' with resized embeddings, and the trained tensors of `ours`."""
    untied = not plain.config.tie_word_embeddings
    if max(ids) >= VOCABULARY:
        plain.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    names = {"lm_head": list(ids), plain_embedding(plain): list(ids)} if untied else list(ids)
    config = LoraConfig(
        r=2,
        lora_alpha=16,
        target_modules=ours.peft_config["default"].target_modules,
        trainable_token_indices=names,
    )
    twin = get_peft_model(plain, config)
    with torch.no_grad():
        theirs = dict(twin.named_parameters())
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                theirs[name].copy_(parameter)
    return twin


def plain_embedding(model: Any) -> str:
    return "embed_tokens" if model.config.model_type == "llama" else "word_embeddings"


def sample(ids: tuple[int, ...]) -> Tensor:
    """A document of 24 tokens in which each of `ids` stands twice."""
    text = documents([24])[0]
    text[[3, 11]], text[[7, 8]] = ids[0], ids[1]
    return text


def packed_loss(model: Any, text: Tensor) -> Tensor:
    loss: Tensor = model(
        input_ids=text[None],
        sequences=Sequences.from_lengths([len(text)], text.device),
        target_positions=torch.arange(len(text) - 1),
        targets=text[1:],
    ).loss
    return loss


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("ids", [NEW, SPARE])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradients_and_logits_are_pefts(layout: str, ids: tuple[int, ...], fast: bool) -> None:
    base = tiny_model(layout)
    plain = plain_float32(base)
    ours = moved(method(ids).attach(base))
    text = sample(ids)
    twin = peft_twin(plain, ids, ours)
    enable_packing(ours)
    if fast:
        assert all(what.startswith("fast") for what in apply_fast_path(ours).values())
    head = token_rows.frozen_weight(ours.get_output_embeddings())
    assert len(token_rows.padded(head)) % 64 == 0 or ids == SPARE
    loss = packed_loss(ours.train(), text)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(
        twin.train()(text[None]).logits[0, :-1], text[1:], reduction="sum"
    )
    expected.backward()
    assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == theirs.keys()
    assert sum("trainable_tokens_delta" in name for name in found) == 1 + (layout in UNTIED)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert theirs[name].abs().sum() > 0
        assert_close(
            gradient, theirs[name], rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    # As generation calls it, and where the batch is another trainer's.
    ours.eval(), twin.eval()
    assert_close(ours(text[None]).logits, twin(text[None]).logits, rtol=1e-4, atol=1e-4)
    with ours.disable_adapter(), twin.disable_adapter():
        assert_close(
            ours(documents([9])[0][None]).logits[..., :VOCABULARY],
            twin(documents([9])[0][None]).logits[..., :VOCABULARY],
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("padding", [0, 31])
@pytest.mark.parametrize("chunk_tokens", [7, 1000])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_rows_of_the_head_have_the_gradients_of_a_whole_matrix(
    dtype: Any, allowed: float, chunk_tokens: int, padding: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(33, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(97, 24, generator=generator).to(dtype)
    values = torch.randn(3, 24, generator=generator).requires_grad_()
    places = torch.tensor([96, 5, 40])
    targets = torch.randint(0, 97, (33,), generator=generator)
    targets[:6] = places.repeat(2)
    exact_states, exact_values = (each.detach().double().requires_grad_() for each in (states, values))
    whole = weight.double().index_copy(0, places, exact_values)
    exact = torch.nn.functional.cross_entropy(exact_states @ whole.T, targets, reduction="sum")
    expected = torch.autograd.grad(0.37 * exact, [exact_states, exact_values])
    weight = torch.nn.functional.pad(weight, (0, 0, 0, padding))
    how: dict[str, Any] = {"rows": (places, values), "vocabulary": 97, "chunk_tokens": chunk_tokens}
    loss = chunked_cross_entropy(states, weight, targets, **how)
    assert_close(loss.double(), exact, rtol=allowed, atol=0)
    for found, gradient in zip(torch.autograd.grad(0.37 * loss, [states, values]), expected, strict=True):
        assert (found - gradient).norm() < allowed * gradient.norm()


def altered(folder: Path, change: Any) -> None:
    tensors = load_file(folder / TENSORS)
    (name,) = (
        name for name in tensors if name.endswith("word_embeddings.token_adapter.trainable_tokens_delta")
    )
    change(tensors, name)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def forget(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def nudge(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name][1, 0] += 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_opens_in_plain_peft_and_here_and_its_gate_knows_it(tmp_path: Path, layout: str) -> None:
    base = tiny_model(layout, "4bit" if layout == "falcon-7b" else "16bit")
    plain = plain_float32(base)
    model = moved(method().attach(base)).eval()
    model._method.save(model, tmp_path)
    enable_packing(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    check_adapter(tmp_path, model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    text = sample(NEW)[None]
    plain.resize_token_embeddings(VOCABULARY + 2)  # its new rows are others: the adapter has them all
    opened = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert_close(opened(text).logits, model(text).logits, rtol=1e-4, atol=1e-4)
    # An adapter of others: no record beside it, and other base weights where the new rows go.
    again = load_adapter(
        tmp_path, base_model=tiny_model(layout, "4bit" if layout == "falcon-7b" else "16bit")
    )
    assert torch.equal(again(text).logits, model(text).logits)
    saved = read_adapter(tmp_path)
    assert saved.method.token_rows == NEW
    if layout == "falcon-7b":
        for change, told in ((nudge, "is not what the model in memory has"), (forget, "is missing")):
            altered(tmp_path, change)
            with pytest.raises(AdapterFaultError, match=told):
                check_adapter(tmp_path, model)


def test_rows_keep_float32_on_a_base_in_bf16_and_pass_the_gate(tmp_path: Path) -> None:
    model = moved(method().attach(tiny_model("falcon-7b", "8bit", compute_dtype="bf16")))
    model._method.save(model, tmp_path)
    check_adapter(tmp_path, model)
    again = load_adapter(
        tmp_path, base_model=tiny_model("falcon-7b", "8bit", compute_dtype="bf16"), trainable=True
    )
    found = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], parameter)


@pytest.mark.parametrize("ids", [NEW, SPARE])
def test_new_rows_start_at_the_mean_of_the_old_and_the_rest_is_as_it_was(ids: tuple[int, ...]) -> None:
    base = tiny_model("falcon-11b", compute_dtype="bf16")
    weights = [base.get_input_embeddings().weight.clone(), base.get_output_embeddings().weight.clone()]
    model = method(ids).attach(base)
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    for weight, module in zip(weights, modules, strict=True):
        rows = token_rows.rows_of(module)
        assert rows is not None
        assert_close(rows.values, weight.double().mean(0).float().expand(2, -1), rtol=1e-5, atol=1e-6)
        assert torch.equal(rows.frozen[:VOCABULARY], weight)
        assert len(rows.frozen) == max(VOCABULARY, max(ids) + 1) == model.config.vocab_size


def test_the_counts_are_those_of_the_model() -> None:
    named = Lora(r=2, new_tokens=("<|a|>", "<|b|>"))
    for layout in ("falcon-7b", "falcon-11b"):
        base = tiny_model(layout)
        expected = trainable_count(named, base.config)
        model = method().attach(base)
        assert expected == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_tokens_become_one_id_each_and_take_spare_rows_first() -> None:
    tokenizer, named = load_tokenizer("tiny"), Lora(new_tokens=("<|im_start|>", "[ACT]"))
    size = len(tokenizer)
    named.add_tokens(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "[ACT]"])
    assert ids == [size, size + 1]
    assert tokenizer("so<|im_start|>[ACT]", add_special_tokens=False)["input_ids"][-2:] == ids
    assert named.for_tokenizer(tokenizer).token_rows == tuple(ids)
    check_vocabulary(tokenizer, size, name="tiny", added=2)
    with pytest.raises(UserError, match="do not belong together"):
        check_vocabulary(tokenizer, size - 1, name="tiny", added=2)
    with pytest.raises(UserError, match="is a token of this tokenizer already"):
        named.add_tokens(tokenizer)
    with pytest.raises(ValueError, match="for_tokenizer"):
        named.attach(tiny_model("falcon-7b"))


def test_words_or_a_file_name_the_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text("<|a|>\n<|b|>\n")
    wanted = ("<|a|>", "<|b|>")
    assert parse(["--new_tokens", str(file)]).method.new_tokens == wanted
    configuration = parse(["--new_tokens", *wanted])
    assert configuration.method.new_tokens == wanted
    assert configuration.resolved()["new_tokens"] == list(wanted)
    assert "new tokens <|a|>, <|b|> in embedding and head" in configuration.method.describe()
    file.write_text("\n<|a|>\n\n<|b|>\n\n")
    assert parse(["--new_tokens", str(file)]).method.new_tokens == wanted, "empty lines are none"
    file.write_text("\n\n")
    for words, told in (
        ([str(file)], "the file is empty"),
        (["<|a|>", "<|a|>"], "named twice"),
        (["<|a b|>"], "white space"),
        ([str(tmp_path / "no.txt")], "no such file"),
        (["<|a|>", "--method", "adapter"], "does nothing with --method adapter"),
        (["<|a|>", "--method", "full", "-q", "16bit"], "does nothing with --method full"),
    ):
        with pytest.raises(UserError, match=told):
            parse(["--new_tokens", *words])


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        ([1, 1], "each once"),
        ([-1], "expected ids"),
        (["1"], "expected ids"),
        ([], "expected ids"),
        ({"lm_head": [1]}, "are supported for the embedding"),
        ({"word_embeddings": [1], "lm_head": [2]}, "with the same tokens"),
        ([VOCABULARY + 1], "is it another base"),
    ],
)
def test_rows_of_others_that_cannot_be_are_refused(tmp_path: Path, indices: Any, told: str) -> None:
    model = method().attach(tiny_model("falcon-7b"))
    model._method.save(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(UserError, match=told):
        read_adapter(tmp_path).check(tiny_model("falcon-7b").config)


def test_an_adapter_of_others_that_trained_the_embedding_alone_stays_so(tmp_path: Path) -> None:
    """What PEFT does by itself with an untied head."""
    base = tiny_model("falcon-11b")
    plain = plain_float32(base)
    theirs = get_peft_model(
        plain,
        LoraConfig(r=2, target_modules=["dense"], trainable_token_indices=list(SPARE), task_type="CAUSAL_LM"),
    )
    moved(theirs).eval().save_pretrained(tmp_path, save_embedding_layers=False)
    ours = load_adapter(tmp_path, base_model=base)
    text = sample(SPARE)[None]
    assert_close(ours(text).logits, theirs(text).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_an_odd_number_of_rows_is_padded_and_changes_nothing(tied: bool) -> None:
    name = FALCON_H1["falcon-h1"].replace("vocab_size=128", "vocab_size=97")
    name += f",tie_word_embeddings={str(tied).lower()}"
    model = load_model(name, device="cpu", seed=1)
    enable_packing(model)
    results = []
    for _ in range(2):
        hidden = model.get_input_embeddings().weight[:13].float().clone().requires_grad_()
        loss = head_loss(hidden, model.get_output_embeddings(), torch.arange(13) + 84, scale=0.7)
        results.append((loss, *torch.autograd.grad(loss, hidden)))
        token_rows.pad_head(model)
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before)
    head = model.get_output_embeddings().weight
    assert head.shape[0] == 97
    assert len(token_rows.padded(head)) == 128
    assert (model.get_input_embeddings().weight is head) == tied
    full = load_model(name, device="cpu", seed=1)
    full.get_output_embeddings().weight.requires_grad_()
    token_rows.pad_head(full)
    assert len(token_rows.padded(full.get_output_embeddings().weight)) == 97
