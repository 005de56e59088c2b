"""Generation: greedy equals Transformers' own, batches equal single prompts, and what the command does."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from falcon_qlora import __main__ as cli
from falcon_qlora.commands import generate
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.data.templates import Turn, get_template, template_fingerprint
from falcon_qlora.data.tokens import prompt_ids
from falcon_qlora.inference.answers import load_adapter
from falcon_qlora.inference.generation import choose_tokens, generate_batch, generate_stream
from falcon_qlora.models import load
from falcon_qlora.models.fingerprint import model_fingerprint
from falcon_qlora.models.host_base import HostCopy
from falcon_qlora.models.load import load_model
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.models.tokenizer import load_tokenizer
from tests.layouts import attach_lora

PROMPTS = ["Question: What is the opposite of hot?\nAnswer:", "One day Anna", "The capital of", ""]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The packaged model in 4 bits with an adapter that changes its answers, in training mode."""
    model = attach_lora(load_model("tiny", device="cpu"), r=4)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model.train()


@pytest.fixture(scope="module")
def adapter(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    tiny.save_pretrained(folder, save_embedding_layers=False)
    record = {"base_model": "tiny", "quantize_mode": "4bit", "double_quantization": True}
    record |= {"tokenizer": None, "template": "auto", "dataset_format": "alpaca", "method": "lora"}
    (folder / "falcon_qlora.json").write_text(json.dumps(record))
    return folder


def test_greedy_answer_is_transformers_own(tiny: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    tiny.eval()
    expected = tiny.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    text = "".join(generate_stream(tiny, tokenizer, PROMPTS[0], max_new_tokens=30))
    assert text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_streamed_answers_equal_those_of_a_batch(tiny: Any, tokenizer: Any) -> None:
    batch = generate_batch(tiny, tokenizer, PROMPTS, max_new_tokens=24)
    single = ["".join(generate_stream(tiny, tokenizer, prompt, max_new_tokens=24)) for prompt in PROMPTS]
    assert batch == single
    assert generate_batch(tiny, tokenizer, []) == []


@pytest.mark.parametrize(
    "layout",
    [
        {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ],
)
def test_batch_equals_single_prompts_in_other_layouts(layout: dict[str, Any], tokenizer: Any) -> None:
    torch.manual_seed(1)
    config = FalconConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=4, num_hidden_layers=2, **layout
    )
    model = FalconForCausalLM(config).float()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    prompts = [[5, 6, 7, 8, 9, 10], [300], [40, 41, 42]]
    batch = generate_batch(model, tokenizer, prompts, max_new_tokens=12)
    assert batch == [generate_batch(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]


def test_mode_and_gradients_are_left_as_they_were(tiny: Any, tokenizer: Any) -> None:
    for training in (True, False):
        tiny.train(training)
        stream = generate_stream(tiny, tokenizer, "One day", max_new_tokens=5)
        next(stream)
        assert torch.is_grad_enabled()
        stream.close()
        assert tiny.training is training
    ids = torch.tensor([[5, 6, 7]])
    tiny(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in tiny.parameters() if p.requires_grad)
    tiny.zero_grad()


def test_answers_under_gradient_checkpointing_and_autocast_are_the_same(tiny: Any, tokenizer: Any) -> None:
    plain = generate_batch(tiny, tokenizer, PROMPTS[:1], max_new_tokens=8)
    tiny.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        assert generate_batch(tiny.train(), tokenizer, PROMPTS[:1], max_new_tokens=8) == plain
    finally:
        tiny.gradient_checkpointing_disable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(generate_batch(tiny, tokenizer, PROMPTS[:1], max_new_tokens=8)[0]) > 0


class Scripted(torch.nn.Module):
    """A model that says given tokens, whatever it is asked."""

    def __init__(self, rows: list[list[int]], vocabulary: int = 4096):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        self.rows, self.vocabulary, self.steps = rows, vocabulary, 0

    def forward(self, **inputs: Any) -> Any:
        logits = torch.zeros(len(self.rows), 1, self.vocabulary)
        for row, tokens in enumerate(self.rows):
            logits[row, 0, tokens[min(self.steps, len(tokens) - 1)]] = 1
        self.steps += 1
        return type("Output", (), {"logits": logits, "past_key_values": None})


def test_stops_at_the_end_token_of_each_row_and_keeps_it_out_of_the_text(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    hello, more = tokenizer("hello there")["input_ids"], tokenizer(" and more words")["input_ids"]
    model = Scripted([[*hello, end, *more], [*hello, *more, end]])
    assert generate_batch(model, tokenizer, ["a", "b"], max_new_tokens=50) == [
        "hello there",
        "hello there and more words",
    ]
    assert model.steps == len(hello) + len(more) + 1


def test_stream_holds_a_character_back_until_it_is_whole(tokenizer: Any) -> None:
    text = "an eagle 🦅 and é"
    ids = tokenizer(text)["input_ids"]
    pieces = list(generate_stream(Scripted([[*ids, 0]]), tokenizer, "x"))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    broken = ids[: len(tokenizer("an eagle")["input_ids"]) + 3]
    assert "".join(generate_stream(Scripted([[*broken, 0]]), tokenizer, "x")).startswith("an eagle")


def test_draws_follow_the_seed_the_temperature_and_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def share(temperature: float, top_p: float) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        tokens = choose_tokens(logits.expand(20_000, -1), temperature, top_p, draw)
        return torch.bincount(tokens, minlength=4) / len(tokens)

    torch.testing.assert_close(share(1.0, 1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02, rtol=0)
    torch.testing.assert_close(share(1.0, 0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(share(1.0, 0.01), torch.tensor([1.0, 0, 0, 0]))
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(share(0.5, 1.0), squared / squared.sum(), atol=0.02, rtol=0)
    assert choose_tokens(logits, 0.0, 0.5, torch.Generator()).tolist() == [0]


def test_same_seed_same_answer_and_another_seed_another(tiny: Any, tokenizer: Any) -> None:
    def answer(seed: int) -> str:
        return generate_batch(tiny, tokenizer, ["One day"], max_new_tokens=16, temperature=1.0, seed=seed)[0]

    assert answer(1) == answer(1) != answer(2)


@pytest.mark.parametrize("template", ["alpaca", "guanaco", "falcon-instruct"])
def test_prompt_is_the_beginning_of_what_training_sees(template: str, tokenizer: Any) -> None:
    from falcon_qlora.data.rendering import render
    from falcon_qlora.data.special_text import SpecialText
    from falcon_qlora.data.tokens import Encoder

    turns = [
        Turn("user", "Hello."),
        Turn("assistant", "!?"),
        Turn("user", f"Who says {tokenizer.eos_token}?"),
    ]
    prompt = prompt_ids(get_template(template), turns, tokenizer)
    encoder = Encoder(
        tokenizer=tokenizer, train_on="answers", append_end_token=True, overlong="split", max_length=512
    )
    row = {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}
    row["messages"].append({"role": "assistant", "content": "A falcon."})
    segments = render(row, "chat", get_template(template), special=SpecialText(tokenizer))
    (document,) = encoder.documents([segments])[0]
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert document.mask[len(prompt)] == 1
    assert prompt.count(tokenizer.eos_token_id) == 1, "after the answer; in the question it is text"


def test_command_answers_with_the_adapters_own_settings(
    adapter: Path, capsys: pytest.CaptureFixture[str], tiny: Any, tokenizer: Any
) -> None:
    flags = ["--max_new_tokens", "12"]
    assert generate.main(["--adapter", str(adapter), "--prompt", "Name a bird.", *flags]) == 0
    ids = prompt_ids(get_template("alpaca"), [Turn("user", "Name a bird.")], tokenizer)
    expected = generate_batch(tiny, tokenizer, [ids], max_new_tokens=12)[0]
    assert capsys.readouterr().out.strip() == expected.strip()
    # A run's folder will do, and a flag wins over what the folder says.
    assert (
        generate.main(["--adapter", str(adapter.parent), "--prompt", "x", "--template", "guanaco", *flags])
        == 0
    )
    expected = generate_batch(tiny, tokenizer, ["### Human: x### Assistant:"], max_new_tokens=12)[0]
    told = capsys.readouterr()
    assert (told.out.strip(), told.err) == (expected.strip(), "loading libraries …\n")


@pytest.mark.parametrize("template", ["alpaca", "guanaco", "falcon-instruct"])
def test_a_prompt_that_holds_the_template_already(
    template: str, adapter: Path, capsys: pytest.CaptureFixture[str], tiny: Any, tokenizer: Any
) -> None:
    whole = get_template(template).prompt([Turn("user", "Name a bird.")])
    words = ["--adapter", str(adapter), "--prompt", whole, "--max_new_tokens", "8"]
    assert generate.main([*words, "--template", template]) == 0
    assert f"which template {template} writes around it once more" in capsys.readouterr().err
    assert generate.main([*words, "--template", "none"]) == 0
    told = capsys.readouterr()
    expected = generate_batch(tiny, tokenizer, [whole], max_new_tokens=8)[0]
    assert (told.out.strip(), told.err) == (expected.strip(), "loading libraries …\n")


def test_a_merge_is_prompted_with_the_template_that_its_certificate_names(tmp_path, capsys):
    folder = shutil.copytree(tiny_path(), tmp_path / "merged")
    (folder / "certificate.json").write_text(json.dumps({"origin": {"template": "alpaca"}}))
    words = ["generate", "-m", str(folder), "--prompt", "Name a bird.", "--max_new_tokens", "8"]

    def answer(*more: str) -> tuple[str, bool]:
        assert cli.main([*words, *more]) == 0
        said = capsys.readouterr()
        return said.out, f"note: the template is alpaca, with which {folder} was trained" in said.err

    named, plain = answer("--template", "alpaca")[0], answer("--template", "none")
    assert answer() == (named, True)
    assert plain != (named, False)
    (folder / "certificate.json").write_text(json.dumps({"origin": ["alpaca"]}))
    assert answer() == plain


def test_a_base_of_other_content_than_it_was_trained_on_must_be_named(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(tiny_path(), tmp_path / "base")
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    record = json.loads((folder / "falcon_qlora.json").read_text())
    record |= {"base_model": str(base), "base_fingerprint": model_fingerprint(str(base))}
    (folder / "falcon_qlora.json").write_text(json.dumps(record))
    words = ["generate", "--adapter", str(folder), "--prompt", "Name a bird.", "--max_new_tokens", "2"]
    assert cli.main(words) == 0
    told = capsys.readouterr()
    assert f"note: the base model is {base}, which" in told.err
    # It may be another model by now, or the adapter's file was made up.
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2 * 1024 : -1024] = bytes(1024)
    weights.write_bytes(content)
    assert cli.main(words) == 2
    assert f"the local folder {str(base)!r} as its base model" in capsys.readouterr().err
    assert cli.main([*words, "-m", str(base)]) == 0
    assert capsys.readouterr().out


def test_command_compares_with_the_base_and_reads_prompts_from_a_file(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["Name a bird.", "Count to three."]))
    flags = ["--prompt_file", str(prompts), "--max_new_tokens", "3"]
    assert generate.main(["--adapter", str(adapter), "--compare", *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("base:") == out.count("adapter:") == 2
    assert out.index("> Name a bird.") < out.index("> Count to three.")


def test_command_without_adapter_goes_on_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The opposite of hot is\n"))
    assert generate.main(["-m", "tiny", "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().out.strip().startswith("cold")


def test_a_prompt_whose_answer_goes_beyond_the_models_positions_is_told(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both commands and from Python; a chat tells it once."""
    monkeypatch.setattr(
        "falcon_qlora.inference.generation.generate_stream", lambda *given, **settings: iter(["An owl."])
    )
    words = ["--adapter", str(adapter), "--template", "none", "--max_new_tokens"]
    ids = load_tokenizer("tiny")("bird " * 2000)["input_ids"]
    told = f"of {len(ids):,} tokens with up to {{}} new ones is beyond the 2,048 positions that the model was"
    for most, times in ((2048 - len(ids), 0), (2049 - len(ids), 1)):
        assert generate.main([*words, str(most), "--prompt", "bird " * 2000]) == 0
        assert capsys.readouterr().err.count(told.format(most)) == times
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Name a bird.\n{'bird ' * 2000}\nAnother!\n\n"))
    assert generate.main([*words, "256", "--chat"]) == 0
    assert capsys.readouterr().err.count("new ones is beyond the 2,048 positions") == 1
    model: Any = load_adapter(adapter, template="none", device="cpu")
    model.generate_text("bird " * 2000)
    assert told.format(256) in capsys.readouterr().out.replace("\n", " ")


def test_a_prompt_is_read_as_utf_8_whatever_the_locale(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python gives what a C locale cannot decode; and what is no text at all."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["\\ud800"]')
    words = ["generate", "-m", "tiny", "--max_new_tokens", "2"]
    assert cli.main([*words, "--prompt", "Gr\udcc3\udcb6\udcc3\udc9fe", "2"]) == 0
    assert capsys.readouterr().out.startswith("> Größe\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcff"))
    for more, where in (
        (["--prompt", "\udcff"], "--prompt"),
        (["--prompt_file", str(prompts)], f"--prompt_file {prompts}"),
        ([], "standard input"),
    ):
        assert cli.main([*words, *more]) == 2
        assert capsys.readouterr().err.endswith(f"error: {where}: not text in UTF-8\n")


def test_chat_keeps_what_was_said(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def spy(model: Any, tokenizer: Any, prompt: list[int], **settings: Any) -> Any:
        asked.append(prompt)
        return iter([" An", " owl."])

    monkeypatch.setattr("falcon_qlora.inference.generation.generate_stream", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO("Name a bird.\nAnother!\n\n"))
    assert generate.main(["--adapter", str(adapter), "--chat", "--template", "falcon-instruct"]) == 0
    assert capsys.readouterr().out == "An owl.\nAn owl.\n"
    text = load_tokenizer("tiny").decode(asked[1])
    assert text.endswith(
        "User: Name a bird.\n\nAssistant: An owl.<|endoftext|>\n\nUser: Another!\n\nAssistant:"
    )


def test_a_base_in_cpu_memory_answers_and_chats_as_one_on_the_device(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[HostCopy] = []
    real = HostCopy.__init__
    monkeypatch.setattr(HostCopy, "__init__", lambda self, *given: (made.append(self), real(self, *given))[1])

    def said(*words: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("Name a bird.\nAnother!\n\n"))
        assert generate.main(["--adapter", str(adapter), "--max_new_tokens", "8", *words]) == 0
        return capsys.readouterr().out

    for words in (["--chat"], ["--compare", "--prompt", "Name a bird.", "--temperature", "1"]):
        before = len(made)
        resident = said(*words)
        assert len(made) == before
        assert said(*words, "--offload_base") == resident != ""
        assert len(made) == before + 1


def test_a_base_that_does_not_fit_or_runs_out_is_told_to_be_kept_in_cpu_memory(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*_: Any, ways: list[str], **__: Any) -> Any:
        asked.append(ways)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    asked: list[list[str]] = []
    monkeypatch.setattr(load, "load_model", runs_out)
    words = ["generate", "--adapter", str(adapter), "--prompt", "x"]
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert told.endswith("Free memory on it, or take less: a smaller --max_new_tokens, --offload_base\n"), (
        told
    )
    assert cli.main([*words, "--offload_base"]) == 1
    assert "--offload_base" not in capsys.readouterr().err
    assert asked == [["--offload_base"], []]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adapter", "/nowhere"], "--adapter /nowhere: there is no such folder"),
        (["--chat", "--prompt", "x"], "--chat"),
        (["--compare"], "--adapter"),
        (["--temperature", "-1"], "--temperature"),
        (["--top_p", "0"], "--top_p"),
        (["--top_p", "0.9"], "--top_p does nothing with --temperature 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--prompt_file", "/nowhere.json"], "cannot be read"),
        (["--promt", "x"], "did you mean --prompt"),
    ],
)
def test_bad_flags_are_told_before_anything_is_loaded(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate.main(["-m", "tiny", *flags])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "must hold a JSON list of texts"),
        ('["a", 3]', "must hold"),
        ('["a", " "]', "number 2 is empty"),
    ],
)
def test_a_file_of_prompts_has_one_in_each_place(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(UserError, match=said):
        generate.main(["-m", "tiny", "--prompt_file", str(tmp_path / "prompts.json")])


def test_broken_adapter_settings_are_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        generate.main(["--adapter", str(tmp_path), "--prompt", "x"])


def test_a_chat_template_that_is_another_than_in_training_is_told(
    tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, text = copy.deepcopy(tokenizer), "{% for m in messages %}{{ m.content }}{% endfor %}"
    for recorded, now, told in (
        (text, text, False),
        (text, text + "!", True),
        ({"default": text, "tool_use": text}, text, True),
        (None, text, False),  # by a release that did not record it
    ):
        record = {"template": "tokenizer", "dataset_format": "chat"}
        record["template_fingerprint"] = template_fingerprint("tokenizer", recorded)
        tokenizer.chat_template = now
        configuration = parse(["--adapter", "a"], extra_arguments=generate.GenerateArguments)
        template = generate._template(configuration, record, tokenizer)
        assert template is not None
        assert template.prompt([Turn("user", "x")]) == "x" + now.removeprefix(text)
        note = "note: the tokenizer's chat template is not the one that --adapter a was trained with\n"
        assert capsys.readouterr().err == note * told
