"""Everything that a row says is trained as Transformers and TRL would, or named, or refused."""

from __future__ import annotations

import datetime
import importlib.util
import json
import types
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.account import Account
from falcon_qlora.data.files import iterate_rows
from falcon_qlora.data.formats import load_template, recognise
from falcon_qlora.data.json_rows import columns_of
from falcon_qlora.data.rendering import render
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.special_text import SpecialText
from falcon_qlora.data.templates import LACKING, Template, get_template
from falcon_qlora.data.tokens import Document, Encoder, Status
from tests.small_tokenizer import END, small_tokenizer

_ABOVE = [folder / "shared" / "data" for folder in Path(__file__).resolve().parents]
SHARED = next((folder for folder in _ABOVE if folder.is_dir()), _ABOVE[0])

TRL_TEMPLATES = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"

# With marks, tools and reasoning, as TRL's templates for training have them.
CHATML = """
{%- if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{%- if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}
{{- eos_token }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ASKED = {"role": "user", "content": "Weather in Oslo?"}


def tokenizers() -> list[Any]:
    found = [small_tokenizer()]
    if (SHARED / "falcon-tokenizer").is_dir():
        from transformers import AutoTokenizer

        found.append(AutoTokenizer.from_pretrained(SHARED / "falcon-tokenizer"))
    return found


def with_template(tokenizer: Any, chat_template: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


def encode(rows: list[list[Any]], tokenizer: Any, account: Account | None = None) -> list[Document]:
    encoder = Encoder(
        tokenizer=tokenizer, train_on="answers", append_end_token=True, overlong="split", max_length=9999
    )
    return [documents[0] for documents in encoder.documents(rows, account)]


def format_of(row: dict[str, Any], **columns: str) -> str:
    """As it is recognised among others."""
    settings = RowSettings(dataset_name=[], max_length=9, columns=columns)
    return settings.recognise(columns_of([{"other": 1}, row]), "rows")[0]


def written(
    row: dict[str, Any], template: Template | str = "guanaco", *, account: Account | None = None
) -> str:
    """The row's text as it is recognised, with answers in brackets."""
    if isinstance(template, str):
        template = get_template(template)
    segments = render(row, format_of(row), template, account=account, place="f.jsonl:3")
    return "".join(f"[{s.text}]" if s.train else s.text for s in segments)


# As Transformers and TRL


# Without separators of records, which Transformers' own mask leaves out where an answer begins with one.
MESSAGES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x1c\x1d\x1e\x1f\x85"),
    min_size=1,
    max_size=40,
) | st.sampled_from(
    [
        "🦅🇳🇴 é",
        "你好，世界",
        "مرحبا بالعالم",
        "def f():\n\n    return 1\n",
        "  \n\n x \t\n",
        "1234567",
        "''\"<<>>",
    ]
)


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    text = MESSAGES.filter(lambda each: bool(each.strip()))
    messages: list[dict[str, Any]]
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        if draw(st.booleans()):
            call = {"type": "function", "function": {"name": "f", "arguments": {"x": draw(text)}}}
            called: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call]}
            messages.append(called)
            messages.append({"role": "tool", "content": draw(text)})
        answer = {"role": "assistant", "content": draw(text)}
        messages.append(answer | ({"reasoning_content": draw(text)} if draw(st.booleans()) else {}))
    return {"messages": messages} | ({"tools": TOOLS} if draw(st.booleans()) else {})


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda each: str(len(each)))
@pytest.mark.parametrize("chat_template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_ids_and_masks_are_those_of_transformers(tokenizer: Any, chat_template: str) -> None:
    marked = with_template(tokenizer, CHATML)
    mine = with_template(tokenizer, chat_template)
    template, special = load_template("auto", "chat", mine), SpecialText(mine)

    @given(chats())
    @settings(max_examples=40, deadline=None, derandomize=True)
    def check(row: dict[str, Any]) -> None:
        said = json.dumps(row, ensure_ascii=False)
        account = Account()
        segments = render(row, "chat", template, special=special, account=account)
        (document,) = encode([segments], mine, account)
        if any(token in said for token in mine.all_special_tokens):
            theirs = marked.apply_chat_template(
                row["messages"], tools=row.get("tools"), sanitize_control_tokens=True
            )
            assert account.rows["special_text"] == 1
        else:
            theirs = marked.apply_chat_template(
                row["messages"], tools=row.get("tools"), return_assistant_tokens_mask=True
            )
            if not account.rows["joined"]:
                assert document.mask.tolist() == theirs["assistant_masks"]
        if not account.rows["joined"]:
            assert document.input_ids.tolist() == theirs["input_ids"]
        assert account == Account(rows=account.rows)

    check()


@pytest.mark.parametrize("published", ["phi3_training", "phi3_5_training"])
def test_an_answer_in_several_marks_is_trained_as_transformers_does(published: str) -> None:
    mine = with_template(small_tokenizer(), (TRL_TEMPLATES / f"{published}.jinja").read_text())
    template = load_template("auto", "chat", mine)
    for messages in (TURNS, TURNS * 2):
        (document,) = encode([render({"messages": messages}, "chat", template)], mine)
        theirs = mine.apply_chat_template(messages, return_assistant_tokens_mask=True)
        learned = [i for i, target in zip(document.input_ids, document.mask, strict=True) if target]
        wanted = [i for i, m in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if m]
        # The end token follows every answer here, also those after which the template writes none.
        others = [i for i in document.input_ids.tolist() if i != mine.eos_token_id]
        assert others == [i for i in theirs["input_ids"] if i != mine.eos_token_id]
        assert [i for i in learned if i != mine.eos_token_id] == [i for i in wanted if i != mine.eos_token_id]
        assert learned.count(mine.eos_token_id) == len(messages) // 2


def test_prompts_and_completions_are_tokenized_as_trl_does() -> None:
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": "Add 1 and 2.\n", "completion": "3"},
        {"prompt": "Name a bird. 🦅 ", "completion": "鳥 طائر\n\n  x = 1\n"},
        {"prompt": "Which planet is red?", "completion": " Mars."},
    ]
    if (SHARED / "gsm8k_train.json").is_file():
        gsm8k = json.loads((SHARED / "gsm8k_train.json").read_text())[:100]
        rows += [{"prompt": f"{row['instruction']}\n", "completion": row["output"]} for row in gsm8k]
    for tokenizer in tokenizers():
        trainer = types.SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
        theirs = SFTTrainer._prepare_dataset(
            trainer,  # type: ignore[arg-type]
            datasets.Dataset.from_list(rows),
            tokenizer,
            SFTConfig(max_length=None, report_to="none", use_cpu=True, bf16=False),
            packing=False,
            formatting_func=None,
            dataset_name="train",
        )
        template = get_template("none")
        joined = 0
        for row, expected in zip(rows, theirs, strict=True):
            account = Account()
            (mine,) = encode([render(row, "prompt_completion", template)], tokenizer, account)
            joined += account.rows["joined"]
            if not account.rows["joined"]:
                assert mine.input_ids.tolist() == expected["input_ids"]
                assert mine.mask.tolist() == [int(label != -100) for label in expected["labels"]]
        assert joined <= len(rows) // 10


