"""Find the files of a folder that hold the rows of a split, and say why the others are not read."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from falcon_qlora.common.errors import UserError, nearest, reason_of
from falcon_qlora.data.files import SUFFIXES, data_suffix
from falcon_qlora.data.text_files import COMPRESSED

# Words in a file's name that say which split it belongs to.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "holdout": "test",
    "heldout": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
# Words that stand beside those if a split has several files: test-00000-of-00001, part-0-test.
_OF_PARTS = {"of", "part", "shard", "chunk", "v"}
_HELD_OUT = re.compile(r"(held|hold)[-_ .]?out")
_OF_SET = re.compile(rf"^({'|'.join(_SPLIT_WORDS)})(?:set|data|split|s)$")
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# What systems and tools leave in a folder; skipped without a note.
_PASSED_OVER = {
    *(".DS_Store", ".localized", ".directory", ".git", ".gitignore", ".gitattributes", ".gitkeep", ".keep"),
    *(".cache", ".huggingface", ".ipynb_checkpoints", "__pycache__", "__MACOSX", "Thumbs.db", "desktop.ini"),
    "lost+found",
}
_AS_LINES = "write its rows as one JSON object a line into a .jsonl file"
# What users may take for rows, and how to make rows of it.
_CURES = {
    ".txt": 'plain text has no rows; write each document as a line {"text": "…"} of a .jsonl file',
    ".md": 'plain text has no rows; write each document as a line {"text": "…"} of a .jsonl file',
    ".docx": 'a Word document has no rows; write each document as a line {"text": "…"} of a .jsonl file',
    ".pdf": 'a PDF has no rows; write each document as a line {"text": "…"} of a .jsonl file',
    ".xlsx": f"a workbook of Excel; save its sheet as CSV in UTF-8, or {_AS_LINES}",
    ".xls": f"a workbook of Excel; save its sheet as CSV in UTF-8, or {_AS_LINES}",
    ".arrow": "a file of the datasets library; write it with Dataset.to_parquet or Dataset.to_json",
    ".yaml": f"YAML; {_AS_LINES}",
    ".yml": f"YAML; {_AS_LINES}",
    ".xml": f"XML; {_AS_LINES}",
    ".pkl": f"a pickle, which could run any code; {_AS_LINES}",
    ".pickle": f"a pickle, which could run any code; {_AS_LINES}",
    ".zip": "an archive; unpack it, and name the folder",
    ".tar": "an archive; unpack it, and name the folder",
    ".tgz": "an archive; unpack it, and name the folder",
    ".7z": "an archive; unpack it, and name the folder",
    ".rar": "an archive; unpack it, and name the folder",
    **dict.fromkeys((".lz4", ".lzma", ".br", ".z"), "compressed in a way that is not read here; unpack it"),
    ".parquet": "Parquet is compressed in itself; unpack the file",
}
_NAMES_SHOWN = 20


def files_of_folder(folder: Path, name: str, split: str) -> tuple[Sequence[Path], list[str]]:
    """The files that hold the rows of a split, in order, and notes that name all others.

    Args:
        folder: searched with its subfolders and with folders that links lead to.
        name: of the folder, as the user gave it.
        split: to read; a file whose name has no word for a split belongs to ``train``.

    Raises:
        UserError: if there is no such file, or a folder cannot be read.
    """
    files: list[Path] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    for path, why in _paths(folder):
        if why is None:
            files.append(path)
        else:
            left_out[why].append(str(path.relative_to(folder)))
    notes = [f"{name}: not read, {why}: {listed(names)}" for why, names in sorted(left_out.items())]
    if not files:
        cures = {cure for names in left_out.values() for each in names if (cure := cure_of(Path(each)))}
        raise UserError(f"{name}: the folder holds no {kinds()} file", *notes, *sorted(cures))
    of_split: dict[str, list[str]] = defaultdict(list)
    for path in sorted(files):
        inside = path.relative_to(folder)
        of_split[_split_of(inside)].append(str(inside))
    if split not in of_split:
        there = sorted(of_split)
        raise UserError(
            f"{name}: no file of the folder names split {split!r}{nearest(split, there)}; "
            f"there are files for {', '.join(there)}"
        )
    chosen = of_split.pop(split)
    for other, names in sorted(of_split.items()):
        notes.append(f"{name}: not read, of split {other} by the name: {listed(names)}")
    if odd := [each for each in chosen if _other_words(Path(each), split)]:
        notes.append(f"{name}: of split {split}, though a word in the name is for another: {listed(odd)}")
    columns = {part for each in chosen for part in Path(each).parts[:-1] if re.fullmatch(r"\w+=.*", part)}
    if columns:
        notes.append(f"{name}: not read, columns in the names of folders: {listed(sorted(columns))}")
    return [folder / each for each in chosen], notes


def listed(names: Sequence[str]) -> str:
    """Names for a sentence, cut to the first ones if there are many."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def kinds() -> str:
    """The kinds of files that hold rows, for a sentence."""
    return ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"


