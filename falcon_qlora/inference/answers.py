"""Prompting a model with the template that its adapter was trained with, by command line and from Python."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError, told_in_one_line
from falcon_qlora.data.formats import AUTO, BY_FORMAT, FORMATS, resolve_template
from falcon_qlora.data.templates import (
    TEMPLATES,
    TOKENIZER,
    Template,
    Turn,
    get_template,
    template_fingerprint,
)
from falcon_qlora.inference.base_and_adapter import adapter_folder
from falcon_qlora.methods.table import is_whole
from falcon_qlora.terminal.console import note
from falcon_qlora.terminal.library_logging import quietly

if TYPE_CHECKING:
    from torch import nn


def load_adapter(
    path: str | Path, *, base_model: Any = None, template: str | None = None, **how: Any
) -> nn.Module:
    """Open what any method saved, on its base model, loaded as in training, to prompt it.

    ``model.chat(...)`` and ``model.generate_text(...)`` write their input with the template of the run; see
    `Answers`. The tokenizer is loaded at the first call.

    Args:
        path: folder of an adapter, of the run that made it, or of a model that full fine-tuning left.
        base_model: a loaded model, or the name of one; None: the one that the adapter names.
        template: as ``--template``; None: the one used in training.
        how: `quantize_mode`, `device`, `compute_dtype`, `double_quantization`, `revision` and `trainable`, as
            for `methods.open_adapter.load_adapter`.

    Raises:
        UserError: if the folder holds no adapter or a damaged one, or names a base that cannot be loaded or
            may not be opened unless the user names it.
    """
    from falcon_qlora.methods import open_adapter
    from falcon_qlora.methods.adapter_folder import read_record

    folder = adapter_folder(str(path))
    model: Any = open_adapter.load_adapter(folder, base_model=base_model, **how)
    name = base_model if isinstance(base_model, str) else None
    answers = Answers(
        model, folder, read_record(folder), base=name, revision=how.get("revision"), template=template
    )
    model.chat, model.generate_text = answers.chat, answers.generate_text
    opened: nn.Module = model
    return opened


@dataclass(kw_only=True)
class Speaker:
    """A loaded model with its tokenizer and its template."""

    model: Any
    tokenizer: Any
    template: Template

    def stream(self, turns: Sequence[Turn], **how: Any) -> Iterator[str]:
        """Yield the answer to a conversation in pieces, without white space before the first.

        Args:
            how: `max_new_tokens`, `temperature`, `top_p` and `seed`, as for `generate_stream`.
        """
        from falcon_qlora.data.tokens import prompt_ids
        from falcon_qlora.inference.generation import generate_stream

        begun = False
        ids = prompt_ids(self.template, turns, self.tokenizer)
        for piece in generate_stream(self.model, self.tokenizer, ids, **how):
            # Drop the space that a template leaves between its marker and the answer.
            shown = piece if begun else piece.lstrip()
            begun |= bool(shown)
            yield shown

    def told_beyond(self, turns: Sequence[Turn], max_new_tokens: int) -> str | None:
        """That a conversation with its answer may be longer than the model was made for; None if not."""
        from falcon_qlora.data.tokens import prompt_ids
        from falcon_qlora.models.layouts import layout_of

        tokens = len(prompt_ids(self.template, turns, self.tokenizer))
        what = f"a prompt of {tokens:,} tokens with up to {max_new_tokens:,} new ones"
        return layout_of(self.model.config).told_beyond_positions(tokens + max_new_tokens, what)

    def told_of(self, prompt: str) -> str | None:
        """A warning for a prompt that already contains the template; None for any other."""
        question = "Why?"
        ending = self.template.prompt([Turn("user", question)]).rpartition(question)[2].strip()
        if not ending or not prompt.rstrip().endswith(ending):
            return None
        return (
            f"the prompt ends with {ending!r}, which template {self.template.name} writes around it once "
            "more; --template none takes it as it is"
        )


class Answers:
    """Answers of an opened model in Python, the same as those of ``falcon-qlora generate``.

    Args:
        model: in any mode, in which it is left.
        folder: of what was trained.
        record: the folder's record of itself, see `read_record`.
        base: name of the base model, where the caller gave it.
        revision: of a base on the hub.
        template: name of one, where the caller gave it.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        record: dict[str, Any],
        *,
        base: str | None,
        revision: str | None,
        template: str | None,
    ):
        self._model, self._folder, self._record = model, folder, record
        self._base, self._revision, self._template = base, revision, template

    @told_in_one_line()
    @quietly()
    def chat(self, said: str | Sequence[Mapping[str, Any]], **how: Any) -> str:
        """The answer to a conversation; no history is kept for the next call.

        Args:
            said: what the user says, or all messages so far, ending with the user's:
                ``[{"role": "system", "content": "…"}, {"role": "user", "content": "…"}]``.
            how: `max_new_tokens` (256), `temperature` (0: the likeliest token each time), `top_p` (1) and
                `seed` (0).

        Raises:
            UserError: for messages that cannot be read, or that the template cannot write.
        """
        return self._answer([Turn("user", said)] if isinstance(said, str) else _turns(said), how)

    @told_in_one_line()
    @quietly()
    def generate_text(self, prompt: str, **how: Any) -> str:
        """The answer to one prompt, as ``falcon-qlora generate --prompt`` gives it.

        Args:
            prompt: a question or an instruction; the template is written around it.
            how: as for `chat`.

        Raises:
            UserError: if the template or the tokenizer of the run cannot be found.
        """
        if told := self._speaker.told_of(prompt):
            note(told)
        return self._answer([Turn("user", prompt)], how)

    def _answer(self, turns: Sequence[Turn], how: Mapping[str, Any]) -> str:
        if told := self._speaker.told_beyond(turns, how.get("max_new_tokens", 256)):
            note(told)
        return "".join(self._speaker.stream(turns, **how)).strip()

    @functools.cached_property
    def _speaker(self) -> Speaker:
        tokenizer = self._load_tokenizer()
        template = trained_template(
            self._record,
            tokenizer,
            name=self._template,
            trained=str(self._folder),
            say_so="template=FILE",
            tell=note,
        )
        assert template is not None
        return Speaker(model=self._model, tokenizer=tokenizer, template=template)

    def _load_tokenizer(self) -> Any:
        from falcon_qlora.methods.open_adapter import check_may_open
        from falcon_qlora.models.tokenizer import load_tokenizer

        folder, record, own = self._folder, self._record, self._record.get("own_tokenizer")
        base = self._base or record.get("base_model")
        if is_whole(record) and (folder / "tokenizer.json").is_file():
            own = str(folder)
        name = own or record.get("tokenizer") or base
        if not name:
            raise UserError(f"{folder} names no base model, whose tokenizer it needs. Name it as base_model")
        if name != self._base:
            check_may_open(name, "tokenizer", record, folder, say_so="base_model=FOLDER")
        return load_tokenizer(
            base or name, tokenizer_name_or_path=None if name == base else name, revision=self._revision
        )


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    from falcon_qlora.data.account import Account
    from falcon_qlora.data.conversation import Missing, turns_of_messages

    try:
        turns = turns_of_messages(messages, "chat", Account())
    except Missing as missing:
        raise UserError(f"chat: {missing} is missing") from None
    if not turns or turns[-1].role == "assistant":
        raise UserError("chat: there is nothing to answer: the last message must be the user's")
    return turns