def qwen3(end: str) -> str:
    """The published template, with another end token: it writes earlier answers otherwise than the last."""
    return (TRL_TEMPLATES / "qwen3.jinja").read_text().replace("<|im_end|>", end)


@pytest.mark.parametrize("chat_template", [CHATML, UNMARKED, "qwen3"], ids=["marked", "unmarked", "qwen3"])
def test_prompts_and_completions_of_messages_are_trained_as_trl_does(chat_template: str) -> None:
    from trl import SFTConfig, SFTTrainer

    long = [{"role": "system", "content": PIRATE}, *TURNS, {"role": "user", "content": "And blue? 🪐"}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    rows: list[dict[str, Any]] = [
        {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
        {"prompt": long, "completion": [{"role": "assistant", "content": "Neptune.\n\n```\nx\n```\n"}]},
        {"prompt": long, "completion": [{"role": "assistant", "content": "", "tool_calls": [call]}]},
    ]
    for tokenizer in tokenizers():
        own = qwen3(tokenizer.eos_token) if chat_template == "qwen3" else chat_template
        mine, theirs_has = with_template(tokenizer, own), UNMARKED if own == CHATML else own
        trainer = types.SimpleNamespace(_tokenizer=mine, chat_template=theirs_has, completion_only_loss=True)
        template, special = load_template("auto", "chat_completion", mine), SpecialText(mine)
        assert template.name == "tokenizer"
        # The last apart, or the others would have tool calls of null.
        theirs = [
            expected
            for some in (rows[:2], rows[2:])
            for expected in SFTTrainer._prepare_dataset(
                trainer,  # type: ignore[arg-type]
                datasets.Dataset.from_list(some),
                mine,
                SFTConfig(max_length=None, report_to="none", use_cpu=True, bf16=False),
                packing=False,
                formatting_func=None,
                dataset_name="train",
            )
        ]
        for row, expected in zip(rows, theirs, strict=True):
            account = Account()
            segments = render(row, format_of(row), template, special=special, account=account)
            (document,) = encode([segments], mine, account)
            assert account == Account(rows=account.rows)
            assert not account.rows["joined"]
            assert document.input_ids.tolist() == expected["input_ids"]
            # Of what follows the end token nothing is learned here.
            learned = [label != -100 for label in expected["labels"]]
            end = len(learned) - 1 - document.input_ids.tolist()[::-1].index(mine.eos_token_id)
            assert mine.decode(document.input_ids[end + 1 :]).strip() == ""
            assert document.mask.tolist() == [each and at <= end for at, each in enumerate(learned)]


def test_prompts_and_completions_of_messages_are_told_from_texts() -> None:
    assert format_of({"prompt": TURNS[:1], "completion": TURNS[1:]}) == "chat_completion"
    assert format_of({"prompt": "a", "completion": "b"}) == "prompt_completion"
    assert format_of({"q": TURNS[:1], "a": TURNS[1:]}, prompt="q", completion="a") == "chat_completion"
    for row, column in (
        ({"prompt": "a", "completion": TURNS[1:]}, "completion"),
        ({"prompt": TURNS, "completion": "b"}, "prompt"),
    ):
        with pytest.raises(UserError, match=rf"f.jsonl:3: column {column}: expected text, found an array"):
            written(row)
    # Rows that differ from the first ones.
    with pytest.raises(
        UserError, match=r"f.jsonl:3: column prompt: expected a list of messages.*; found the text 'a'. If"
    ):
        render(
            {"prompt": "a", "completion": TURNS},
            "chat_completion",
            get_template("guanaco"),
            place="f.jsonl:3",
        )


def test_the_end_token_is_learned_and_nothing_after_it() -> None:
    answer = "{% if m.role == 'assistant' %}ANSWER{% else %}{{ m.content + eos_token + '\\n' }}{% endif %}"
    whole = "{% for m in messages %}{{ m.role + ':\\n' }}" + answer + "{% endfor %}"
    whole += "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    for said in (
        "{{ m.content + eos_token + '\\n' }}",
        "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token + '\\n' }}",
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '\\n' + eos_token + '\\n' }}",
        "{% generation %}{{ m.content + eos_token + '\\n' }}{% endgeneration %}",
    ):
        chat_template = whole.replace("ANSWER", said)
        tokenizer = with_template(small_tokenizer(), chat_template)
        messages = [{"role": role, "content": "the"} for role in ("user", "assistant") * 2]
        segments = render({"messages": messages}, "chat", load_template("tokenizer", "chat", tokenizer))
        (document,) = encode([segments], tokenizer)
        assert document.input_ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
        trained = [i for i, target in zip(document.input_ids, document.mask, strict=True) if target]
        assert tokenizer.decode(trained) == f"the{END}the{END}"

    for row, form in (
        ({"prompt": "the", "completion": f" the{END}\n"}, "prompt_completion"),
        ({"text": f"the the{END} \n"}, "text"),
    ):
        special = SpecialText(small_tokenizer())
        (document,) = encode([render(row, form, get_template("none"), special=special)], small_tokenizer())
        assert small_tokenizer().decode(document.input_ids) == f"the the{END}"