def cure_of(path: Path) -> str | None:
    """What a file that holds no rows is, and how to make rows of it; None for an unknown kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return _CURES.get(suffixes[-1]) if suffixes else None


def _paths(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield every file below `folder`, and every folder not read, with why it is not read; None if it is."""
    seen: set[tuple[int, int]] = set()
    # Links to folders come last, so that a folder that lies here is read under its own name.
    waiting = [folder]
    while waiting:
        top = waiting.pop(0)
        if top != folder and _leads_back(top, folder):
            yield top, "a link to a folder that it lies in"
            continue
        for parent, folders, files in os.walk(top, onerror=_refuse):
            about = os.stat(parent)
            if (about.st_dev, about.st_ino) in seen:
                yield Path(parent), "a folder that is read by another name"
                folders.clear()
                continue
            seen.add((about.st_dev, about.st_ino))
            links = [each for each in sorted(folders) if Path(parent, each).is_symlink()]
            hidden = [each for each in folders if each.startswith(".") and each not in _PASSED_OVER]
            yield from ((Path(parent, each), "hidden") for each in hidden)
            folders[:] = [each for each in folders if each not in (*_PASSED_OVER, *hidden, *links)]
            waiting += [Path(parent, each) for each in links if each not in (*_PASSED_OVER, *hidden)]
            for path in (Path(parent, each) for each in sorted(files) if each not in _PASSED_OVER):
                link = path.is_symlink() and path.exists()
                inside = link and path.resolve().is_relative_to(folder.resolve())
                yield path, "a link to a file that lies here too" if inside else _why_not(path)


def _leads_back(link: Path, folder: Path) -> bool:
    target = link.resolve()
    return any(place.resolve().is_relative_to(target) for place in (folder, link.parent))


def _why_not(path: Path) -> str | None:
    """Why a path holds no rows; None if it does."""
    if path.name.startswith("."):
        return "hidden"
    if path.name in _METADATA_FILES:
        return "a description of a data set"
    if not path.exists():
        return "a broken link"
    if not path.is_file():
        return "no regular file"
    return None if data_suffix(path) else "of no kind that holds rows"


def _split_of(path: Path) -> str:
    """The split named by the first or last word of a folder's or the file's name; else ``train``."""
    for words in _words(path):
        for word in (*words[:1], *words[-1:]):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"


def _other_words(path: Path, split: str) -> bool:
    return any(_SPLIT_WORDS.get(word, split) != split for words in _words(path) for word in words)


def _words(path: Path) -> list[list[str]]:
    """The words in the names of the folders that the file lies in, and in its own name."""
    stem = Path(path.name)
    while stem.suffix.lower() in (*SUFFIXES, *COMPRESSED):
        stem = stem.with_suffix("")
    names = [_HELD_OUT.sub(r"\1out", name.lower()) for name in (*path.parts[:-1], stem.name)]
    parts = [re.findall(r"[a-z]+", name) for name in names]
    return [[_OF_SET.sub(r"\1", word) for word in words if word not in _OF_PARTS] for words in parts]


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: the folder cannot be read: {reason_of(error)}")
