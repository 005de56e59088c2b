"""``falcon-qlora generate --adapter DIR --prompt TEXT``: answers from a quantized base and its adapter.

The adapter's folder says which base model, quantization and prompt template it was trained with; flags say
otherwise. Without an adapter the base model answers alone; a merge in 16 bits, as it was made.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora.commands.opening import note_aside, source_of
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.settings import setting
from falcon_qlora.common.untrusted import read_text
from falcon_qlora.config import Configuration, parse
from falcon_qlora.data.formats import AUTO, BY_FORMAT, FORMATS, resolve_template
from falcon_qlora.data.templates import (
    TEMPLATES,
    TOKENIZER,
    Template,
    Turn,
    get_template,
    template_fingerprint,
)
from falcon_qlora.inference.base_and_adapter import adapter_folder, load_adapted
from falcon_qlora.methods.table import is_whole
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading


@dataclass(kw_only=True)
class GenerateArguments:
    """What to answer, and how."""

    _argument_group_name = "Generation"

    adapter: str | None = setting(None, "Folder of a trained adapter, or of the run that made it.")
    prompt: list[str] | None = setting(None, "What to answer, one or several; unset: standard input.")
    prompt_file: str | None = setting(None, "A JSON list of prompts to answer one after another.")
    chat: bool = setting(False, "Talk in turns; an empty line or the end of input ends it.")
    compare: bool = setting(False, "Answer without the adapter first, then with it.")
    max_new_tokens: int = setting(256, "Longest answer, in tokens.", least=1)
    temperature: float = setting(0.0, "0: the likeliest token each time; above 0: draw with --seed.", least=0)
    top_p: float = setting(
        1.0, "Draw from the likeliest tokens that together have this probability.", above=0, most=1
    )


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration = parse(argv, verb="generate", extra_arguments=GenerateArguments)
    wanted: GenerateArguments = configuration.extra
    if wanted.prompt and wanted.prompt_file:
        raise UserError("--prompt and --prompt_file: give one of them")
    if wanted.chat and (wanted.prompt or wanted.prompt_file or wanted.compare):
        raise UserError("--chat asks for its own prompts: leave out --prompt, --prompt_file and --compare")
    if wanted.compare and not wanted.adapter:
        raise UserError("--compare needs --adapter: it answers without the adapter and with it")
    folder = adapter_folder(wanted.adapter) if wanted.adapter else None
    prompts = _prompts(wanted)

    # Only now: a wrong flag is told at once.
    say_loading(aside=True)
    quiet_libraries()
    source, record = source_of(configuration, folder, named=configuration.explicit)
    if wanted.compare and is_whole(record):
        raise UserError(
            f"--compare: {folder} is a whole fine-tuned model without its base inside; ask "
            f"{record.get('base_model')} by itself, as --model_name_or_path without --adapter"
        )
    _template(configuration, record, None)  # one that is not there is told before the model is loaded
    if configuration.model.compute_dtype == "fp8":
        note_aside("computed in bfloat16: FP8 products are for packed documents")
    model, tokenizer = load_adapted(source)
    template = _template(configuration, record, tokenizer)
    assert template is not None
    speaker = _Speaker(
        model=model, tokenizer=tokenizer, template=template, wanted=wanted, seed=configuration.run.seed
    )
    if wanted.chat:
        speaker.chat()
        return 0
    for prompt in [sys.stdin.read().rstrip("\n")] if prompts is None else prompts:
        if prompts is not None and (len(prompts) > 1 or wanted.compare):
            print(f"> {prompt}")
        speaker.answer(prompt)
    return 0


@dataclass(kw_only=True)
class _Speaker:
    """A loaded model, and how it is spoken to."""

    model: Any
    tokenizer: Any
    template: Template
    wanted: GenerateArguments
    seed: int

    def answer(self, prompt: str) -> None:
        """Print the answer to one prompt as it comes."""
        from falcon_qlora.methods.interface import method_of

        if (ending := _ending(self.template)) and prompt.rstrip().endswith(ending):
            note_aside(
                f"the prompt ends with {ending!r}, which template {self.template.name} writes around it once "
                "more; --template none takes it as it is"
            )
        turns = [Turn("user", prompt)]
        if self.wanted.compare:
            with method_of(self.model).disabled(self.model):
                self._print("base:    ", turns)
        self._print("adapter: " if self.wanted.compare else "", turns)

    def chat(self) -> None:
        """Answer line after line, each with all turns before it."""
        turns: list[Turn] = []
        person = sys.stdin.isatty()
        while True:
            try:
                said = input("you:    " if person else "")
            except EOFError:
                return
            if not said.strip():
                return
            turns.append(Turn("user", said))
            turns.append(Turn("assistant", self._print("falcon: " if person else "", turns)))

    def _print(self, name: str, turns: list[Turn]) -> str:
        from falcon_qlora.data.tokens import prompt_ids
        from falcon_qlora.inference.generation import generate_stream

        print(name, end="", flush=True)
        text = ""
        pieces = generate_stream(
            self.model,
            self.tokenizer,
            prompt_ids(self.template, turns, self.tokenizer),
            max_new_tokens=self.wanted.max_new_tokens,
            temperature=self.wanted.temperature,
            top_p=self.wanted.top_p,
            seed=self.seed,
        )
        for piece in pieces:
            # The space that a template leaves between its marker and the answer is not for reading.
            print(piece if text else piece.lstrip(), end="", flush=True)
            text = text + piece if text else piece.lstrip()
        print(flush=True)
        return text.strip()


def _ending(template: Template) -> str:
    """What a template writes between a question and its answer, without spaces around it."""
    question = "Why?"
    return template.prompt([Turn("user", question)]).rpartition(question)[2].strip()


def _prompts(wanted: GenerateArguments) -> list[str] | None:
    """The prompts that the flags give; None where they come from standard input or a chat."""
    if not wanted.prompt_file:
        return wanted.prompt
    name = f"--prompt_file {wanted.prompt_file}"
    try:
        prompts = json.loads(read_text(Path(wanted.prompt_file), may_be_pipe=True))
    except UserError as error:
        raise UserError(f"{name}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise UserError(f'{name}: must hold a JSON list of texts, such as ["Who are you?"]')
    return prompts


def _template(configuration: Configuration, record: dict[str, Any], tokenizer: Any) -> Template | None:
    """The template that a flag names, else the adapter's; a base alone goes on from the prompt as it is.

    None where that is the tokenizer's own, and there is no tokenizer yet.
    """
    data, trained = configuration.data, f"--adapter {configuration.extra.adapter}"

    def given(name: str) -> str:
        value = getattr(data, name) if name in configuration.explicit else record.get(name)
        return value or "auto"

    name, dataset_format = given("template"), given("dataset_format")
    if dataset_format not in ("auto", *FORMATS):
        raise UserError(
            f"{trained}: it was trained on rows of format {dataset_format[:40]!r}, which is not known"
        )
    if name in (AUTO, BY_FORMAT):
        name = "none" if dataset_format == "auto" else resolve_template(name, dataset_format, tokenizer)
    elif name not in TEMPLATES and "template" not in configuration.explicit:
        # As a base model's folder: the adapter's files may come from anywhere.
        told = record.get("template_fingerprint")
        if not isinstance(told, str) or told != template_fingerprint(name):
            raise UserError(
                f"{trained} names {name[:200]!r}, a file of this machine, as its template, and does not tell "
                "what lies there now. If that is right, say so: --template FILE"
            )
    if tokenizer is None:
        return None if name == TOKENIZER else get_template(name)
    told = record.get("template_fingerprint") if name == record.get("template") == TOKENIZER else None
    if told and told != template_fingerprint(name, tokenizer.chat_template):
        note_aside(f"the tokenizer's chat template is not the one that {trained} was trained with")
    return get_template(name, tokenizer.special_tokens_map, tokenizer.chat_template)