def test_a_system_message_later_on_is_written_as_one_or_refused() -> None:
    turns = [ASKED, {"role": "system", "content": "Be rude."}, {"role": "assistant", "content": "No."}]
    text = "".join(each.text for each in render({"messages": turns}, "chat", get_template("falcon-instruct")))
    # As the published template has every message but a first one of the system.
    assert text == "\n\nUser: Weather in Oslo?\n\nSystem: Be rude.\n\nAssistant: No."
    for name in ("guanaco", "alpaca"):
        with pytest.raises(UserError, match=r"cannot write a system message after the first"):
            render({"messages": turns}, "chat", get_template(name))


def test_a_system_prompt_beside_messages_opens_them_also_where_it_comes_again_later() -> None:
    again = {"messages": [*TURNS, {"role": "system", "content": PIRATE}, *TURNS], "system": PIRATE}
    text = written(again, "falcon-instruct")
    assert text.startswith(PIRATE)
    assert text.count(PIRATE) == 2


def test_tools_and_calls_out_of_a_table_are_those_that_were_put_in(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {key: 1}}}],
                },
            ],
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {key: {"type": "number"}}}}
            ],
        }
        for key in ("city", "content")
    ]
    rows[1]["tools"][0]["strict"] = True
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    template = load_template("auto", "chat", SHOWS)
    read = [row for _, row in iterate_rows(tmp_path / "rows.parquet")]
    assert [written(row, template) for row in read] == [written(row, template) for row in rows]


def test_which_template_auto_means() -> None:
    plain, own = (
        small_tokenizer(),
        with_template(small_tokenizer(), {"default": CHATML, "tool_use": UNMARKED}),
    )
    assert load_template("auto", "chat", plain).name == "falcon-instruct"
    assert load_template("auto", "sharegpt", own).name == "tokenizer"
    assert load_template("auto", "alpaca", own).name == "alpaca"
    assert load_template("format", "chat", own).name == "falcon-instruct"
    with pytest.raises(UserError, match="no chat template of its own"):
        load_template("tokenizer", "chat", plain)
    other = with_template(small_tokenizer(), {"default": "{{ messages }}", "tool_use": CHATML})
    row = {"messages": [ASKED, {"role": "assistant", "content": "Cold."}], "tools": TOOLS}
    assert "[Cold." in written(row, load_template("auto", "chat", other))


