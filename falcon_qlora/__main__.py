"""The command line: `falcon-qlora VERB [flags]`, one module per verb in `commands/`."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import traceback
from collections.abc import Mapping

from falcon_qlora.common import late_imports
from falcon_qlora.common.errors import (
    EXIT_BUG,
    EXIT_USER_ERROR,
    UserError,
    message_of,
    nearest,
    panics_as_errors,
)
from falcon_qlora.common.files import temporary_files
from falcon_qlora.common.version import VERSION
from falcon_qlora.config import other_names
from falcon_qlora.config.verbs import VERBS, Verb
from falcon_qlora.processes import ranks
from falcon_qlora.processes.stop_signals import Ended, end_with, stop_signals_raise
from falcon_qlora.processes.watchdog import NATIVE_MINUTES, end_native_code_after
from falcon_qlora.terminal.output import shown_as_text

EXIT_INTERRUPTED = 130
_VERB_LIKE = re.compile(r"[A-Za-z_-]{1,16}")  # repeated in the message, so no token, key or address


def main(argv: list[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit status: 0, 2 for what the user can fix, 1 for any other error, 128 + a signal that ended it
        (130 after Ctrl-C).
    """
    words = sys.argv[1:] if argv is None else argv
    if argv is None and words[:1] != ["bench"]:  # which compiles the models of others
        late_imports.put_off()
    ranks.stand_alone()  # the ranks are `train`'s workers, which do not come by here
    with shown_as_text():
        status = _main(words, is_command=argv is None)
        if argv is None:
            end_with(status)
        return status


def _main(words: list[str], *, is_command: bool) -> int:
    try:
        with panics_as_errors():
            status = _run(words, is_command=is_command)
            with contextlib.suppress(BrokenPipeError):  # whose reader had what it wanted
                sys.stdout.flush()
            return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Ended as asked:
        print(f"error: {asked}", file=sys.stderr)
        return 128 + asked.number
    except BrokenPipeError:
        return EXIT_BUG  # the reader of the output is gone
    except Exception as error:
        print(message_of(error) or traceback.format_exc().rstrip(), file=sys.stderr)
        return EXIT_BUG


def _run(words: list[str], *, is_command: bool) -> int:
    if words[:1] == ["help"] and words[1:2] and words[1] in VERBS:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(VERBS))
        return 0 if words else EXIT_USER_ERROR
    if words[0] in ("--version", "-V", "version"):
        print(f"falcon-qlora {VERSION}")
        return 0
    verb, *rest = words
    if verb.startswith("-"):
        # The message does not repeat the words typed: they may contain tokens and passwords.
        raise UserError("name a command before the flags, such as: falcon-qlora train, then the same flags")
    if verb not in VERBS:
        name = f" {verb}" if _VERB_LIKE.fullmatch(verb) else ""
        meant = other_names.COMMANDS.get(verb.replace("-", "_").lower())
        hint = f" (did you mean {meant}?)" if meant else nearest(verb, VERBS)
        raise UserError(f"unknown command{name}{hint}; there are {', '.join(VERBS)}")
    # Only the verb's own module is imported: a help page should not wait for torch.
    module = importlib.import_module(f"falcon_qlora.commands.{verb}")
    own = temporary_files() if is_command else contextlib.nullcontext()
    with stop_signals_raise(for_good=is_command), own:
        end_native_code_after(NATIVE_MINUTES)
        status: int = module.main(rest)
    return status


def _help(verbs: Mapping[str, Verb]) -> str:
    commands = "\n".join(f"  {verb.name:<10} {verb.summary}" for verb in verbs.values())
    return (
        "falcon-qlora COMMAND [flags]\n\n"
        "Fine-tune quantized Falcon models with LoRA, one replica on every GPU.\n\n"
        f"Commands (they share the flags of train; COMMAND --help shows which each uses):\n{commands}\n\n"
        "  --version  print the version\n\n"
        f"Try: falcon-qlora train {verbs['train'].examples[0]}"
    )


if __name__ == "__main__":
    sys.exit(main())
