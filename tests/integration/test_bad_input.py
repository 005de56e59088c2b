"""Every bad input, through the command line: status 2, one message that helps, nothing written, nothing lost.

Here in this process, with the launcher's processes replaced by a call: `train` in one process is what each of
them runs. What several processes do with an error is tested in test_bad_input_processes.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from falcon_qlora import __main__ as cli
from falcon_qlora.commands import train as launcher
from falcon_qlora.config import parse
from falcon_qlora.processes import devices, endings
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.training import run
from tests.integration.refusals import (
    PLAIN,
    ROWS,
    contents,
    folder,
    is_no_more_than_phases,
    only_message,
    train,
)
from tests.integration.runs import write_jsonl

__all__ = ["folder"]  # a fixture

GIB = 2**30
Refuse = Callable[..., str]


class Refusal:
    """Runs a command line in an otherwise untouched folder and checks how it was refused."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path):
        self._capsys = capsys
        self._folder = folder

    def __call__(self, *words: str) -> str:
        """The message without its ``error:``."""
        before = contents(self._folder)
        self._capsys.readouterr()
        assert cli.main(list(words)) == 2
        printed = self._capsys.readouterr()
        assert is_no_more_than_phases(printed.out), printed.out
        assert contents(self._folder) == before, "something was written or lost"
        return only_message(printed.err)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `falcon-qlora train` run its one worker in this process."""

    def run_one(argv: list[str], folder: Path, meanwhile: Callable[[], None]) -> int:
        meanwhile()
        quiet_libraries()
        words = argv[argv.index("falcon_qlora.train") + 1 :]
        return endings.exit_status(lambda: run.train(parse(words)))

    monkeypatch.setattr(launcher, "_run_one", run_one)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], folder: Path, in_process: None) -> Refuse:
    return Refusal(capsys, folder)


class TestData:
    def refuse(self, refused: Refuse, *words: str) -> str:
        return refused("train", *PLAIN, *words)

    def test_file_not_found(self, refused: Refuse) -> None:
        message = self.refuse(refused, "--dataset_name", "row.jsonl")
        assert message == "file not found: row.jsonl (did you mean rows.jsonl?)"
        message = self.refuse(refused, "--dataset_name", "another.jsonl")
        assert message == "file not found: another.jsonl"
        message = self.refuse(refused, "--dataset_name", "none/rows.jsonl")
        assert message == "file not found: none/rows.jsonl (nor is there a folder none)"

    def test_held_out_file_not_found(self, refused: Refuse) -> None:
        message = refused(*train("--eval_split", "held_out.jsonl"))
        assert message.startswith("file not found: held_out.jsonl")

    @pytest.mark.parametrize(
        ("name", "text", "place"),
        [
            ("bad.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "bad.jsonl:3: not valid JSON: "),
            (
                "bad.json",
                '[{"text": "a"},\n {"text": }]\n',
                "bad.json:2 (row 2 of the list): not valid JSON: ",
            ),
            ("bad.jsonl", '{"text": "a"}\n["b"]\n', "bad.jsonl:2: expected a JSON object"),
            ("bad.csv", "text,other\na,b\nc\n", "bad.csv:3: 1 fields, but the header has 2 columns"),
        ],
    )
    def test_malformed(self, refused: Refuse, folder: Path, name: str, text: str, place: str) -> None:
        (folder / name).write_text(text)
        assert self.refuse(refused, "--dataset_name", name).startswith(place)

    def test_malformed_rows_of_a_stream(self, refused: Refuse, folder: Path) -> None:
        (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
        message = self.refuse(refused, "--dataset_name", "bad.jsonl", "--streaming", "true", "--steps", "2")
        assert message.startswith("bad.jsonl:2: not valid JSON")

    def test_columns_that_fit_no_format(self, refused: Refuse, folder: Path) -> None:
        write_jsonl(folder / "odd.jsonl", [{"question": "Who?", "reply": "Me."}])
        message = self.refuse(refused, "--dataset_name", "odd.jsonl")
        assert "question" in message
        assert "reply" in message
        needed = ("messages", "conversations", "instruction and output", "prompt and completion", "text")
        assert all(need in message for need in needed)
        assert "--instruction_column" in message

    def test_empty_data(self, refused: Refuse, folder: Path) -> None:
        (folder / "empty.jsonl").write_text("\n")
        assert "empty.jsonl" in self.refuse(refused, "--dataset_name", "empty.jsonl")
        (folder / "nothing").mkdir()
        assert "nothing: the folder holds no" in self.refuse(refused, "--dataset_name", "nothing")

    def test_no_answer_in_any_row(self, refused: Refuse, folder: Path) -> None:
        write_jsonl(folder / "unanswered.jsonl", [{"instruction": "Who?", "output": " "}] * 3)
        message = self.refuse(refused, "--dataset_name", "unanswered.jsonl")
        assert "nothing is left to train on" in message
        assert "3 (empty answer; first: unanswered.jsonl:1)" in message

    def test_every_answer_beyond_the_maximum_length(self, refused: Refuse, folder: Path) -> None:
        write_jsonl(folder / "long.jsonl", [{"instruction": "Who? " * 90, "output": "Me."}] * 3)
        message = self.refuse(refused, "--dataset_name", "long.jsonl", "--overlong", "truncate")
        assert "3 (no trained token within --max_length; first: long.jsonl:1)" in message

    def test_rows_without_an_answer_are_dropped_and_counted(self, in_process: None, folder: Path) -> None:
        unanswered = {"instruction": "Who?", "output": ""}
        masked = {"instruction": "Who? " * 90, "output": "Me."}
        write_jsonl(folder / "some.jsonl", [*ROWS, unanswered, unanswered, masked])
        words = "--dataset_name some.jsonl --overlong truncate --steps 1 --output_dir out".split()
        assert cli.main(["train", *PLAIN, *words]) == 0
        record = json.loads((folder / "out/data.json").read_text())
        assert record["rows_read"] == len(ROWS) + 3
        assert record["rows_dropped_empty"] == 2
        assert record["rows_dropped_cut"] == 1
        assert record["documents"] == len(ROWS)


class TestModel:
    @pytest.mark.parametrize(
        ("model_type", "named"), [("falcon_mamba", "a Falcon-Mamba"), ("gpt2", "of type 'gpt2'")]
    )
    def test_no_classic_falcon(self, refused: Refuse, folder: Path, model_type: str, named: str) -> None:
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 64}))
        message = refused(*train("-m", "model"))
        assert f"this model is {named}" in message
        assert "falcon-7b" in message

    def test_no_model(self, refused: Refuse, folder: Path) -> None:
        (folder / "model").mkdir()
        assert "no config.json" in refused(*train("-m", "model"))
        assert "There is no folder './elsewhere'" in refused(*train("-m", "./elsewhere"))
        message = refused(*train("-m", "random:falcon-7"))
        assert "did you mean falcon-7b?" in message

    def test_without_the_linear_to_be_adapted(self, refused: Refuse) -> None:
        message = refused(*train("--lora_target_modules", "query_key", "dense"))
        assert "no linear 'query_key' (did you mean query_key_value?)" in message

    def test_that_exceeds_the_gpu(self, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "local_device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GIB, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")
        message = refused(
            *train("-m", "random:falcon-40b", "-q", "8bit", "--lora_target_modules", "all-linear")
        )
        # Linears of 40.8e9 bytes in 8 bits with a scale a row and an embedding of 1.1e9 in 16 bits, and 444M
        # adapter weights in 32 bits.
        assert "its weights in 8bit take 39.0 GiB and the adapter 1.7 GiB" in message
        assert "the GPU has 40.0 GiB free: 0.6 GiB short" in message
        assert "--quantize_mode 4bit" in message

    def test_8bit_on_a_gpu_that_has_none(self, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "local_device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
        message = refused(*train("-q", "8bit", "--compute_dtype", "fp32"))
        assert "8bit needs a GPU of compute capability 7.5 or later; Tesla V100 has 7.0" in message
        assert "--quantize_mode 4bit" in message

    def test_a_gpu_that_the_installed_torch_does_not_serve(
        self, refused: Refuse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(devices, "local_device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_120"])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100-SXM2-16GB")
        message = refused(*train())
        assert message.startswith(
            "Tesla V100-SXM2-16GB (compute capability 7.0) cannot run the installed torch "
            f"{torch.__version__}, which is built for sm_75, sm_80, sm_90, compute_120: install a torch "
            "built for CUDA 12.6"
        )

    def test_hub_not_reached(self, refused: Refuse) -> None:
        message = refused(*train("-m", "tiiuae/falcon-7b"))
        assert message.startswith("tiiuae/falcon-7b is not in the cache")
        for part in ("falcon-qlora prepare", "HF_HOME", "HF_HUB_OFFLINE=1", "local folder"):
            assert part in message

    def test_hub_of_data_not_reached(self, refused: Refuse) -> None:
        for more in ([], ["--streaming", "true", "--steps", "2"]):
            message = refused("train", *PLAIN, "--dataset_name", "timdettmers/openassistant-guanaco", *more)
            assert "timdettmers/openassistant-guanaco: the hub cannot be reached" in message
            for part in ("falcon-qlora prepare", "HF_HOME", "HF_HUB_OFFLINE=1", ".jsonl"):
                assert part in message


class TestFolder:
    def test_with_a_run_in_it(self, refused: Refuse, folder: Path) -> None:
        (folder / "mine/adapter").mkdir(parents=True)
        (folder / "mine/adapter/adapter_model.safetensors").write_bytes(b"weeks of work")
        (folder / "mine/config.yaml").write_text("seed: 1\n")
        message = refused(*train("--output_dir", "mine"))
        assert message.startswith("--output_dir mine: this folder holds a run already")
        assert "--resume" in message
        assert "--overwrite" in message

    @pytest.mark.parametrize(
        "mistake",
        [["--dataset_name", "bad.jsonl"], ["-m", "tiiuae/falcon-7b"], ["--lora_target_modules", "no"]],
    )
    def test_to_overwrite_is_kept_until_the_run_starts(
        self, refused: Refuse, folder: Path, mistake: list[str]
    ) -> None:
        (folder / "bad.jsonl").write_text("{")
        (folder / "mine").mkdir()
        (folder / "mine/config.yaml").write_text("seed: 1\n")
        refused(*train("--output_dir", "mine", "--overwrite", "true", *mistake))

    def test_that_cannot_be(self, refused: Refuse, folder: Path) -> None:
        assert "this is a file" in refused(*train("--output_dir", "rows.jsonl"))
        assert "cannot write there" in refused(*train("--output_dir", "rows.jsonl/run"))
        (folder / "empty").mkdir()
        assert "no run there" in refused(*train("--resume", "empty"))
        assert "holds no checkpoint" in refused(*train("--resume", "--output_dir", "empty"))


class TestNames:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--quantise_mode", "4bit"], "unknown flag --quantise_mode (did you mean --quantize_mode?)"),
            (["-q", "4bits"], "(did you mean 4bit?)"),
            (["--template", "alpaka"], "(did you mean alpaca?)"),
            (["--recipe", "lambda-7b-4"], "unknown recipe lambda-7b-4 (did you mean lambda-7b-4bit?)"),
            (["--recipe", "mine.yaml"], "unknown key lora_rank in recipe mine.yaml: give lora_r: 8"),
            (["--config", "mine.yaml"], "unknown key lora_rank in mine.yaml: give lora_r: 8"),
            (["--optim", "adamw_torc"], "(did you mean adamw_torch?)"),
            (["--report_to", "wanb"], "(did you mean wandb?)"),
        ],
    )
    def test_that_are_unknown(self, refused: Refuse, folder: Path, words: list[str], message: str) -> None:
        (folder / "mine.yaml").write_text("lora_rank: 8\n")
        assert message in refused(*train(*words))

    def test_of_a_command(self, refused: Refuse) -> None:
        assert "did you mean train?" in refused("trian", *PLAIN)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["data", "-m", "tiny", "--dataset_name", "row.jsonl"], "did you mean rows.jsonl?"),
            (["prepare", "-m", "tiny", "--dataset_name", "row.jsonl"], "did you mean rows.jsonl?"),
            (["generate", "--adapter", "nowhere"], "One on the hub is downloaded first"),
        ],
    )
    def test_in_the_other_commands(self, refused: Refuse, words: list[str], message: str) -> None:
        assert message in refused(*words)
