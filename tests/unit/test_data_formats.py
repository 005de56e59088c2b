"""What columns mean, and what text a row becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import quoted
from falcon_qlora.data.formats import COLUMNS, recognise, resolve_template
from falcon_qlora.data.json_rows import columns_of
from falcon_qlora.data.rendering import render
from falcon_qlora.data.templates import TEMPLATES, Segment, Template, Turn, get_template

CHAT = {
    "messages": [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": "Hello\n\nthere "},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See\n\nyou"},
    ]
}
SHAREGPT = {
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
        for m in CHAT["messages"]
    ]
}
OPENING = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
OPENING_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


def written(row: dict[str, Any], dataset_format: str, template: str) -> str:
    """The row's text with answers in brackets and `$` for the end token."""
    segments = render(row, dataset_format, get_template(template))
    return "".join((f"[{s.text}]" if s.train else s.text) + "$" * s.end for s in segments)


def test_formats_are_recognised_by_their_columns() -> None:
    def found(*columns: str, **renamed: str) -> str:
        return recognise(columns, columns=renamed)[0]

    assert found("text") == "text"
    assert found("id", "instruction", "output") == "alpaca"
    assert found("instruction", "input", "output", "text") == "alpaca"
    assert found("prompt", "completion") == "prompt_completion"
    assert found("messages", "prompt", "completion", "text") == "chat"
    assert found("conversations", "id") == "sharegpt"
    assert found("question", "answer", instruction="question", output="answer") == "alpaca"
    # A renamed column says what is meant.
    assert found("messages", "story", text="story") == "text"


def test_columns_that_fit_no_format_are_named_with_what_each_needs() -> None:
    with pytest.raises(UserError) as error:
        recognise(["question", "response"], columns={}, source="rows.csv")
    message = str(error.value)
    assert "rows.csv: the columns fit no format" in message
    assert "It has question, response" in message
    # All flags that are needed; with them it fits.
    assert message.endswith("for example --instruction_column question --output_column response.")
    renamed = {"instruction": "question", "output": "response"}
    assert recognise(["question", "response"], columns=renamed)[0] == "alpaca"
    for needed in (
        "messages: a list",
        "conversations: a list",
        "instruction and output",
        "prompt and completion",
    ):
        assert needed in message
    assert "--output_column response" in message


@pytest.mark.parametrize(
    ("found", "columns"),
    [
        (["Instruction", "Output"], {"instruction": "Instruction", "output": "Output"}),
        (["instruction", " output", "Input"], {"output": " output", "input": "Input"}),
        (["\ufeffPROMPT ", "Completion"], {"prompt": "\ufeffPROMPT ", "completion": "Completion"}),
        (["Question", "Answer", "id"], {"instruction": "Question", "output": "Answer"}),
        (["Text"], {"text": "Text"}),
        (["Messages"], {"messages": "Messages"}),
    ],
)
def test_columns_that_are_spelled_in_another_way_are_named_with_their_flags(
    found: list[str], columns: dict[str, str]
) -> None:
    with pytest.raises(UserError) as error:
        recognise(found, columns={})
    flags = " ".join(f"--{name}_column {quoted(given)}" for name, given in columns.items())
    assert str(error.value).endswith(f", for example {flags}.")
    assert recognise(found, columns=columns)[1] == columns
    for name in found:
        assert name in str(error.value) if name.isalpha() else repr(name) in str(error.value)
    with pytest.raises(UserError, match=r"there is no column output\. .*for example --output_column Output"):
        recognise(["instruction", "Output"], columns={}, dataset_format="alpaca")


