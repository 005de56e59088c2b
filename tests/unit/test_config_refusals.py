"""What the configuration refuses, and how it says so."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora import config
from falcon_qlora.common.errors import UserError
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.config.trainer_arguments import INSTEAD
from falcon_qlora.run_folder.directory import RunDirectory


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        config.parse(list(argv))
    return str(caught.value)


def write(path: Path, **settings: object) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["-s", "3", "--steps", "4"], ["-s and --steps are the same setting"]),
        (["--model_name", "a", "--model_name_or_path", "b"], ["--model_name and --model_name_or_path"]),
        (["--packing", "--no_packing"], ["--packing and --no_packing"]),
        (["--quantise_mode", "4bit"], ["--quantise_mode", "did you mean --quantize_mode?"]),
        (["--max_ste", "5"], ["unknown flag --max_ste", "--max_steps"]),
        (["--quantize", "5"], ["unknown flag --quantize", "--quantize_mode"]),
        (["-model", "x"], ["unknown flag -model", "--model_name"]),
        (["rows.jsonl"], ["unexpected argument 'rows.jsonl'"]),
        (["--method", "full", "-q", "4bit"], ["--quantize_mode is 4bit", "cannot take a step"]),
        (["--recipe", "lit-full", "-q", "8bit"], ["--quantize_mode is 8bit", "--method lora"]),
        (["--method", "adapter", "--lora_r", "8"], ["--lora_r does nothing with --method adapter"]),
        (
            ["--method", "adapter", "--lora_r", "8", "--use_dora"],
            ["2 things to mend", "--lora_r does nothing", "--use_dora does nothing"],
        ),
        (
            ["--method", "full", "-q", "4bit", "--lora_r", "8"],
            ["2 things to mend", "--quantize_mode is 4bit", "--lora_r does nothing"],
        ),
        (
            ["--method", "adapter", "--sharding", "zero3", "--lora_r", "8"],
            ["2 things to mend", "--sharding zero3 is for", "--lora_r does nothing"],
        ),
        # What contradicts each other, and what is wrong by itself.
        (
            ["--method", "adapter", "--lora_r", "8", "--early_stopping", "3"],
            ["2 things to mend", "--lora_r does nothing", "--early_stopping happens at"],
        ),
        (["--adapter_first_block", "1"], ["--adapter_first_block does nothing with --method lora"]),
        (["--lora_slices", "querry"], ["did you mean query?"]),
        (["-q", "5bit"], ["-q: '5bit' is not one of 4bit, 8bit, 16bit"]),
        (["--lr_scheduler_type", "cosin"], ["not one of", "did you mean cosine?"]),
        (["--optim", "adamw_torhc"], ["did you mean adamw_torch?"]),
        (["--report_to", "wandb", "tensorbord"], ["did you mean tensorboard?"]),
        (["--template", "alpacca"], ["did you mean alpaca?"]),
        (["--hang_minutes", "-1"], ["--hang_minutes: -1.0 is too small; at least 0"]),
        (["--save_every_minutes", "-0.5"], ["--save_every_minutes", "at least 0"]),
        (["--max_bad_steps", "-1"], ["--max_bad_steps", "at least 0"]),
        (["--early_stopping", "-1"], ["--early_stopping", "at least 0"]),
        (["--generate_samples", "-1"], ["--generate_samples", "at least 0"]),
        (["--max_length", "1"], ["--max_length: 1 is too small; at least 2"]),
        (
            ["--global_batch_size", "4", "--gradient_accumulation_steps", "3"],
            ["--global_batch_size and --gradient_accumulation_steps both"],
        ),
        (["--global_batch_size", "0"], ["--global_batch_size", "at least 1"]),
        (["--per_device_eval_batch_size", "0"], ["--per_device_eval_batch_size", "at least 1"]),
        (["--max_rows", "0"], ["--max_rows", "at least 1"]),
        (["--save_total_limit", "0"], ["--save_total_limit", "at least 1"]),
        (["--lora_r", "0"], ["--lora_r", "at least 1"]),
        (["--lora_dropout", "-0.1"], ["--lora_dropout", "at least 0"]),
        (["--llm_int8_threshold", "-1"], ["--llm_int8_threshold", "at least 0"]),
        (["--learning_rate", "0"], ["--learning_rate: a rate of 0 trains nothing; give one above 0"]),
        (["--learning_rate", "inf"], ["--learning_rate: inf is not a finite number"]),
        (["--learning_rate", "nan"], ["--learning_rate: nan is not a finite number"]),
        (["--learning_rate=-1e-4"], ["--learning_rate: -0.0001 is too small; at least 0"]),
        (["--weight_decay", "-1"], ["--weight_decay", "at least 0"]),
        (["--max_grad_norm", "-1"], ["--max_grad_norm", "at least 0"]),
        (["--warmup_steps", "-1"], ["--warmup_steps", "at least 0"]),
        (["--warmup_steps", "2.5"], ["--warmup_steps", "neither a number of steps nor a ratio"]),
        (["--adam_beta1", "1"], ["--adam_beta1: 1.0 is too large; it must be below 1"]),
        (["--adam_beta2", "-1"], ["--adam_beta2", "at least 0"]),
        (["--adam_epsilon", "-1"], ["--adam_epsilon", "at least 0"]),
        (["--num_train_epochs", "0"], ["--num_train_epochs", "above 0"]),
        (["--logging_steps", "0"], ["--logging_steps", "above 0"]),
        (["--save_steps", "0"], ["--save_steps", "above 0"]),
        (["--eval_steps", "0"], ["--eval_steps", "above 0"]),
        (["--seed", "-1"], ["--seed", "at least 0"]),
        (["--max_steps", "many"], ["--max_steps: 'many' is not a whole number"]),
        (["--learning_rate", "nan"], ["--learning_rate", "finite"]),
        (["--lora_dropout", "1"], ["--lora_dropout", "below 1"]),
        (["--packing", "maybe"], ["--packing: 'maybe' is not true or false"]),
        (["--lr_scheduler_kwargs", "3"], ["--lr_scheduler_kwargs", "mapping"]),
        (["-s", "0"], ["--max_steps: must be at least 1"]),
        (["-b", "0"], ["-b: 0 is too small"]),
        (["-q"], ["-q: expected a value (one of 4bit, 8bit, 16bit)"]),
        (["--recipe", "lambda-7b"], ["unknown recipe lambda-7b", "did you mean lambda-7b-"]),
        (["--recipe", "no/such.yaml"], ["there is no file no/such.yaml"]),
        (["--config", "no/such.yaml"], ["there is no file no/such.yaml"]),
        (["--config"], ["--config: expected a value"]),
        (["--config", "a", "--config=b"], ["--config is given twice"]),
        (
            ["--double_quantization", "-q", "8bit"],
            ["--quantize_mode 4bit, and", "8bit: drop it"],
        ),
        (["--llm_int8_threshold", "3", "-q", "16bit"], ["is a setting of --quantize_mode 8bit"]),
        (["--llm_int8_threshold", "3", "-q", "8bit"], ["is a setting of --kernels off"]),
        (["--hub_private_repo"], ["of --push_to_hub true or --report_to trackio, and", "--report_to wandb"]),
        (["--padding", "max_length"], ["is a setting of --packing false"]),
        (["--hub_model_id", "me/mine"], ["is a setting of --push_to_hub true"]),
        (["--push_to_hub"], ["--push_to_hub needs to know where to"]),
        (["--project", "mine"], ["--report_to trackio, and this run has --report_to wandb"]),
        (["--run_name", "mine", "--report_to", "none"], ["--report_to none: drop it"]),
        (["--eval_steps", "5"], ["--eval_steps is a setting", "hold out rows with --eval_split"]),
        (["--save_steps", "5", "--save_strategy", "epoch"], ["--save_strategy epoch: drop it"]),
        (
            ["--warmup_steps", "5", "--lr_scheduler_type", "constant"],
            ["is not read with", "drop it"],
        ),
        (
            ["--max_steps", "5", "--num_train_epochs", "2"],
            ["--max_steps and --num", "one of them"],
        ),
        (["--dataset_weights", "2"], ["--dataset_weights: one --dataset_name needs none"]),
        (["--streaming", "-s", "2", "--train_sampling_strategy", "sequential"], ["--streaming false"]),
        (["--data_seed", "3"], ["--data_seed is not taken: use --seed"]),
        (["--no-dataloader-in-order"], ["unknown flag --no-dataloader-in-order"]),
        (["--torch_compile"], ["--torch_compile is not taken: use --kernels"]),
        (["--trust_remote_code"], ["--trust_remote_code is not taken", "never"]),
        (["--load-in-4bit", "true"], ["use --quantize_mode 4bit"]),
        (["--warmup_ratio", "0.1"], ["--warmup_steps"]),
        (["--bf16", "--fp16"], ["choose one with --compute_dtype"]),
        (["--bf16", "--compute_dtype", "fp16"], ["--bf16 is true, but --compute_dtype is fp16"]),
        (["--fp16", "false", "--compute_dtype", "fp16"], ["--fp16 is false"]),
        (["--compute_dtype", "fp8", "--kernels", "off"], ["--compute_dtype", "drop --kernels off"]),
        (["--compute_dtype", "fp8", "--lora_dropout", "0.1"], ["--compute_dtype", "set --lora_dropout 0"]),
        (["--compute_dtype", "fp8", "--fp16"], ["--fp16 is true, but --compute_dtype is fp8"]),
        (["--global_batch_size", "8", "--gradient_accumulation_steps", "2"], ["give one of them"]),
        (["--train_sampling_strategy", "group_by_length"], ["--packing false"]),
        (["--dataset_name", "a", "b", "--dataset_weights", "1"], ["1 for 2 of --dataset_name"]),
        (["--dataset_weights", "0"], ["above 0"]),
        (["--streaming"], ["--max_steps"]),
        (["--streaming", "-s", "2", "--dataloader_num_workers", "2"], ["the whole stream; give 1 or 0"]),
        (
            ["--streaming", "-s", "2", "--save_strategy", "epoch"],
            ["--save_strategy epoch", "give steps instead"],
        ),
        (["--eval_split", "1.5"], ["not a fraction"]),
        (["--early_stopping", "3"], ["--eval_split"]),
        (["--eval_strategy", "steps"], ["--eval_split"]),
        (["--generate_samples", "3"], ["--eval_split"]),
        (["--resume"], ["--output_dir"]),
        (["--resume", "--overwrite", "--output_dir", "x"], ["give one of them"]),
        (["--report_to", "none", "wandb"], ["none excludes other trackers"]),
        (
            ["--eval_split", "0.1", "--eval_steps", "10", "--save_steps", "15"],
            ["--save_steps (15) to be a multiple of --eval_steps (10)"],
        ),
    ],
)
def test_flags_are_refused_naming_the_flag_and_what_to_do(argv: list[str], parts: list[str]) -> None:
    message = refusal(*argv)
    assert all(part in message for part in parts), message
    assert message.count("things to mend") <= 1, message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("quantize_mode: 5bit", ["quantize_mode in", "not one of 4bit"]),
        ("optim: adamw_torhc", ["optim in", "did you mean adamw_torch?"]),
        ("learning_rat: 1", ["unknown key learning_rat", "did you mean learning_rate?"]),
        ("steps: 3\nmax_steps: 4", ["gives max_steps twice"]),
        ("seed: 3\nseed: 4", ["line 2", "seed is given twice"]),
        ("seed: 3.5", ["seed in", "'3.5' is not a whole number"]),
        ("seed: true", ["True is not a whole number"]),
        ("seed: null", ["seed in", "needs a value"]),
        ("seed: [1, 2]", ["is not a whole number"]),
        ("lora_target_modules: []", ["the list is empty"]),
        ("padding_free: true", ["padding_free in", "not taken: use --packing"]),
        ("gpus: 2", ["unknown key gpus"]),
        ("- a\n- b", ["expected lines of `setting: value`"]),
        ("a: b: c", ["line 1", "not valid YAML"]),
        ("lr_scheduler_kwargs: x", ["mapping"]),
    ],
)
def test_files_are_refused_naming_the_file_and_the_key(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    message = refusal("--config", str(file))
    assert all(part in message for part in [*parts, str(file)]), message


def test_what_is_no_setting_any_more_is_passed_over_where_it_changes_nothing(tmp_path: Path) -> None:
    """In a file, and told; a value that would have changed something is refused as the flag is."""
    file = write(tmp_path / "c.yaml", ddp_find_unused_parameters=False, data_seed=None, log_level="passive")
    configuration = config.parse(["--config", file])
    assert configuration.resolved() == config.parse([]).resolved()
    assert configuration.passed_over == {file: ("data_seed", "ddp_find_unused_parameters", "log_level")}
    message = refusal("--config", write(tmp_path / "c.yaml", data_seed=3))
    assert message == f"data_seed in {file} is not taken: {INSTEAD['data_seed']}"


@pytest.mark.parametrize(
    "settings",
    [
        {"quantize_mode": "8bit", "double_quantization": False},
        {"quantize_mode": "16bit", "llm_int8_threshold": 3.0},
        {"max_steps": 5, "num_train_epochs": 2.0},
        {"lr_scheduler_type": "constant", "warmup_steps": 0.1},
    ],
)
def test_a_file_may_have_settings_of_another_mode(tmp_path: Path, settings: dict[str, object]) -> None:
    """As the settings of a run do, which are complete."""
    resolved = config.parse(["--config", write(tmp_path / "c.yaml", **settings)]).resolved()
    assert {name: resolved[name] for name in settings} == settings


@pytest.mark.parametrize("words", [["-q", "8bit", "--kernels", "off"], ["--adapter", "somewhere"]])
def test_what_an_adapter_was_trained_on_is_not_known_yet(words: list[str]) -> None:
    assert config.parse([*words, "--llm_int8_threshold", "3"]).model.llm_int8_threshold == 3


def test_of_epochs_and_steps_the_higher_layers_count_and_in_one_file_the_steps(tmp_path: Path) -> None:
    """As the help of --max_steps says; that two flags are refused is above."""
    epochs = write(tmp_path / "epochs.yaml", num_train_epochs=2)
    steps = write(tmp_path / "steps.yaml", max_steps=7)
    both = write(tmp_path / "both.yaml", max_steps=7, num_train_epochs=2)
    in_recipe = "--recipe lambda-7b-4bit"  # which has steps
    assert config.parse(in_recipe.split()).run.max_steps == 50
    for words, max_steps in (
        (f"{in_recipe} --num_train_epochs 2", -1),
        (f"{in_recipe} --config {epochs}", -1),
        (f"--config {steps} --num_train_epochs 2", -1),
        (f"--config {both} --num_train_epochs 3", -1),
        (f"--config {both}", 7),
        (f"--recipe {both}", 7),
        (f"--config {epochs} --max_steps 5", 5),
        (f"--config {both} --max_steps 5", 5),
    ):
        assert config.parse(words.split()).run.max_steps == max_steps, words


def test_the_settings_of_a_later_release_are_refused(tmp_path: Path) -> None:
    """Each with the number of its form; those of before have none."""
    before = config.parse(["-m", "tiny", "--lora_r", "4"]).resolved()
    RunDirectory(tmp_path).write_config(before)
    file = tmp_path / "config.yaml"
    assert "format: 2\n" in file.read_text()
    assert config.parse(["--config", str(file)]).resolved() == before
    file.write_text(file.read_text().replace("format: 2", "format: 3"))
    told = f"{file}: format 3 is newer than this falcon_qlora reads; update it"
    assert refusal("--config", str(file)) == refusal("--resume", str(tmp_path)) == told
    with pytest.raises(UserError, match="format 3 is newer"):
        RunDirectory(tmp_path).read_config()
    assert "unknown key format" in refusal("--config", write(tmp_path / "mine.yaml", format="alpaca"))


@pytest.mark.parametrize(
    ("given", "argv"),
    [
        ({"lora_target_modules": "dense"}, ["--lora_target_modules", "dense"]),
        ({"dataset_name": ("a", Path("b"))}, ["--dataset_name", "a", "b"]),
        ({"cache_dir": Path("x/y"), "lora_r": 8}, ["--cache_dir", "x/y", "--lora_r", "8"]),
        ({"packing": False, "streaming": True, "steps": 3}, ["--no_packing", "--streaming", "-s", "3"]),
        ({"learning_rate": "1e-3"}, ["--learning_rate", "1e-3"]),
        ({"lr_scheduler_kwargs": {"a": [1]}}, ["--lr_scheduler_kwargs", '{"a": [1]}']),
        ({"resume": True, "output_dir": "x"}, ["--resume", "--output_dir", "x"]),
        ({"sample_prompts": ["-x"], "eval_split": 0.5, "generate_samples": 1},
         ["--sample_prompts=-x", "--eval_split", "0.5", "--generate_samples", "1"]),
        ({"config": "no/such.yaml"}, ["--config", "no/such.yaml"]),
        ({"quantise_mode": "4bit"}, ["--quantise_mode", "4bit"]),
        ({"packing": "maybe"}, ["--packing", "maybe"]),
        ({"max_steps": 2.5}, ["--max_steps", "2.5"]),
        ({"padding_free": True}, ["--padding_free"]),
        ({"hang_minutes": -1}, ["--hang_minutes", "-1"]),
    ],
)  # fmt: skip
def test_settings_of_a_call_are_what_flags_are(given: dict[str, object], argv: list[str]) -> None:
    def outcome(make: Callable[[], config.Configuration]) -> object:
        try:
            return make()
        except UserError as error:
            return str(error)

    assert outcome(lambda: config.configure(given)) == outcome(lambda: config.parse(argv))
    if given.keys() - {"config", "quantise_mode", "padding_free", "hang_minutes"} and "maybe" not in argv:
        again = config.as_words(config.read_flags(argv)) if "2.5" not in argv else argv
        assert outcome(lambda: config.parse(again)) == outcome(lambda: config.parse(argv))


def test_what_is_none_in_a_call_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[config.Configuration] = []
    monkeypatch.setattr("falcon_qlora.training.run.train", called.append)
    falcon_qlora.train(model_name_or_path="tiny", max_steps=None, recipe="lambda-7b-4bit")
    assert called == [config.parse(["-m", "tiny", "--recipe", "lambda-7b-4bit"])]
    with pytest.raises(UserError, match="same setting"):
        falcon_qlora.train(model_name="a", model_name_or_path="b")


def test_keys_of_a_recipe_are_checked(tmp_path: Path) -> None:
    assert "unknown key lora_rank in recipe" in refusal("--recipe", write(tmp_path / "r.yaml", lora_rank=3))
    assert "names another recipe" in refusal("--recipe", write(tmp_path / "r.yaml", recipe="default"))


@pytest.mark.parametrize("content", ["hub_token: [a, hf_SECRET]", "hub_token: {a: hf_SECRET}"])
def test_a_token_that_does_not_fit_is_not_repeated(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.yaml").write_text(content)
    said = refusal("--config", str(tmp_path / "settings.yaml"))
    assert "hub_token in" in said
    assert "is not text" in said
    assert "SECRET" not in said


def test_an_address_that_is_refused_is_repeated_without_its_password(
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = "https://me:SECRET@host/rows.jsonl?page=2&X-Amz-Signature=SECRET&token=SECRET"
    for words in (["-m", "tiny", "--dataset_name", address], ["-m", address, "--dataset_name", "sample"]):
        assert cli.main(["data", *words]) == 2
        said = capsys.readouterr().err
        assert "https://host/rows.jsonl?page=2&X-Amz-Signature=removed&token=removed" in said
        assert "SECRET" not in said


opened: set[str] = set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)


@pytest.mark.parametrize("key", ["recipe", "config"])
def test_the_settings_of_a_run_have_no_other_file_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """A run's folder may come from anywhere."""
    other = tmp_path / "other.yaml"
    other.write_text("a_secret: 1\n")
    run = tmp_path / "run"
    (run / "checkpoints" / "step-2").mkdir(parents=True)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny"}')
    file = run / "config.yaml"
    write(file, **config.parse(["-m", "tiny", "--max_steps", "9"]).resolved() | {key: str(other)})
    opened.clear()
    for words in (
        ["train", "--resume", str(run)],
        ["train", "--resume", str(run / "checkpoints" / "step-2")],
        ["train", "--config", str(file), "--resume", str(run)],
        ["train", "--config", str(file), "--output_dir", str(tmp_path / "new")],
        ["eval", "--adapter", str(run), "--dataset_name", "sample"],
    ):
        assert cli.main(words) == 2, words
        told = capsys.readouterr().err
        assert f"{key} in {file}" in told
        assert "a_secret" not in told
    cli.main(["inspect", str(run)])
    assert str(file) in opened
    assert str(other) not in opened
    if key == "recipe":
        # What the user names is opened, and a recipe of the package may be named anywhere.
        assert "unknown key a_secret" in refusal("--resume", str(run), "--recipe", str(other))
        write(file, recipe="lambda-7b-4bit")
        assert config.parse(["--resume", str(run)]).method.dropout == 0.1


