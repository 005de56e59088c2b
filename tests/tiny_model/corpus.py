"""The text that the packaged model is trained on, and its tokenizer.

Two parts. Documentation: docstrings, comment blocks and prose files of the Python standard library and of
installed packages whose licences allow it, read from where they are installed. Generated English:
`tests.tiny_model.english`. A small share of both is held out, by a hash of the text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tiny_model.english import write_documents

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
HELD_OUT_SHARE = 1 / 50
GENERATED_SHARE = 0.3

# module -> licence of its documentation
SOURCES = {
    "python": "PSF-2.0",
    "PIL": "MIT-CMU",
    "_pytest": "MIT",
    "accelerate": "Apache-2.0",
    "anyio": "MIT",
    "bitsandbytes": "MIT",
    "click": "BSD-3-Clause",
    "datasets": "Apache-2.0",
    "dill": "BSD-3-Clause",
    "filelock": "MIT",
    "fontTools": "MIT",
    "fsspec": "BSD-3-Clause",
    "httpx": "BSD-3-Clause",
    "huggingface_hub": "Apache-2.0",
    "jinja2": "BSD-3-Clause",
    "matplotlib": "PSF-based (matplotlib)",
    "mpmath": "BSD-3-Clause",
    "mypy": "MIT",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "packaging": "Apache-2.0",
    "pandas": "BSD-3-Clause",
    "peft": "Apache-2.0",
    "pip": "MIT",
    "psutil": "BSD-3-Clause",
    "pyarrow": "Apache-2.0",
    "pydantic": "MIT",
    "pygments": "BSD-2-Clause",
    "pyparsing": "MIT",
    "rich": "MIT",
    "scipy": "BSD-3-Clause",
    "setuptools": "MIT",
    "sympy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "transformers": "Apache-2.0",
    "trl": "Apache-2.0",
    "typer": "MIT",
    "wandb": "MIT",
}
# Where a module's name is not its distribution's.
_DISTRIBUTIONS = {"PIL": "pillow", "_pytest": "pytest"}

_FOREIGN = {"site-packages", "dist-packages", "test", "tests", "_vendor", "vendored", "__pycache__"}
# Of the headers that packages ship, those that are their own.
_OWN_HEADERS = {"ATen", "c10", "caffe2", "torch", "arrow", "parquet"}
_NOTICE = re.compile(
    r"copyright|licen[sc]ed under|all rights reserved|warrant|http://www.apache|automatically generated",
    re.IGNORECASE,
)
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#(?!!)[^\n]*\n){3,}", re.MULTILINE)
_C_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*//[^\n]*\n){2,}|/\*.*?\*/", re.MULTILINE | re.DOTALL)
_C_COMMENT_MARK = re.compile(r"^[ \t]*(?://[/!]?<?|/\*[*!]?|\*/|\*) ?|\*/[ \t]*$", re.MULTILINE)


def gather(folder: Path, *, tokens: int, seed: int) -> None:
    """Write the tokenizer, ``tokens.npz``, ``held_out.json`` and ``corpus.json`` to `folder`.

    ``tokens.npz`` holds uint16 arrays ``train``, ``documentation`` and ``generated`` (the two held-out
    parts), documents joined by the end token.

    Args:
        tokens: About how many tokens the training part may have; documentation is cut to fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    characters = int(tokens * 3.8)
    documentation, documentation_held_out, sources = _documentation(
        int(characters * (1 - GENERATED_SHARE)), seed
    )
    generated, generated_held_out = _generated(int(characters * GENERATED_SHARE), seed)
    tokenizer = _train_tokenizer(documentation + generated)
    save_tokenizer(tokenizer, folder)

    train = documentation + generated
    Random(seed).shuffle(train)
    arrays = {
        "train": _encode(tokenizer, train),
        "documentation": _encode(tokenizer, documentation_held_out),
        "generated": _encode(tokenizer, generated_held_out),
    }
    np.savez_compressed(folder / "tokens.npz", **arrays)  # type: ignore[arg-type]
    # Only text under Python's own licence travels with the package.
    packaged = {
        "documentation": _up_to(
            [text for text in documentation_held_out if text in sources["python"]["texts"]], 60_000
        ),
        "generated": _up_to(generated_held_out, 20_000),
    }
    (folder / "held_out.json").write_text(json.dumps(packaged, indent=1) + "\n")
    about = {
        "sources": {
            name: {key: about[key] for key in about if key != "texts"} for name, about in sources.items()
        },
        "generated": {"documents": len(generated), "characters": sum(map(len, generated))},
        "tokens": {name: int(array.size) for name, array in arrays.items()},
        "vocabulary": tokenizer.get_vocab_size(),
        "seed": seed,
    }
    (folder / "corpus.json").write_text(json.dumps(about, indent=1) + "\n")