# Special tokens in what users say


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda each: str(len(each)))
def test_only_templates_make_special_tokens(tokenizer: Any) -> None:
    end = tokenizer.eos_token
    special, account = SpecialText(tokenizer), Account()
    row = {"instruction": f"What is {end}?", "output": f"{end} ends a text."}
    segments = render(row, "alpaca", get_template("alpaca"), special=special, account=account)
    (document,) = encode([segments], tokenizer)
    assert document.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert (document.input_ids[-1], document.mask[-1]) == (tokenizer.eos_token_id, 1)
    assert tokenizer.decode(document.input_ids).count(end) == 3
    assert account.rows["special_text"] == 1
    plain = tokenizer(end, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert plain == document.input_ids[document.mask == 1][: len(plain)].tolist()
    # An answer's own end token at its end is the end token, and rows without a template are as they say.
    spelled = {"instruction": "a", "output": f"the{end}"}
    (document,) = encode([render(spelled, "alpaca", get_template("alpaca"), special=special)], tokenizer)
    assert document.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    raw = render({"text": f"a{end}b"}, "text", get_template("none"), special=special, account=account)
    assert encode([raw], tokenizer)[0].input_ids.tolist().count(tokenizer.eos_token_id) == 2
    assert account.rows["special_tokens"] == 1


def test_a_template_that_escapes_special_text_is_refused() -> None:
    tokenizer = with_template(
        small_tokenizer(), "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}"
    )
    row = {"messages": [{"role": "user", "content": END}, {"role": "assistant", "content": "a"}]}
    template = load_template("tokenizer", "chat", tokenizer)
    with pytest.raises(UserError, match=r"f.jsonl:3: .*changes text that looks like special tokens"):
        render(row, "chat", template, special=SpecialText(tokenizer), place="f.jsonl:3")


# What rows look like in the wild


PIRATE, RED, MARS = "Answer like a pirate.", "Which planet is red?", "Arr, Mars."
TURNS = [{"role": "user", "content": RED}, {"role": "assistant", "content": MARS}]
PARTS = [{"type": "text", "text": RED[:5]}, {"type": "text", "text": RED[5:]}]
SHARED_TURNS = [{"from": "human", "value": RED}, {"from": "gpt", "value": MARS}]


@pytest.mark.parametrize(
    "row",
    [
        {"system": PIRATE, "messages": TURNS},
        {"system_prompt": PIRATE, "messages": TURNS},
        {"system": PIRATE, "messages": [{"role": "System", "content": PIRATE}, *TURNS]},
        {"system": PIRATE, "system_prompt": PIRATE, "messages": TURNS},
        {"system": PIRATE, "conversations": SHARED_TURNS},
        {"conversations": [{"role": "developer", "content": PIRATE}, *TURNS]},
        {"messages": [{"from": "system", "value": PIRATE}, *SHARED_TURNS]},
        {"system": PIRATE, "conversations": [SHARED_TURNS[0], {"from": "bard", "value": MARS}]},
        {"system": PIRATE, "messages": [{"from": "human", "value": RED}, {"role": "AI", "content": MARS}]},
        {"messages": [{"role": "system", "content": PIRATE}, SHARED_TURNS[0], TURNS[1]]},
        {"system": PIRATE, "instruction": RED, "input": "", "output": MARS, "history": []},
        {"system": PIRATE, "instruction": RED, "input": None, "output": MARS},
        {"system": PIRATE, "mask": "User", "conversations": SHARED_TURNS},
        # As a table of text has them.
        {"system": PIRATE, "messages": json.dumps(TURNS)},
        {"system": PIRATE, "conversations": json.dumps(SHARED_TURNS, indent=1)},
        {"system": PIRATE, "instruction": RED, "output": MARS, "history": "[]"},
        {"prompt": [{"role": "system", "content": PIRATE}, TURNS[0]], "completion": [TURNS[1]]},
        {"system": PIRATE, "prompt": [{"from": "human", "value": RED}], "completion": [TURNS[1]]},
        # Said before the answers, and again with them.
        {"system": PIRATE, "prompt": TURNS[:1], "messages": TURNS},
        # Parts, one after another as chat templates write them.
        {"system": PIRATE, "messages": [{"role": "user", "content": PARTS}, TURNS[1]]},
        {
            "system": PIRATE,
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": RED}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": MARS}], "tool_calls": None},
            ],
        },
        {"system": PIRATE, "instruction": RED, "output": MARS, "history": ""},
    ],
)
def test_the_same_conversation_however_it_is_spelled(row: dict[str, Any]) -> None:
    account = Account()
    assert written(row, account=account) == f"{PIRATE}\n### Human: {RED}### Assistant:[ {MARS}]"
    assert account.told("guanaco", "answers") == []


def test_history_is_learned_before_the_question() -> None:
    row = {"instruction": "And blue?", "output": "Neptune.", "history": [[RED, MARS], ("Why?", "Iron.")]}
    assert written(row) == (
        f"### Human: {RED}### Assistant:[ {MARS}]### Human: Why?### Assistant:[ Iron.]"
        "### Human: And blue?### Assistant:[ Neptune.]"
    )


@pytest.mark.parametrize(
    "said",
    [{"weight": 0}, {"train": False}, {"weight": 0.0, "loss": False}, {"trainable": False, "loss": 2.5}],
)
def test_answers_that_are_not_to_be_learned_are_context(said: dict[str, Any]) -> None:
    row = {"messages": [TURNS[0], {**TURNS[1], **said}, TURNS[0], {**TURNS[1], "train": True, "weight": 1}]}
    assert written(row).count(f" {MARS}") == 2
    assert written(row).count(f"[ {MARS}]") == 1


def test_nemos_mask_names_who_is_not_learned() -> None:
    turns = [*SHARED_TURNS, *SHARED_TURNS]
    assert written({"mask": "Assistant", "conversations": turns}).count("[") == 0
    account = Account()
    assert written({"mask": "System", "conversations": turns}, account=account).count("[") == 2
    assert (account.columns, [*account.message_keys.values()]) == ({}, [1])  # not to be had
    with pytest.raises(
        UserError, match=r"f.jsonl:3: column mask: unknown role 'Usr' \(did you mean user\?\)"
    ):
        written({"mask": "Usr", "conversations": turns})


SHOWS = with_template(small_tokenizer(), CHATML)