def test_named_format_and_renamed_columns_must_be_there() -> None:
    with pytest.raises(UserError, match=r"format alpaca needs .*no column output"):
        recognise(["instruction", "text"], columns={}, dataset_format="alpaca")
    with pytest.raises(UserError, match=r"--text_column contnt: .*did you mean content\?"):
        recognise(["content"], columns={"text": "contnt"}, source="rows.csv")
    # Of several data sets one may have the standard name.
    assert recognise(["text"], columns={"text": "content"}) == ("text", {})
    assert recognise(["content"], columns={"text": "content"}) == ("text", {"text": "content"})
    with pytest.raises(UserError, match=r"no such format \(did you mean alpaca\?\)"):
        recognise(["text"], columns={}, dataset_format="alpacca")
    # And a third has another format, which needs neither; alone, or where nothing fits, the flag is wrong.
    for found, others, fits in ((["text"], True, True), (["text"], False, False), (["words"], True, False)):
        columns = {"instruction": "question"}
        if fits:
            assert recognise(found, columns=columns, others=others) == ("text", {})
            continue
        with pytest.raises(UserError, match=r"--instruction_column question: the data has no such column"):
            recognise(found, columns=columns, others=others)
    # Words in unknown names, else their order; ids and addresses are no texts. The flags fit.
    for found, asked, answer in (
        (["id", "question_text", "reply", "url"], "question_text", "reply"),
        (["Model Answer", "The question"], "The question", "Model Answer"),
        (["uuid", "left", "right"], "left", "right"),
    ):
        flags = f"--instruction_column {quoted(asked)} --output_column {quoted(answer)}"
        with pytest.raises(UserError, match=rf"If {asked} asks and {answer} answers: {flags}\.$"):
            recognise(found, columns={})
        assert recognise(found, columns={"instruction": asked, "output": answer})[0] == "alpaca"
    with pytest.raises(UserError, match=r"for example --text_column words\.$"):
        recognise(["id", "words"], columns={})
    # Lists and objects are no text, and a prompt alone is no whole one.
    for found, arrays in (
        (["prompt", "rejected"], []),
        (["data", "version"], ["data", "version"]),
        (["prompt", "completions"], ["completions"]),
    ):
        with pytest.raises(UserError, match=r"--output_column and so on\.$"):
            recognise(found, arrays=arrays, columns={})
    assert columns_of([{"a": {}, "b": []}, {"a": None, "c": ""}]) == {"a": True, "b": True, "c": False}
    assert set(COLUMNS) == {
        *("text", "instruction", "input", "output", "prompt", "completion", "messages", "conversations")
    }


def test_a_flag_that_has_no_effect_is_refused() -> None:
    found = ["prompt", "completion", "question"]
    with pytest.raises(
        UserError, match=r"--instruction_column question: .* prompt_completion, which has no inst"
    ):
        recognise(found, columns={"instruction": "question"})
    assert recognise(found, columns={"instruction": "question"}, others=True) == ("prompt_completion", {})
    for columns in ({"prompt": "question", "completion": "question"}, {"prompt": "completion"}):
        with pytest.raises(
            UserError, match=r"prompt and completion are one column, (question|completion); name"
        ):
            recognise(found, columns=columns)
    # What was asked may stand before the chosen messages.
    columns = {"messages": "chosen", "prompt": "asked"}
    assert recognise(["asked", "chosen", "rejected"], columns=columns) == ("chat", columns)


def test_alpaca_template_is_the_reference_s() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert written(row, "alpaca", "alpaca") == (
        OPENING_WITH_INPUT + "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:[3]$"
    )
    for empty in ({"input": ""}, {"input": None}):
        assert written({**row, **empty}, "alpaca", "alpaca") == (
            OPENING + "### Instruction:\nAdd.\n\n### Response:[3]$"
        )
    assert written({"instruction": "Add.", "output": "3"}, "alpaca", "alpaca").endswith("### Response:[3]$")


def test_alpaca_template_writes_conversations() -> None:
    assert written(CHAT, "chat", "alpaca") == (
        " Be kind. \n\n### Instruction:\nHello\n\nthere \n\n### Response:[Hi]$"
        "\n\n### Instruction:\nBye\n\n### Response:[See\n\nyou]$"
    )


def test_guanaco_template_has_one_space_and_no_line_breaks() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert written(row, "alpaca", "guanaco") == "### Human: Add.\n1 2### Assistant:[ 3]$"
    assert written(CHAT, "chat", "guanaco") == (
        " Be kind. \n### Human: Hello\n\nthere ### Assistant:[ Hi]$### Human: Bye### Assistant:[ See\n\nyou]$"
    )


def test_guanaco_template_finds_the_answers_of_written_text() -> None:
    text = "### Human: Hi### Assistant: Hello there### Human: Bye### Assistant: See you"
    assert written({"text": text}, "text", "guanaco") == (
        "### Human: Hi### Assistant:[ Hello there]$### Human: Bye### Assistant:[ See you]$"
    )
    assert written({"text": text}, "text", "none") == f"[{text}]$"


