"""``falcon-qlora generate --adapter DIR --prompt TEXT``: answers from a quantized base and its adapter.

The adapter's folder says which base model, quantization and prompt template it was trained with; flags
override them. Without an adapter the base model answers alone. A merge is loaded in 16 bits, as it was made,
and prompted with the template that its certificate names.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora.commands.opening import less_memory, merge_record, note_aside, source_of
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.settings import setting
from falcon_qlora.common.untrusted import read_text
from falcon_qlora.config import Configuration, parse
from falcon_qlora.data.templates import Template, Turn
from falcon_qlora.inference.answers import Speaker, trained_template
from falcon_qlora.inference.base_and_adapter import adapter_folder, load_adapted
from falcon_qlora.methods.interface import method_of
from falcon_qlora.methods.table import is_whole
from falcon_qlora.processes.watchdog import end_native_code_after
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading, write_answer


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
    end_native_code_after(configuration.run.hang_minutes)
    wanted: GenerateArguments = configuration.extra
    if wanted.prompt and wanted.prompt_file:
        raise UserError("--prompt and --prompt_file: give one of them")
    if wanted.chat and (wanted.prompt or wanted.prompt_file or wanted.compare):
        raise UserError("--chat asks for its own prompts: leave out --prompt, --prompt_file and --compare")
    if wanted.compare and not wanted.adapter:
        raise UserError("--compare needs --adapter: it answers without the adapter and with it")
    if "top_p" in configuration.explicit and wanted.temperature == 0:
        raise UserError(
            "--top_p does nothing with --temperature 0, which draws nothing: give --temperature 1, or drop it"
        )
    folder = adapter_folder(wanted.adapter) if wanted.adapter else None
    prompts = _prompts(wanted)

    # Only now, so that a wrong flag is reported at once.
    say_loading(aside=True)
    quiet_libraries()
    source, record = source_of(configuration, folder, named=configuration.explicit)
    if folder is None:
        record = merge_record(source.model)
        if record and "template" not in configuration.explicit:
            note_aside(
                f"the template is {record['template']}, with which {source.model} was trained; "
                "--template none takes the prompt as it is"
            )
    if wanted.compare and is_whole(record):
        raise UserError(
            f"--compare: {folder} is a fully fine-tuned model, and its base is not in it. For the base's own "
            f"answers give --model_name_or_path {record.get('base_model')} without --adapter"
        )
    _template(configuration, record, None)  # a missing one is reported before the model is loaded
    if configuration.model.compute_dtype == "fp8":
        note_aside("running in bfloat16: FP8 needs packed documents")
    if prompts is None and not wanted.chat:
        prompts = [_standard_input()]
    with less_memory(source, "a smaller --max_new_tokens"):
        model, tokenizer = load_adapted(source)
        template = _template(configuration, record, tokenizer)
        assert template is not None
        speaker = Speaker(model=model, tokenizer=tokenizer, template=template)
        printer = _Printer(speaker=speaker, wanted=wanted, seed=configuration.run.seed)
        if prompts is None:
            printer.chat()
            return 0
        for prompt in prompts:
            if len(prompts) > 1 or wanted.compare:
                print(f"> {prompt}")
            printer.answer(prompt)
    return 0


@dataclass(kw_only=True)
class _Printer:
    """Prints a model's answers as they are generated."""

    speaker: Speaker
    wanted: GenerateArguments
    seed: int

    def answer(self, prompt: str) -> None:
        """Print the answer to one prompt."""
        if told := self.speaker.told_of(prompt):
            note_aside(told)
        turns = [Turn("user", prompt)]
        if told := self.speaker.told_beyond(turns, self.wanted.max_new_tokens):
            note_aside(told)
        if self.wanted.compare:
            with method_of(self.speaker.model).disabled(self.speaker.model):
                self._print("base:    ", turns)
        self._print("adapter: " if self.wanted.compare else "", turns)

    def chat(self) -> None:
        """Answer one line after another, each with all earlier turns."""
        turns: list[Turn] = []
        told = None
        person = sys.stdin.isatty()
        while True:
            try:
                said = _as_text(input("you:    " if person else ""), "standard input")
            except EOFError:
                return
            if not said.strip():
                return
            turns.append(Turn("user", said))
            if told is None and (told := self.speaker.told_beyond(turns, self.wanted.max_new_tokens)):
                note_aside(f"{told}. An empty line ends this chat")
            turns.append(Turn("assistant", self._print("falcon: " if person else "", turns)))

    def _print(self, name: str, turns: list[Turn]) -> str:
        write_answer(name)
        text = ""
        pieces = self.speaker.stream(
            turns,
            max_new_tokens=self.wanted.max_new_tokens,
            temperature=self.wanted.temperature,
            top_p=self.wanted.top_p,
            seed=self.seed,
        )
        for piece in pieces:
            write_answer(piece)
            text += piece
        print(flush=True)
        return text.strip()


def _prompts(wanted: GenerateArguments) -> list[str] | None:
    """The prompts from the flags; None if they come from standard input or a chat."""
    if wanted.prompt:
        return [_as_text(prompt, "--prompt") for prompt in wanted.prompt]
    if not wanted.prompt_file:
        if sys.stdin is None:
            raise UserError(
                "there is no prompt: standard input is closed. Give --prompt TEXT, or --prompt_file FILE"
            )
        return None
    name = f"--prompt_file {wanted.prompt_file}"
    try:
        prompts = json.loads(read_text(Path(wanted.prompt_file), may_be_pipe=True))
    except UserError as error:
        raise UserError(f"{name}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise UserError(f'{name}: must hold a JSON list of texts, such as ["Who are you?"]')
    if empty := [number for number, text in enumerate(prompts, 1) if not text.strip()]:
        raise UserError(f"{name}: prompt number {empty[0]} is empty; leave it out, or give text")
    return [_as_text(prompt, name) for prompt in prompts]


def _standard_input() -> str:
    if sys.stdin.isatty():
        note_aside("type the prompt, then Ctrl-D on a line of its own (--chat talks in turns)")
    try:
        prompt = _as_text(sys.stdin.read().rstrip("\n"), "standard input")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not text in {error.encoding}: set PYTHONIOENCODING") from None
    if not prompt.strip():
        raise UserError("there is no prompt: standard input is empty. Give --prompt TEXT, or --chat")
    return prompt


def _as_text(given: str, where: str) -> str:
    """`given` with what the locale's encoding could not decode read as UTF-8."""
    try:
        return given.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UserError(f"{where}: not text in UTF-8") from None


def _template(configuration: Configuration, record: dict[str, Any], tokenizer: Any) -> Template | None:
    named = {
        name: getattr(configuration.data, name) if name in configuration.explicit else None
        for name in ("template", "dataset_format")
    }
    return trained_template(
        record,
        tokenizer,
        name=named["template"],
        dataset_format=named["dataset_format"],
        trained=f"--adapter {configuration.extra.adapter}" if configuration.extra.adapter else "the merge",
        say_so="--template FILE",
        tell=note_aside,
    )
