"""Which test changes which file at random: a file that is written, or a module that reads, is in a list here.

The numbers of examples are small, so that every run of the tests has them; the slow test has more.
"""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import falcon_qlora
from tests.integration import test_fuzz_checkpoints as checkpoints
from tests.integration import test_fuzz_folders as folders
from tests.unit import test_fuzz_cache, test_fuzz_inputs, test_fuzz_models, test_untrusted

# What commands write and read again, by where it lies; `written` has all of it but what PARTS says.
FUZZED = {
    "*/checkpoints/*/manifest.json": checkpoints.test_before_anything_is_loaded,
    "*/checkpoints/*/trainer_state.json": checkpoints.test_before_anything_is_loaded,
    "*/checkpoints/*/*": checkpoints.test_what_is_taken_up,
    "*/adapter/*": folders.test_readers,
    "merged/*": folders.test_inspect,
    "run/*.json*": folders.test_readers,
    "full/*.json*": folders.test_readers,
    "streamed/*.json*": folders.test_readers,
    "*/config.yaml": checkpoints.test_before_anything_is_loaded,
    "cache/*/*": test_fuzz_cache.test_no_damage_of_the_cache_changes_the_tokens,
    "rows.jsonl": test_fuzz_inputs.test_files_that_a_user_names,
}
NEVER_READ = ["*/loss.png", "*/checkpoints/*/README.md", "*/adapter/README.md"]
# Modules that read files, and what changes those at random; None where they are the package's own, the
# system's, or what the same process has just written.
READERS = {
    "training/held_out.py": folders.test_commands,
    "commands/inspection.py": folders.test_inspect,
    "commands/opening.py": test_fuzz_models.test_what_answers_take_from_a_merge,
    "bench/tables.py": test_fuzz_inputs.test_files_that_a_user_names,
    "bench/scaling.py": folders.test_readers,
    "checkpoint/optimizer_parts.py": checkpoints.test_what_is_taken_up,
    "checkpoint/process_state.py": checkpoints.test_what_is_taken_up,
    "checkpoint/resume.py": checkpoints.test_before_anything_is_loaded,
    "checkpoint/manifest.py": checkpoints.test_before_anything_is_loaded,
    "commands/generate.py": test_fuzz_inputs.test_files_that_a_user_names,
    "config/parser.py": test_fuzz_inputs.test_files_that_a_user_names,
    "data/documents.py": test_fuzz_cache.test_no_damage_of_the_cache_changes_the_tokens,
    "data/files.py": test_fuzz_inputs.test_files_that_a_user_names,
    "data/text_files.py": test_fuzz_inputs.test_files_that_a_user_names,
    "data/sources.py": test_fuzz_inputs.test_files_that_a_user_names,
    "data/templates.py": test_fuzz_inputs.test_files_that_a_user_names,
    "merge/certificate.py": test_fuzz_models.test_what_a_merge_takes_from_it,
    "models/folder.py": test_fuzz_models.test_what_a_merge_takes_from_it,
    "methods/adapter_folder.py": test_untrusted.test_no_adapter_makes_the_reader_crash,
    "methods/full.py": folders.test_inspect,
    "methods/lora_folder.py": test_untrusted.test_no_adapter_makes_the_reader_crash,
    "methods/new_tokens.py": test_fuzz_inputs.test_files_that_a_user_names,
    "methods/lora_layers.py": test_untrusted.test_no_adapter_makes_the_reader_crash,
    "models/checkpoints.py": test_fuzz_models.test_torch_files,
    "models/prepared.py": test_fuzz_models.test_quantized,
    "models/quantized_files.py": test_fuzz_models.test_quantized,
    "models/schemes.py": test_fuzz_models.test_quantized,
    "models/fingerprint.py": test_fuzz_models.test_what_a_merge_takes_from_it,
    "models/tensor_files.py": test_untrusted.test_no_model_makes_the_loader_crash,
    "models/tokenizer.py": test_fuzz_models.test_tokenizer,
    "run_folder/directory.py": folders.test_readers,
    "run_folder/choose.py": None,
    "run_folder/lock.py": test_fuzz_inputs.test_what_a_lock_tells_of_its_holder,
    "common/recorded_paths.py": folders.test_readers,
    "common/by_url.py": test_fuzz_inputs.test_what_a_mark_at_an_address_says,
    "checkpoint/mirror.py": test_fuzz_inputs.test_what_a_mark_at_an_address_says,
    "checkpoint/bring.py": checkpoints.test_before_anything_is_loaded,
    "training/resume.py": None,  # a manifest's bytes, to compare them
    "common/untrusted.py": test_untrusted.test_no_model_makes_the_loader_crash,
    "common/settings.py": None,
    "common/library_imports.py": None,
    "common/host_memory.py": None,
    "processes/launcher.py": None,
    "processes/cores.py": None,
    "processes/lookout.py": None,  # as the next: what ranks write into torch's store
    "processes/meeting.py": None,
    "run_folder/environment.py": None,
    "training/alike.py": None,
    "models/locate.py": test_untrusted.test_no_model_makes_the_loader_crash,
    "commands/train.py": None,
    "commands/worker.py": None,
    "processes/ranks.py": None,
    "processes/command_clock.py": None,
    "checkpoint/adapter_check.py": checkpoints.test_before_anything_is_loaded,
    "config/help.py": None,
    "processes/endings.py": None,
    "common/files.py": None,
    "models/tiny.py": None,
    "data/sample_data/__init__.py": None,
    "processes/watchdog.py": None,
    "bench/devices.py": None,
    "bench/machine.py": None,
    "run_folder/model_card.py": None,
}
_READS = re.compile(
    r"\b(read_(json|yaml|text|bytes)|parse_yaml|torch\.load|load_file|safe_open|from_pretrained|load_dataset|"
    r"np\.load|from_file|ParquetFile|csv\.reader|json\.loads?|yaml\.(safe_)?load)\(|"
    r"open\(([\w.]+, )?(\"rb?\"|\"rb\+\"|newline|encoding|errors|\))"
)


def test_every_file_that_is_written_is_changed_or_never_read(written):
    files = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    unknown = [
        file
        for file in files
        if not any(fnmatch.fnmatch(file, pattern) for pattern in (*FUZZED, *NEVER_READ))
    ]
    assert not unknown, f"read by no test with random changes: {unknown}"
    unused = [
        pattern
        for pattern in (*FUZZED, *NEVER_READ)
        if not any(fnmatch.fnmatch(file, pattern) for file in files)
    ]
    assert not unused, f"nothing is written there: {unused}"
    # Patterns are wide; what the tests choose from has each name.
    names = {Path(file).name for file in files if "/checkpoints/" in file and not file.endswith("README.md")}
    of_whole_models = {name for name in names if name.startswith(("model", "config.json", "generation_"))}
    assert names - of_whole_models <= set(checkpoints.FILES), names
    of_runs = {file.split("/")[1] for file in files if file.count("/") == 1 and file.split("/")[0] == "run"}
    assert of_runs - {"loss.png"} == set(folders.OF_A_RUN)


def test_every_module_that_reads_is_known():
    package = Path(falcon_qlora.__file__).parent
    reading = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if _READS.search(path.read_text())
    }
    assert reading - READERS.keys() == set(), "which test changes at random what these read?"
    assert READERS.keys() - reading == set(), "these read nothing any more"


@pytest.mark.slow
def test_many_more_examples():
    files = [test_fuzz_cache, test_fuzz_inputs, test_fuzz_models, checkpoints, folders]
    paths = [str(module.__file__) for module in files]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *paths],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "FUZZ_TIMES": "3"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