def test_tools_calls_and_reasoning_reach_the_template() -> None:
    template = load_template("auto", "chat", SHOWS)
    called = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(each) for each in TOOLS]):
        text = written({"messages": [ASKED, answer], "tools": tools}, template)
        assert json.dumps(TOOLS[0]) in text
        assert f"[{called}{END}]" in text
    for name in ("tool", "function", "observation"):
        text = written({"messages": [ASKED, answer, {"role": name, "content": "3"}, TURNS[1]]}, template)
        assert "<|im_start|>tool\n3<|im_end|>" in text
    sharegpt = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Cold."},
    ]
    assert f"[{called}{END}]" in written({"conversations": sharegpt}, template)
    for more in ({}, {"tool_calls": []}):
        old = {"role": "assistant", "content": None, "function_call": CALL["function"], **more}
        assert f"[{called}{END}]" in written({"messages": [ASKED, old]}, template)
    account = Account()
    both = {**answer, "function_call": {"name": "other", "arguments": "{}"}}
    assert f"[{called}{END}]" in written({"messages": [ASKED, both]}, template, account=account)
    assert account.message_keys["function_call"] == 1
    thought = {"role": "assistant", "reasoning_content": "I add.", "content": "4"}
    assert f"[<think>I add.</think>4{END}]" in written({"messages": [ASKED, thought]}, template)


@pytest.mark.parametrize(
    ("published", "takes"),
    [
        *(("qwen2_5", "objects"), ("llama3_1", "objects"), ("qwen3_5_nothink", "objects")),
        *(("gptoss", "objects"), ("gemma4", "objects"), ("qwen3", "text"), ("joins", "text")),
    ],
)
def test_arguments_of_calls_reach_a_published_template_as_it_takes_them(published: str, takes: str) -> None:
    joins = UNMARKED.replace(
        "'<call>' + call.function | tojson", "call.function.name + call.function.arguments"
    )
    text = joins if published == "joins" else (TRL_TEMPLATES / f"{published}.jinja").read_text()
    tokenizer = with_template(small_tokenizer(), text)
    template = load_template("auto", "chat", tokenizer)

    def chat(arguments: Any) -> list[Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]

    said, object_ = '{"city":"Oslo\\u00e9", "n": 2}', {"city": "Osloé", "n": 2}
    account = Account()
    mine = "".join(each.text for each in render({"messages": chat(said)}, "chat", template, account=account))
    theirs = tokenizer.apply_chat_template(chat(object_ if takes == "objects" else said), tokenize=False)
    assert mine == theirs
    assert account.rows["arguments"] == (takes == "objects")
    if takes == "objects":
        assert '\\"' not in mine
    if published != "joins":
        given = "".join(each.text for each in render({"messages": chat(object_)}, "chat", template))
        assert given == tokenizer.apply_chat_template(chat(object_), tokenize=False)


def test_arguments_that_no_template_can_read_and_numbers_that_it_respells_are_counted() -> None:
    template = load_template("auto", "chat", SHOWS)

    def counted(arguments: Any) -> Counter[str]:
        account = Account()
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        written({"messages": [ASKED, answer]}, template, account=account)
        return account.rows

    assert counted({"x": 1}) == {}
    assert counted('{"x": 1.5}') == {"arguments": 1}
    assert counted('{"x": 1.50}') == {"arguments": 1, "respelled": 1}
    for broken in ('{"x":', "Oslo", "[1]", "", '{"x": 1, "x": 2}', '{"x": 1e999}'):
        assert counted(broken) == {"broken_arguments": 1}, broken


@pytest.mark.parametrize(
    "text", ["12.50", "1e5", "1E+2", "-0", "-0.0", "0.10", "7", "1" * 40, "1.000000000000000000001"]
)
def test_a_number_is_trained_as_the_file_spells_it(text: str, tmp_path: Path) -> None:
    template = get_template("none")
    for name, content in (
        ("a.jsonl", f'{{"prompt": "a", "completion": {text}}}\n'),
        ("a.json", f'[{{"prompt": "a", "completion": {text}}}]'),
        ("a.csv", f"prompt,completion\na,{text}\n"),
    ):
        (tmp_path / name).write_text(content)
        ((_, row),) = iterate_rows(tmp_path / name)
        account = Account()
        assert render(row, "prompt_completion", template, account=account)[-1].text == text
        assert account == Account()


def test_numbers_of_a_table_are_written_as_short_as_they_can_be_and_counted(tmp_path: Path) -> None:
    numbers = [12.5, 0.1, 1e-9, None]
    for kind, count in ((pa.float64(), 3), (pa.float32(), 3), (pa.string(), 0)):
        column = pa.array(numbers if count else ["12.5", "0.1", "1e-09", None], kind)
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        account = Account()
        rows = [row for _, row in iterate_rows(tmp_path / "a.parquet")]
        segments = [render(row, "text", get_template("none"), account=account) for row in rows]
        assert [each[0].text for each in segments] == ["12.5", "0.1", "1e-09", ""]
        assert account.rows["unspelled"] == count
    account = Account()
    render({"text": datetime.date(2020, 1, 2)}, "text", get_template("none"), account=account)
    assert account.rows["unspelled"] == 1