def test_falcon_instruct_template_is_the_published_one() -> None:
    # Falcon-7B-instruct's chat template strips messages and halves the line breaks of empty lines.
    assert written(CHAT, "chat", "falcon-instruct") == (
        "Be kind.\n\nUser: Hello\nthere\n\nAssistant:[ Hi]$\n\nUser: Bye\n\nAssistant:[ See\nyou]$"
    )
    assert written({"messages": CHAT["messages"][1:3]}, "chat", "falcon-instruct").startswith(
        "\n\nUser: Hello"
    )


def test_sharegpt_is_written_as_chat_is() -> None:
    for template in ("alpaca", "guanaco", "falcon-instruct"):
        assert written(SHAREGPT, "sharegpt", template) == written(CHAT, "chat", template)


def test_prompt_and_completion_are_joined_as_they_are() -> None:
    row = {"prompt": "2+2=", "completion": "4\n"}
    assert written(row, "prompt_completion", "none") == "2+2=[4\n]$"
    assert written({"prompt": "", "completion": "x"}, "prompt_completion", "none") == "[x]$"


@pytest.mark.parametrize("template", ["alpaca", "guanaco", "falcon-instruct", "none"])
def test_prompt_is_the_text_before_the_answer(template: str) -> None:
    turns = [Turn("user", "Hello"), Turn("assistant", "Hi"), Turn("user", "Bye")]
    chosen = get_template(template)
    whole = chosen.segments([*turns, Turn("assistant", "See you")])
    assert chosen.prompt(turns) == "".join(segment.text for segment in whole[:-1])


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def jinja(folder: Path, text: str, **special_tokens: str) -> Template:
    path = folder / "template.jinja"
    path.write_text(text)
    return get_template(str(path), special_tokens)


def test_jinja_template_finds_answers_by_rendering_prefixes(tmp_path: Path) -> None:
    template = jinja(tmp_path, CHATML)
    segments = render(CHAT, "chat", template)
    assert [s.text for s in segments if s.train] == ["Hi<|im_end|>\n", "See\n\nyou<|im_end|>\n"]
    assert "".join(s.text for s in segments).startswith(
        "<|im_start|>system\n Be kind. <|im_end|>\n<|im_start|>user"
    )
    assert template.prompt([Turn("user", "a")]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_jinja_template_takes_generation_marks(tmp_path: Path) -> None:
    segments = render(CHAT, "chat", jinja(tmp_path, MARKED))
    assert [s for s in segments if s.train] == [
        Segment("Hi", train=True, end=True),
        Segment("See\n\nyou", train=True, end=True),
    ]
    assert segments[-1].text == "\n"


def test_jinja_template_knows_the_special_tokens(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    template = jinja(tmp_path, text, eos_token="<|endoftext|>")
    assert render(CHAT, "chat", template)[-1].text == "See\n\nyou<|endoftext|>"
    assert template.identity != jinja(tmp_path, text, eos_token="</s>").identity


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for m in messages %}", r"template.jinja:1: not a valid Jinja template"),
        (
            "{{ raise_exception('roles must alternate') }}",
            r"a row: .*refuses a conversation: roles must alternate",
        ),
        ("{{ messages[-1].content }}", r"a row: .*cannot write message 1 \(system\), which it leaves out"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            r"answer 1 cannot be separated from its prompt",
        ),
        ("{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}", r"refuses a conversation"),
    ],
)
def test_bad_jinja_templates(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        render(CHAT, "chat", jinja(tmp_path, text))


def test_unknown_templates() -> None:
    with pytest.raises(UserError, match=r"no such template \(did you mean alpaca\?\)"):
        get_template("alpacca")
    with pytest.raises(UserError, match=r"nowhere.jinja: cannot be read"):
        get_template("nowhere.jinja")
    for template in set(TEMPLATES) - {"tokenizer"}:
        assert get_template(template).name == template


def test_templates_fit_formats() -> None:
    assert [
        resolve_template("auto", each) for each in ("alpaca", "chat", "sharegpt", "text", "prompt_completion")
    ] == [*("alpaca", "falcon-instruct", "falcon-instruct", "none", "none")]
    assert resolve_template("guanaco", "text") == "guanaco"
    with pytest.raises(UserError, match="only a text have no turns"):
        resolve_template("alpaca", "text")
    with pytest.raises(UserError, match="use --template alpaca"):
        resolve_template("none", "alpaca")


@pytest.mark.parametrize(
    ("row", "dataset_format"),
    [
        ({"text": "  \n"}, "text"),
        ({"instruction": "a", "output": " "}, "alpaca"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "chat"),
    ],
)
def test_rows_without_an_answer_have_no_segments(row: dict[str, Any], dataset_format: str) -> None:
    assert render(row, dataset_format, get_template(resolve_template("auto", dataset_format))) == []


def test_empty_answers_and_weight_zero_stay_context_among_others() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
        {"role": "assistant", "content": "yes", "weight": 1},
    ]
    segments = render({"messages": messages}, "chat", get_template("guanaco"))
    assert [s.text for s in segments if s.train] == [" yes"]
    assert [s.text for s in segments if s.end] == [" no", " ", " yes"]