def trained_template(
    record: Mapping[str, Any],
    tokenizer: Any,
    *,
    name: str | None = None,
    dataset_format: str | None = None,
    trained: str,
    say_so: str,
    tell: Callable[[str], None],
) -> Template | None:
    """The template that the user names, else the adapter's; a base alone continues the prompt as it is.

    Args:
        record: the trained folder's record of itself, {} for a base alone.
        tokenizer: None where there is none yet.
        name, dataset_format: where the user has named them.
        trained: what the record is of, for messages.
        say_so: how the user names a template's file.
        tell: called with a warning if the chat template is not the one used in training.

    Returns:
        None where it is the tokenizer's own, and there is no tokenizer yet.

    Raises:
        UserError: if there is no such template, or it is a file that is opened only if the user names it.
    """
    named = name is not None
    name = name or record.get("template") or AUTO
    dataset_format = dataset_format or record.get("dataset_format") or "auto"
    if dataset_format not in ("auto", *FORMATS):
        raise UserError(
            f"{trained}: it was trained on rows of format {dataset_format[:40]!r}, which is not known"
        )
    if name in (AUTO, BY_FORMAT):
        name = "none" if dataset_format == "auto" else resolve_template(name, dataset_format, tokenizer)
    elif name not in TEMPLATES and not named:
        # As for a base model's folder: the adapter's files may come from anywhere.
        told = record.get("template_fingerprint")
        if not isinstance(told, str) or told != template_fingerprint(name):
            raise UserError(
                f"{trained} names the local file {name[:200]!r} as its template, but records no fingerprint "
                f"of what it is now. If that is right, give {say_so}"
            )
    if tokenizer is None:
        return None if name == TOKENIZER else get_template(name)
    told = record.get("template_fingerprint") if name == record.get("template") == TOKENIZER else None
    if told and told != template_fingerprint(name, tokenizer.chat_template):
        tell(f"the tokenizer's chat template is not the one that {trained} was trained with")
    return get_template(name, tokenizer.special_tokens_map, tokenizer.chat_template)