@pytest.mark.parametrize(
    ("messages", "more", "what"),
    [
        ([ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}, "tool_calls"),
        ([ASKED, {"role": "assistant", "content": "Hm.", "tool_calls": [CALL]}, *TURNS], {}, "tool_calls"),
        ([ASKED, {"role": "assistant", "reasoning_content": "r", "content": "4"}], {}, "reasoning_content"),
        (TURNS, {"tools": TOOLS}, "tools"),
        ([ASKED, {"role": "tool", "content": "3 degrees"}, TURNS[1]], {}, "tool"),
    ],
)
@pytest.mark.parametrize("template", ["alpaca", "falcon-instruct", "guanaco", "jinja"])
def test_a_template_that_leaves_something_out_is_refused(
    messages: list[Any], more: dict[str, Any], what: str, template: str
) -> None:
    text = (
        "{% for m in messages if m.role != 'tool' %}{{ m.role + ': ' + (m.content or '') }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chosen = (
        load_template("tokenizer", "chat", with_template(small_tokenizer(), text))
        if template == "jinja"
        else get_template(template)
    )
    with pytest.raises(UserError, match=rf"f.jsonl:3: .*cannot write .*{what}.*--template tokenizer"):
        written({"messages": messages, **more}, chosen)


@pytest.mark.parametrize("marked", ["assistant", "user"])
def test_marks_that_leave_the_answer_out_are_refused(marked: str) -> None:
    # Around nothing, beside the answer; and around the question.
    text = (
        "{% for m in messages %}{% if m.role == '" + marked + "' %}{% generation %}{{ m.text }}"
        "{{ m.content if m.role == 'user' }}{% endgeneration %}{% endif %}{{ m.content }}{% endfor %}"
    )
    template = load_template("tokenizer", "chat", with_template(small_tokenizer(), text))
    with pytest.raises(UserError, match=r"generation %} leaves out the text of message 2 \(assistant\)"):
        written({"messages": TURNS}, template)


def test_reasoning_that_a_template_writes_of_the_last_answer_alone_is_named() -> None:
    text = CHATML.replace("if m.reasoning_content", "if m.reasoning_content and loop.last")
    thought = {"role": "assistant", "reasoning_content": "I add.", "content": "4"}
    account = Account()
    template = load_template("auto", "chat", with_template(small_tokenizer(), text))
    written({"messages": [ASKED, thought, ASKED, TURNS[1]]}, template, account=account)
    assert account.message_keys == {"reasoning_content": 1}


def test_a_template_that_rewrites_earlier_answers_can_train_the_last() -> None:
    mine = with_template(small_tokenizer(), qwen3(END))
    template = load_template("auto", "chat", mine)
    with pytest.raises(UserError, match=r'answer 1 .* more messages follow\. .* "train": false.*generation'):
        written({"messages": TURNS * 2}, template)
    messages = [TURNS[0], {**TURNS[1], "train": False}, *TURNS]
    segments = render({"messages": messages}, "chat", template)
    prompt = mine.apply_chat_template(TURNS * 2)["input_ids"]
    (document,) = encode([segments], mine)
    assert document.input_ids.tolist() == prompt
    asked = mine.apply_chat_template([*TURNS, TURNS[0]], add_generation_prompt=True)["input_ids"]
    assert document.mask.tolist().index(1) == len(asked)
    thinks = "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    text = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}" + thinks
    other = load_template("auto", "chat", with_template(small_tokenizer(), text))
    with pytest.raises(
        UserError, match=r"answer 1 .* not what add_generation_prompt writes.*{% generation %}"
    ):
        written({"messages": TURNS}, other)


def test_null_is_not_trained_as_a_word() -> None:
    text = CHATML.replace("{%- if m.content %}{{ m.content }}{% endif %}", "{{ m.content }}")
    template = load_template("auto", "chat", with_template(small_tokenizer(), text))
    assert "None" not in written(
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, template
    )


# What is lacking


