"""The command line: `falcon-qlora VERB [flags]`, one module a verb in `commands/`."""

from __future__ import annotations

import importlib
import re
import sys
import traceback

from falcon_qlora.common.errors import EXIT_BUG, EXIT_USER_ERROR, UserError, message_of, nearest
from falcon_qlora.common.version import VERSION

EXIT_INTERRUPTED = 130
_VERB_LIKE = re.compile(r"[A-Za-z_-]{1,16}")  # no token, key or address

VERBS = {
    "train": "fine-tune a quantized Falcon on every GPU: LoRA, Adapter, Adapter v2; or all of one",
    "data": "show what the model will see: rendered rows, lengths, what is dropped",
    "prepare": "download and tokenize ahead, so that training needs no network",
    "params": "count the parameters of a model and a method, without loading anything",
    "generate": "answer a prompt with a base model and an adapter",
    "compare": "train by several methods in turn on the same rows and lay the results side by side",
    "bench": "measure variants of a training step against each other",
    "merge": "merge an adapter into its base model, with proof of what that did",
    "inspect": "say what a run, checkpoint, adapter or merge is, and whether it is whole",
    "eval": "perplexity and answer loss of a base model, an adapter or a merge",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit status: 0, 2 for what the user can mend, 1 for a bug or a disk that fails, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        return _run(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; closing stderr keeps Python from saying so at exit.
        sys.stderr.close()
        return EXIT_BUG
    except Exception as error:
        print(message_of(error) or traceback.format_exc().rstrip(), file=sys.stderr)
        return EXIT_BUG


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else EXIT_USER_ERROR
    if words[0] in ("--version", "-V"):
        print(f"falcon-qlora {VERSION}")
        return 0
    verb, *rest = words
    if verb.startswith("-"):
        # Without the words that were typed: among them may be tokens and passwords.
        raise UserError("name a command before the flags, such as: falcon-qlora train, then the same flags")
    if verb not in VERBS:
        name = f" {verb}" if _VERB_LIKE.fullmatch(verb) else ""
        raise UserError(f"unknown command{name}{nearest(verb, VERBS)}; there are {', '.join(VERBS)}")
    # Only the verb's own module is imported: a help page should not wait for torch.
    module = importlib.import_module(f"falcon_qlora.commands.{verb}")
    status: int = module.main(rest)
    return status


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())
    return (
        "falcon-qlora COMMAND [flags]\n\n"
        "Fine-tune quantized Falcon models with LoRA, one replica on every GPU.\n\n"
        f"Commands (all take the same flags; COMMAND --help shows them):\n{verbs}\n\n"
        "  --version  print the version\n\n"
        "Try: falcon-qlora train -m tiny --gpus 1"
    )


if __name__ == "__main__":
    sys.exit(main())