@pytest.mark.parametrize(
    ("row", "dataset_format", "said"),
    [
        (
            {"messages": "hello"},
            "chat",
            r"place:3: column messages: expected a list of messages, or its JSON text .*; found the text '",
        ),
        (
            {"messages": "[{'role': 'user', 'content': 'a'}]"},
            "chat",
            r"column messages: not valid JSON: .* at character 3; .*as json.dumps writes it",
        ),
        (
            {"messages": '{"role": "user"}'},
            "chat",
            r"column messages: .*, found an object with role: write one object for each",
        ),
        (
            {"messages": '[{"role": "user", "content": Infinity}]'},
            "chat",
            r"column messages: the number is inf",
        ),
        (
            {"messages": '[{"role": "user", "content": "\\ud800"}]'},
            "chat",
            r"place:3: column messages: it spells half a surrogate pair",
        ),
        ({"text": b"\xff"}, "text", r"column text: expected text, found bytes that are no text in UTF-8"),
        ({"messages": '[{"role": "a", "role": "b"}]'}, "chat", r"column messages: .*'role' stands twice"),
        (
            {"messages": [{"role": None, "content": "a"}]},
            "chat",
            r"message 1: its role is missing \(role is null\)",
        ),
        ({"conversations": [{"from": "", "value": "a"}]}, "sharegpt", r"message 1: its role is missing"),
        (
            {"messages": [{"role": "tool", "content": ["a"]}]},
            "chat",
            r"message 1: expected text, found an array",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "chat",
            r"message 1: part 1: expected \{type: text, text\}, found an object with text, type",
        ),
        (
            {"messages": [{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]},
            "chat",
            r"message 1: part 1: expected \{type: text, text\}, found text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": "call"}]},
            "chat",
            r"message 1: tool_calls: expected a list of calls, or .*; found the text",
        ),
        (
            {"messages": [{"speaker": "human"}]},
            "chat",
            r"message 1: expected \{role, content\} or \{from, value\}, found an object",
        ),
        (
            {"messages": [{"role": "asistant", "content": ""}]},
            "chat",
            r"'asistant' \(did you mean assistant\?\)",
        ),
        ({"conversations": [{"from": "elf", "value": "x"}]}, "sharegpt", r"unknown from 'elf'"),
        ({"text": ["a"]}, "text", r"place:3: column text: expected text, found an array"),
        ({"text": True}, "text", r"expected text, found true or false"),
    ],
)
def test_values_of_the_wrong_kind_are_told_with_their_place(
    row: dict[str, Any], dataset_format: str, said: str
) -> None:
    template = get_template(resolve_template("auto", dataset_format))
    with pytest.raises(UserError, match=said):
        render(row, dataset_format, template, place="place:3")


@pytest.mark.parametrize("part", ["image_url", "image", "input_audio", "video", "refusal"])
def test_a_part_that_is_no_text_is_refused_by_its_name(part: str) -> None:
    content = [{"type": "text", "text": "What is this?"}, {"type": part, part: {"url": "a.png"}}]
    said = rf"^place:3: column messages: message 1: part 2 is of type {part}: only text is trained"
    with pytest.raises(UserError, match=said):
        row = {"messages": [{"role": "user", "content": content}]}
        render(row, "chat", get_template("guanaco"), place="place:3")


def test_numbers_and_halves_of_characters_are_text() -> None:
    row = {"question": 7, "answer": "a\ud800b"}
    columns = {"prompt": "question", "completion": "answer"}
    segments = render(row, "prompt_completion", get_template("none"), columns=columns)
    assert [s.text for s in segments] == ["7", "a\ufffdb"]