def _documentation(characters: int, seed: int) -> tuple[list[str], list[str], dict[str, dict]]:
    """Return documents to train on, documents held out, and what each source gave."""
    seen: set[bytes] = set()
    sources: dict[str, dict] = {}
    everything: list[tuple[str, str]] = []
    for name, licence in SOURCES.items():
        root, version = _where(name)
        if root is None:
            continue
        texts = []
        for path in sorted(root.rglob("*")):
            text = _prose(path, root, seen)
            if len(text) > 300:
                texts.append(text)
        everything += [(name, text) for text in texts]
        sources[name] = {"version": version, "licence": licence, "texts": set(texts)}
    Random(seed).shuffle(everything)
    train, held_out, used = [], [], 0
    for name, text in everything:
        if _is_held_out(text):
            held_out.append(text)
        elif used < characters:
            train.append(text)
            used += len(text)
            sources[name]["documents"] = sources[name].get("documents", 0) + 1
            sources[name]["characters"] = sources[name].get("characters", 0) + len(text)
    return train, held_out, sources


def _generated(characters: int, seed: int) -> tuple[list[str], list[str]]:
    """Return generated documents to train on and, disjoint from them, documents held out."""
    train: list[str] = []
    used = 0
    for text in write_documents(seed):
        if used >= characters:
            break
        if not _is_held_out(text):
            train.append(text)
            used += len(text)
    held_out = {text: None for text in islice(write_documents(seed + 1), 40_000) if _is_held_out(text)}
    return train, list(held_out)


def _where(name: str) -> tuple[Path | None, str]:
    """The folder that holds a source's text, and its version; no folder if it is not installed."""
    if name == "python":
        return Path(sysconfig.get_paths()["stdlib"]), platform.python_version()
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None, ""
    return Path(found.submodule_search_locations[0]), importlib.metadata.version(
        _DISTRIBUTIONS.get(name, name)
    )


def _prose(path: Path, root: Path, seen: set[bytes]) -> str:
    """The prose of one file: paragraphs that no earlier file had and that are mostly words."""
    inside = path.relative_to(root).parts
    if path.suffix == ".h" and not (inside[0] == "include" and inside[1] in _OWN_HEADERS):
        return ""
    if _FOREIGN & set(inside) or _NOTICE.search(path.name) or not path.is_file():
        return ""
    try:
        source = path.read_text(encoding="utf-8") if path.suffix in _SUFFIXES else ""
        pieces = _pieces(source, path.suffix)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kept = []
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(pieces)):
        paragraph = paragraph.rstrip()
        digest = hashlib.sha1(" ".join(paragraph.split()).lower().encode()).digest()
        if len(paragraph) < 40 or digest in seen or not _reads_like_prose(paragraph):
            continue
        seen.add(digest)
        kept.append(paragraph)
    return "\n\n".join(kept)


def _reads_like_prose(paragraph: str) -> bool:
    words = sum(character.isalpha() or character in " \n" for character in paragraph)
    return (
        words > 0.75 * len(paragraph)
        and paragraph.isascii()
        and END_OF_TEXT not in paragraph
        and not _NOTICE.search(paragraph)
        and ">>>" not in paragraph
        and paragraph.count(" ") > len(paragraph) / 18
    )


_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".h"}


def _pieces(source: str, suffix: str) -> list[str]:
    """What a file of this kind says in words."""
    if suffix in (".py", ".pyi"):
        return _docstrings(source)
    if suffix == ".h":
        return [_C_COMMENT_MARK.sub("", block) for block in _C_COMMENT_BLOCK.findall(source)]
    return [source]


def _docstrings(source: str) -> list[str]:
    """Docstrings, long strings (help pages kept as data) and comment blocks of a module, in that order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    pieces = [
        inspect.cleandoc(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and len(node.value) > 100
        and " " in node.value
    ]
    comments = _COMMENT_BLOCK.findall(source)
    return pieces + [re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE) for block in comments]


def _is_held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def _up_to(texts: list[str], characters: int) -> list[str]:
    kept, used = [], 0
    for text in texts:
        if used + len(text) <= characters:
            kept.append(text)
            used += len(text)
    return kept


def _train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE whose only special token is the end token, and whose digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_chunks(texts), trainer)
    return tokenizer


def _chunks(texts: list[str], size: int = 1000) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer` in the form that `AutoTokenizer` opens: one end token and no padding token."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents' ids in one uint16 array, the end token after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = [np.zeros(0, dtype=np.uint16)]
    for chunk in _chunks(texts):
        encodings = tokenizer.encode_batch(chunk, add_special_tokens=False)
        parts += [np.array([*encoding.ids, end], dtype=np.uint16) for encoding in encodings]
    return np.concatenate(parts)