def test_settings_are_checked_together_with_those_of_the_run_that_goes_on(tmp_path: Path) -> None:
    """By the launcher too, which has settings of its own."""
    before = config.parse(["-m", "tiny", "--method", "full", "--max_steps", "9"])
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path / "config.yaml", **before.resolved())
    words = ["--resume", str(tmp_path), "--sharding", "zero3", "--gpus", "2"]
    launch = config.parse(words, extra_arguments=LaunchArguments)
    assert (launch.method.name, launch.run.sharding, launch.extra.gpus) == ("full", "zero3", 2)
    write(tmp_path / "config.yaml", **config.parse(["-m", "tiny"]).resolved())
    with pytest.raises(UserError, match="--sharding zero3 is for --method full"):
        config.parse(words, extra_arguments=LaunchArguments)


def test_what_a_recipe_that_is_named_again_says_otherwise_is_known(tmp_path: Path) -> None:
    """The run to resume keeps its own; a flag's value is the user's, and is judged as ever."""
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/config.yaml", model_name_or_path="tiny", lora_r=8, learning_rate=0.001, seed=3)
    recipe = write(tmp_path / "r.yaml", lora_r=16, learning_rate=0.5, seed=3)
    words = ["--resume", str(tmp_path / "run"), "--recipe", recipe]
    configuration = config.parse(words)
    assert (configuration.kept, configuration.method.flags()["lora_r"]) == (("learning_rate", "lora_r"), 8)
    assert config.parse([*words, "--lora_r", "4"]).kept == ("learning_rate",)
    assert config.parse(words[:2]).kept == ()