@pytest.mark.parametrize(
    ("row", "row_format", "lacks"),
    [
        ({"instruction": "Add.", "response": "2"}, "alpaca", ["output"]),
        ({"instruction": None, "output": "2"}, "alpaca", ["instruction"]),
        ({"question": "a", "answer": "b"}, "alpaca", ["instruction", "output"]),
        ({"prompt": "a", "completion": None}, "prompt_completion", ["completion"]),
        ({"prompt": "a"}, "prompt_completion", ["completion"]),
        ({"text": None}, "text", ["text"]),
        ({"messages": None}, "chat", ["messages"]),
        ({"messages": []}, "chat", ["a message (messages is an empty list)"]),
        ({"messages": [ASKED]}, "chat", ["a message of the assistant"]),
        ({"conversations": "[]"}, "sharegpt", ["a message (conversations is an empty list)"]),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "chat", ["text of a message"]),
        ({"messages": [{"role": "user", "content": None}, TURNS[1]]}, "chat", ["text of a message"]),
        ({"instruction": "a", "output": "b", "history": [["a", None]]}, "alpaca", ["text of history"]),
        ({"prompt": TURNS[:1], "completion": None}, "chat_completion", ["completion"]),
    ],
)
def test_rows_that_lack_something_are_counted_apart(
    row: dict[str, Any], row_format: str, lacks: list[str]
) -> None:
    account = Account()
    segments = render(row, row_format, get_template("guanaco"), account=account)
    assert segments == LACKING
    assert encode([segments], small_tokenizer(), account)[0].status == Status.MISSING
    assert account.dropped == {f"lacks {', '.join(lacks)}": 1}
    assert set(account.columns) == {"response", "question", "answer"} & set(row)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "text": "a"}, r"it has no text: .* an object with role, text"),
        ({"from": "human"}, r"it has no text"),
        ({"content": "a"}, r"expected \{role, content\} or \{from, value\}"),
        ({"role": "user", "content": "a", "weight": 0.5}, r"weight is 0.5; it can be 0 or 1"),
        ({"role": "assistant", "content": "a", "train": "no"}, r"train is no;"),
        ({"role": "assistant", "content": "a", "weight": ""}, r"weight is empty;"),
        ({"role": "assistant", "tool_calls": ["f(x)"]}, r"tool_calls: 1: expected an object, or its JSON"),
        ({"role": "assistant", "tool_calls": [CALL, None]}, r"tool_calls: 2: expected an object, found null"),
        (
            {"role": "assistant", "content": "a", "weight": 1, "train": False},
            r"weight is 1 and train is false: one says to train the message, one not to; leave one",
        ),
        (
            {"from": "function_call", "value": "call weather"},
            r"a function call: expected a function call, or its JSON text.*; found the text 'call weather'",
        ),
        ({"from": "function_call", "value": ""}, r"a function call: .*; found the text ''\."),
        ({"from": "function_call", "value": '{"city": 1}'}, r"expected a function call \{name, arguments\}"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_with_their_place(message: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"^f.jsonl:3: column messages: message 1: {said}"):
        written({"messages": [message]})


def test_preferences_are_not_trained_as_answers() -> None:
    for found in (
        ["chosen", "rejected"],
        ["prompt", "chosen", "rejected"],
        ["messages", "chosen", "rejected"],
        ["prompt", "Chosen", "Rejected"],
        ["prompt", "chosen_response", "rejected_response"],
        ["prompt", "accepted", "rejected"],
        ["prompt", "completion", "rejected"],
    ):
        with pytest.raises(
            UserError, match=r"pairs of a chosen and a rejected answer.*--completion_col"
        ) as error:
            recognise(found, columns={})
        assert f"--messages_column {found[-2]} where" in str(error.value)
    assert recognise(["prompt", "completion", "rejected_by"], columns={})[0] == "prompt_completion"
    with pytest.raises(
        UserError, match=r"answers with a label .* as KTO's good and bad ones.*completion where"
    ):
        recognise(["completion", "label"], arrays=["completion"], columns={})
    columns = {"completion": "chosen"}
    assert recognise(["prompt", "chosen", "rejected"], columns=columns) == ("prompt_completion", columns)
    account = Account()
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    template = get_template("none")
    assert render(row, "prompt_completion", template, columns=columns, account=account)[-1].text == "b"
    assert account.columns == {"rejected": 1}
    said = {"messages": [ASKED, {"role": "assistant", "content": "Rain."}]}
    for row, form in (
        *(
            ({"prompt": "a", "completion": "b", "label": label}, "none")
            for label in (True, "False", 0, 1.0, -1, "Bad ")
        ),
        (said | {"label": False}, "falcon-instruct"),
        (said | {"kto_tag": True}, "falcon-instruct"),
    ):
        with pytest.raises(UserError, match=r"f.jsonl:3: column (label|kto_tag) is .*: rows of KTO"):
            written(row, form)
    # TRL's pairs of messages: what was asked stands before the chosen ones.
    row = {"prompt": [ASKED], "chosen": [said["messages"][1]], "rejected": []}
    segments = render(row, "chat", get_template("falcon-instruct"), columns={"messages": "chosen"})
    assert "".join(each.text for each in segments) == "\n\nUser: Weather in Oslo?\n\nAssistant: Rain."
    assert written({"prompt": "a", "completion": "b", "label": "maths"}, "none", account=account) == "a[b]"
    assert account.columns == {"rejected": 1, "label": 1}


# Nothing is left out without a word


NAMES = st.sampled_from(
    "id source instruction input output text system history prompt completion conversations weight".split()
)
VALUES = st.text("abcdefgh", min_size=5, max_size=9).map(lambda word: f"<{word}>")


@given(
    st.dictionaries(NAMES, VALUES, max_size=8),
    st.lists(
        st.dictionaries(
            st.sampled_from(["name", "id", "rating", "role", "content", "from", "value"]), VALUES
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["guanaco", "alpaca", "falcon-instruct", "shows"]),
    st.sampled_from(["list", "json", "parts", "pair"]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_value_is_written_named_or_refused(
    row: dict[str, Any], extras: list[Any], name: str, form: str
) -> None:
    messages = []
    for number, extra in enumerate(extras):
        role, said = (("user", "assistant")[number % 2], f"<{number}>")
        messages.append({**extra, "role": role, "content": said})
    spelled: dict[str, Any] = {"messages": messages}
    if form == "json":
        spelled = {"messages": json.dumps(messages)}
    elif form == "parts":
        parts = [[{"type": "text", "text": part} for part in each["content"]] for each in messages]
        spelled = {"messages": [each | {"content": said} for each, said in zip(messages, parts, strict=True)]}
    elif form == "pair":
        spelled = {"prompt": messages[:1], "completion": messages[1:]}
    row = {**row, **spelled, "tools": None, "mask": None}
    template = load_template("auto", "chat", SHOWS) if name == "shows" else get_template(name)
    account = Account()
    segments = render(row, "chat_completion" if form == "pair" else "chat", template, account=account)
    if segments in ([], LACKING):  # told as dropped
        return
    text = "".join(segment.text for segment in segments)
    for column, value in row.items():
        if isinstance(value, str) and column not in spelled:
            assert value in text or account.columns[column], column
    for message in messages:
        for key, value in message.items():
            assert key == "role" or value in text or account.message_keys[key], key


WORDS = st.text("abcdefgh", min_size=6, max_size=9)
OBJECTS = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(["id", "index", "note"]), WORDS),
        st.dictionaries(st.sampled_from(["strict", "description", "parameters"]), WORDS),
        WORDS,
        WORDS,
    ),
    min_size=1,
    max_size=3,
)
OF_CALLS = (
    "{{ m.tool_calls | tojson if m.tool_calls }}",
    "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}",
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
    "{{ m.tool_calls[0].function | tojson if m.tool_calls }}",
    "{{ m.tool_calls | length if m.tool_calls }}",
    "",
)
OF_TOOLS = (
    "{{ tools | tojson }}",
    "{% for t in tools %}{{ t.function | tojson }}{% endfor %}",
    "{% for t in tools %}{{ t.function.name }}{% endfor %}",
    "{{ tools[0] | tojson }}",
)


@given(OBJECTS, OBJECTS, st.sampled_from(OF_CALLS), st.sampled_from(OF_TOOLS))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_every_part_of_calls_and_tools_is_written_named_or_refused(
    calls: list[Any], tools: list[Any], of_calls: str, of_tools: str
) -> None:
    chat_template = (
        (
            "{% if tools %}" + of_tools + "{% endif %}{% for m in messages %}{{ m.role + ':' + m.content }}"
            "{% generation %}{% if m.role == 'assistant' %}"
            + of_calls
            + "{% endif %}{% endgeneration %}{% endfor %}"
        )
        .replace("{% generation %}", "")
        .replace("{% endgeneration %}", "")
    )
    chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    template = load_template("auto", "chat", with_template(small_tokenizer(), chat_template))
    made = [
        [
            more
            | {
                "function": {
                    **inner,
                    "name": name,
                    **({"arguments": {"x": said}} if is_call else {"z": said}),
                }
            }
            for more, inner, name, said in objects
        ]
        for objects, is_call in ((calls, True), (tools, False))
    ]
    row = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": made[0]}], "tools": made[1]}
    account = Account()
    try:
        text = "".join(each.text for each in render(row, "chat", template, account=account))
    except UserError as error:
        if "cannot write" not in str(error):
            raise
        return
    for objects, kind in zip(made, ("call", "tool"), strict=True):
        for each in objects:
            for key, value in {**each, **each["function"]}.items():
                said = value["x"] if key == "arguments" else value
                assert key == "function" or said in text or account.message_keys[f"{key} of a {kind}"]


def test_what_a_template_alters_is_counted() -> None:
    code = {"messages": [ASKED, {"role": "assistant", "content": "Sure:\n\n```\nx\n\n\ny\n```\n"}]}
    for template, altered in (("falcon-instruct", 1), ("guanaco", 0), ("alpaca", 0)):
        account = Account()
        written(code, template, account=account)
        assert account.rows["altered"] == altered
        # Line breaks that a template itself writes there do not hide that the message's own are gone.
        written({"messages": [{"role": "user", "content": "q\n\n"}, TURNS[-1]]}, template, account=account)
        assert account.rows["altered"] == 2 * altered
        assert account.rows["surrogates"] == 0
        assert written(
            {"messages": [ASKED, {"role": "assistant", "content": "a\ud800b"}]}, template, account=account
        )
        assert account.rows["surrogates"] == 1
    with pytest.raises(UserError, match="alpaca cannot write a system message after"):
        written({"messages": [*TURNS, {"role": "system", "content": PIRATE}, *TURNS]}, "alpaca")


def test_what_pandas_reads_as_missing_is_text_and_counted() -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    for word in {*STR_NA_VALUES, "inf", "-Infinity"} - {""}:
        account = Account()
        row = {"prompt": "Not a number?", "completion": word, "other": word}
        assert written(row, "none", account=account) == f"Not a number?[{word}]"
        assert account == Account(rows=Counter(like_missing=1), columns=Counter(other=1))
    assert account.told("none", "answers")[-1].startswith("1 row has a column whose text is NaN")
    account = Account()
    written({"prompt": "NaN?", "completion": "no", "other": "NaN"}, "none", account=account)
    assert not account.rows["like_missing"]


def test_messages_as_json_text_in_a_column_of_texts_are_counted() -> None:
    said = json.dumps(TURNS)
    for row, template in (
        ({"prompt": said, "completion": said}, "none"),
        ({"text": f" {said}"}, "none"),
        ({"instruction": "Give JSON.", "output": said, "tools": "[]", "history": "[]"}, "alpaca"),
    ):
        account = Account()
        written(row, template, account=account)
        (told,) = account.told(template, "answers")
        assert told == (
            "1 row has JSON of messages as a text; it is trained as that text (--messages_column names one "
            "of messages) (first: f.jsonl:3)"
        )
    account = Account()
    written({"messages": said}, account=account)
    written({"text": "[1]"}, "none", account=account)
    assert account == Account()


def test_names_of_columns_are_told_escaped_and_not_without_end() -> None:
    account = Account()
    for number in range(2000):
        render({"text": "a", f"key\x1b[31m{number}": 1}, "text", get_template("none"), account=account)
    (told,) = account.told("none", "answers")
    assert "\x1b" not in told
    assert len(account.columns) == 1001
    assert len(told) < 2000
    assert Account.from_plain(json.loads(json.dumps(account.plain()))) == account
