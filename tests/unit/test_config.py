"""The configuration: what wins, what is refused and how it is said, and the reference's recipes."""

import dataclasses
import enum
import json
import re
import types
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from falcon_qlora import config
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.settings import Setting, settings_of
from falcon_qlora.common.untrusted import as_yaml, parse_yaml
from falcon_qlora.config.arguments import our_settings
from falcon_qlora.config.parser import RECIPES, recipe_names
from falcon_qlora.config.trainer_arguments import INSTEAD, SHARED, TrainerArguments, holds_anyway
from tests.fuzzing import fuzz


def resolved(*argv: str) -> dict:
    return config.parse(list(argv)).resolved()


def refusal(*argv: str) -> str:
    """Why these flags are refused; "" if they are not."""
    try:
        resolved(*argv)
    except UserError as error:
        return str(error)
    return ""


def write(path: Path, **settings: object) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


PREFIX = {"adapter_prefix_length": 10, "adapter_first_block": 2}


class TestRecipes:
    """Settings against the first reference's guide."""

    LAMBDA = {
        "compute_dtype": "fp16",
        "double_quantization": False,
        "norms_in_float32": True,
        "llm_int8_threshold": 6.0,
        "dataset_name": ["timdettmers/openassistant-guanaco"],
        "dataset_train_split": "train",
        "dataset_format": "text",
        "text_column": None,
        "template": "none",
        "train_on": "all",
        "append_end_token": True,
        "max_length": 512,
        "overlong": "truncate",
        "packing": False,
        "padding": "max_length",
        "train_sampling_strategy": "group_by_length",
        "streaming": False,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "lora_target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        "use_rslora": False,
        "use_dora": False,
        "max_steps": 50,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "global_batch_size": None,
        "optim": "paged_adamw_32bit",
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.3,
        "checkpointing": "full",
        "eval_split": None,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": ["wandb"],
        "early_stopping": 0,
    }

    @pytest.mark.parametrize(
        ("recipe", "model", "mode"),
        [
            ("lambda-7b-4bit", "ybelkada/falcon-7b-sharded-bf16", "4bit"),
            ("lambda-7b-8bit", "ybelkada/falcon-7b-sharded-bf16", "8bit"),
            ("lambda-40b-4bit", "tiiuae/falcon-40b", "4bit"),
            ("lambda-40b-8bit", "tiiuae/falcon-40b", "8bit"),
        ],
    )
    def test_lambda_recipes_are_the_guide_setting_for_setting(
        self, recipe: str, model: str, mode: str
    ) -> None:
        settings = resolved("--recipe", recipe)
        expected = self.LAMBDA | {"model_name_or_path": model, "quantize_mode": mode, "recipe": recipe}
        assert {name: settings[name] for name in expected} == expected

    LIT = {
        "model_name_or_path": "tiiuae/falcon-7b",
        "quantize_mode": "16bit",
        "compute_dtype": "bf16",
        "dataset_name": ["yahma/alpaca-cleaned"],
        "dataset_format": "alpaca",
        "template": "alpaca",
        "train_on": "all",
        "append_end_token": True,
        "max_length": 256,
        "overlong": "truncate",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant_with_warmup",
        "global_batch_size": 64,
        "warmup_steps": 0.03,
    }

    @pytest.mark.parametrize(
        ("recipe", "method"),
        [
            ("lit-adapter", PREFIX | {"method": "adapter", "learning_rate": 9e-3, "weight_decay": 0.02}),
            (
                "lit-adapter-v2",
                PREFIX | {"method": "adapter_v2", "learning_rate": 3e-3, "weight_decay": 0.02},
            ),
            (
                "lit-lora",
                {"method": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
                | {"lora_slices": ["query", "value"], "learning_rate": 3e-4, "weight_decay": 0.01},
            ),
            ("lit-full", {"method": "full", "learning_rate": 5e-5, "weight_decay": 0.02}),
            (
                "lit-qlora",
                {"method": "lora", "quantize_mode": "4bit", "lora_r": 64, "learning_rate": 2e-4}
                | {"max_grad_norm": 1.0, "lr_scheduler_type": "cosine"},
            ),
        ],
    )
    def test_lit_recipes_are_the_comparison_but_for_what_they_say(
        self, recipe: str, method: dict[str, object]
    ) -> None:
        settings = resolved("--recipe", recipe)
        expected = self.LIT | method
        assert {name: settings[name] for name in expected} == expected
        assert round(float(settings["eval_split"]) * 51_760) == 2_000

    @pytest.mark.parametrize(
        ("recipe", "rate"),
        [
            ("lit-adapter", r"the stated rate of (\S+) was never reached; it is now"),
            ("lit-adapter-v2", r"was never reached; here the rate is (\S+),"),
            ("lit-full", r"would destroy the model: (\S+) here"),
            ("lit-lora", None),
            ("lit-qlora", None),
        ],
    )
    def test_the_comments_of_lit_recipes_say_what_they_set(self, recipe: str, rate: str | None) -> None:
        text, settings = (RECIPES / f"{recipe}.yaml").read_text(), resolved("--recipe", recipe)
        comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))

        def said(pattern: str) -> list[float]:
            found = re.search(pattern, comments)
            assert found is not None, pattern
            return [float(number) for number in found.groups()]

        step = [settings["global_batch_size"], settings["max_length"]]
        assert said(r"Training: (\d+) × (\d+) tokens a step hold about 128 rows") == step
        if rate is not None:
            assert said(rate) == [settings["learning_rate"]]
        if recipe in ("lit-adapter", "lit-adapter-v2", "lit-lora"):
            assert said(r"takes (\d+)% of the run") == [100 * settings["warmup_steps"]]

    def test_full_takes_an_unquantized_base_unless_another_is_asked_for(self) -> None:
        assert resolved("--method", "full")["quantize_mode"] == "16bit"
        assert resolved("--recipe", "lambda-7b-4bit", "--method", "full")["quantize_mode"] == "16bit"

    def test_slices_and_linears_unseat_each_other(self) -> None:
        settings = resolved("--recipe", "lit-lora", "--lora_target_modules", "dense")
        assert (settings["lora_slices"], settings["lora_target_modules"]) == (None, ["dense"])
        settings = resolved("--recipe", "lambda-7b-4bit", "--lora_slices", "value")
        assert (settings["lora_slices"], settings["lora_target_modules"]) == (["value"], None)

    def test_guide_command_line_alone_gives_its_model_steps_and_batch(self) -> None:
        settings = resolved(
            "-m", "tiiuae/falcon-40b", "-q", "8bit", "-s", "7", "-b", "3", "--dataset_name", "x"
        )
        assert settings["model_name_or_path"] == "tiiuae/falcon-40b"
        assert (settings["quantize_mode"], settings["max_steps"]) == ("8bit", 7)
        assert (settings["per_device_train_batch_size"], settings["dataset_name"]) == (3, ["x"])

    def test_default_recipe_is_what_we_recommend(self) -> None:
        settings = resolved()
        expected = {
            "num_train_epochs": 1.0,
            "max_steps": -1,
            "per_device_train_batch_size": 4,
            "max_length": 2048,
            "packing": True,
            "train_on": "answers",
            "compute_dtype": "auto",
            "double_quantization": True,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "max_grad_norm": 1.0,
            "lora_r": 64,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "checkpointing": "auto",
            "kernels": "auto",
            "report_to": ["wandb"],
            "seed": 42,
        }
        assert {name: settings[name] for name in expected} == expected

    def test_default_recipe_says_what_the_dataclasses_say(self) -> None:
        defaults = {each.name: each.default for each in our_settings()}
        recipe = yaml.safe_load((RECIPES / "default.yaml").read_text())
        recipe |= {"dataset_name": [recipe["dataset_name"]], "report_to": [recipe["report_to"]]}
        shared = defaults.keys() & recipe.keys()
        assert {name: recipe[name] for name in shared} == {name: defaults[name] for name in shared}

    @pytest.mark.parametrize("recipe", recipe_names())
    def test_recipe_file_opens_with_the_command_that_runs_it(self, recipe: str) -> None:
        first = (RECIPES / f"{recipe}.yaml").read_text().splitlines()[0]
        assert first.startswith(("# falcon-qlora train", "# torchrun --nnodes 1"))
        assert recipe == "default" or first.endswith(f"--recipe {recipe}")

    def test_recipe_may_be_a_file(self, tmp_path: Path) -> None:
        assert resolved("--recipe", write(tmp_path / "mine.yaml", lora_r=8))["lora_r"] == 8


class TestPrecedence:
    def test_flag_over_config_over_recipe_over_default(self, tmp_path: Path) -> None:
        file = write(tmp_path / "c.yaml", max_steps=11, lora_r=12)
        configuration = config.parse(["--recipe", "lambda-7b-4bit", "--config", file, "-s", "13"])
        assert configuration.run.max_steps == 13
        assert configuration.method.r == 12
        assert configuration.method.dropout == 0.1
        assert configuration.trainer["adam_beta2"] == 0.999
        assert configuration.explicit["max_steps"] == "flag"
        assert configuration.explicit["lora_r"] == file
        assert configuration.explicit["lora_dropout"] == "recipe lambda-7b-4bit"
        assert "adam_beta2" not in configuration.explicit

    @pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
    def test_both_forms_of_config(self, tmp_path: Path, form: list[str]) -> None:
        file = write(tmp_path / "c.yaml", seed=7)
        assert resolved(*(word.format(file) for word in form))["seed"] == 7

    def test_config_may_name_the_recipe_and_a_flag_replaces_it(self, tmp_path: Path) -> None:
        file = write(tmp_path / "c.yaml", recipe="lambda-7b-8bit")
        assert resolved("--config", file)["quantize_mode"] == "8bit"
        assert resolved("--config", file, "--recipe", "lambda-7b-4bit")["quantize_mode"] == "4bit"

    def test_alias_is_the_same_field_everywhere(self, tmp_path: Path) -> None:
        file = write(tmp_path / "c.yaml", steps=5, model_name="tiny", **{"batch-size-per-device": 2})
        settings = resolved("--config", file, "--max-length", "64")
        assert (settings["max_steps"], settings["model_name_or_path"]) == (5, "tiny")
        assert (settings["per_device_train_batch_size"], settings["max_length"]) == (2, 64)

    def test_flag_replaces_an_alternative_that_the_recipe_chose(self) -> None:
        settings = config.parse(
            ["--recipe", "lambda-7b-4bit", "--packing", "true", "--global_batch_size", "64"]
        )
        assert settings.data.train_sampling_strategy == "random"
        assert settings.run.global_batch_size == 64
        assert config.parse(["--recipe", "lambda-7b-4bit", "--bf16"]).model.compute_dtype == "bf16"

    def test_the_later_of_one_flag_wins(self) -> None:
        assert resolved("-s", "3", "-s", "4")["max_steps"] == 4

    @pytest.mark.parametrize(
        ("words", "value"),
        [(["--packing", "false"], False), (["--no_packing"], False), (["--packing"], True)],
    )
    def test_ways_to_say_a_truth_value(self, words: list[str], value: bool) -> None:
        assert resolved(*words)["packing"] is value


def test_values_from_yaml_have_the_types_of_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "learning_rate: 2e-4\nsave_strategy: no\neval_split: 0.1\nreport_to: none\ndataset_name: [a, b]"
    )
    settings = resolved("--config", str(file))
    assert settings["learning_rate"] == 2e-4  # YAML reads 2e-4 as text
    assert settings["save_strategy"] == "no"  # and no as false
    assert (settings["eval_split"], settings["report_to"]) == ("0.1", ["none"])
    assert settings["dataset_name"] == ["a", "b"]


# YAML 1.2 (https://yaml.org/spec/1.2.2/#1032-tag-resolution): 1.1 reads eight, a text, 5400, a date, a text.
def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_steps: 010\nlora_r: 0x10\nrun_name: 1:30:00\nseed: 0o17\nlearning_rate: 1e-4\n")
    settings = resolved("--config", str(file))
    assert [settings[name] for name in ("max_steps", "lora_r", "run_name", "seed", "learning_rate")] == [
        *(10, 16, "1:30:00", 15, 1e-4)
    ]
    file.write_text("run_name: 2024-01-01\n")
    assert resolved("--config", str(file))["run_name"] == "2024-01-01"


@given(value=st.text(st.sampled_from("0179.eExXoObBf+-_:~nyailsNIT#"), max_size=7) | st.text(max_size=5))
@example("1e4")
@example("0o7")
@example("\x85")
@fuzz(300)
def test_what_is_written_as_yaml_is_read_the_same_by_both_versions(value: str) -> None:
    record = {"a": value, "b": [value, 1, 1e-5, 1e300, None, True]}
    assert parse_yaml(as_yaml(record), "x") == yaml.safe_load(as_yaml(record)) == record


# Of a value that is not of its tag PyYAML raises AttributeError, KeyError or IndexError.
@pytest.mark.parametrize(
    "value",
    ["!!timestamp x", "!!bool perhaps", "!!float ''", "!!float 1:30", "!!set {a}", "!!binary x", "!own 1"],
)
def test_a_tag_is_refused_in_one_line(tmp_path: Path, value: str) -> None:
    file = tmp_path / "config.yaml"
    for text in (f"max_length: {value}", f"dataset_name: [{value}]", f"? {value}"):
        file.write_text(text)
        told = refusal("--config", str(file))
        assert "line 1: not valid YAML: " in told
        assert "tags are not read" in told
    file.write_text('run_name: ! "8"\n')  # says only that it is a text
    assert resolved("--config", str(file))["run_name"] == "8"


HUGE = ["9" * 6000, "0x" + "f" * 6000, "0o" + "7" * 6000, "-" + "9" * 6000, "1e" + "9" * 6000, "x" * 100_000]


@pytest.mark.parametrize(
    "form", ["{name}: {value}", "{name}: [{value}]", "{name}: {{a: {value}}}", "? {value}"]
)
@pytest.mark.parametrize("name", ["max_length", "learning_rate", "packing", "dataset_name", "format", "foo"])
def test_a_huge_value_is_refused_in_a_line_one_can_read(tmp_path: Path, name: str, form: str) -> None:
    file = tmp_path / "config.yaml"
    for value in HUGE:
        file.write_text(form.format(name=name, value=value))
        for argv in (["--config", str(file)], ["--max_length", value], ["--max_length", f"[{value}]"]):
            told = refusal(*argv)
            assert told or name == "dataset_name"  # which may be any text
            assert len(told) < 5000
            assert "\n" not in told


@pytest.mark.parametrize("value", ["9" * 22, "9" * 99, "-" + "9" * 22, str(2**31)])
def test_a_whole_number_is_one_that_the_libraries_can_hold(value: str) -> None:
    for each in our_settings():
        if each.kind is int and each.name != "seed":
            with pytest.raises(UserError, match=r"is too (large|small)|no flag"):
                resolved(f"--{each.name}", value)


def test_json_of_a_flag_is_read() -> None:
    assert resolved("--lr_scheduler_kwargs", '{"num_cycles": 2}')["lr_scheduler_kwargs"] == {"num_cycles": 2}


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--recipe", "lambda-40b-8bit"],
        ["--recipe", "lambda-7b-4bit", "--packing", "true", "--eval_split", "0.1"],
        ["--global_batch_size", "32", "--eval_split", "0.05", "--early_stopping", "2", "-s", "20"],
        ["--bf16", "--eval_split", "split:test", "--eval_steps", "5"],
        ["--eval_split", "rows.jsonl", "--sample_prompts", "Hi", "--generate_samples", "1"],
        ["--dataset_name", "a.jsonl", "b.csv", "--dataset_weights", "2", "1", "--text_column", "body"],
        ["--streaming", "-s", "9"],
    ],
)  # fmt: skip
def test_a_runs_config_yaml_gives_the_same_settings_back(tmp_path: Path, argv: list[str]) -> None:
    before = resolved(*argv)
    file = write(tmp_path / "config.yaml", **before)
    assert resolved("--config", file) == before
    json.dumps(before)


def test_a_runs_config_yaml_does_not_bind_the_next_run_to_its_folder() -> None:
    settings = resolved("--output_dir", "runs/a", "--resume")
    assert not settings.keys() & {"output_dir", "resume", "overwrite"}


def test_secrets_are_taken_but_never_recorded() -> None:
    configuration = config.parse(
        [
            "--push_to_hub", "--hub_model_id", "me/mine", "--hub_token", "hf_SECRET",
            "--dataset_name", "https://me:SECRET@host/rows.jsonl?page=2&X-Amz-Signature=SECRET&token=SECRET#end",
            "--cache_dir", "s3://key:SECRET@bucket/cache",
        ]
    )  # fmt: skip
    assert configuration.trainer["hub_token"] == "hf_SECRET"
    assert "SECRET" not in yaml.safe_dump(configuration.resolved())
    assert "page=2" in configuration.resolved()["dataset_name"][0]
    assert "SECRET" in configuration.data.dataset_name[0]


class TestWhatFollows:
    def test_a_held_out_split_is_evaluated_and_the_best_checkpoint_kept(self) -> None:
        settings = resolved("--eval_split", "0.05")
        assert (settings["eval_strategy"], settings["load_best_model_at_end"]) == ("steps", True)

    def test_saving_follows_evaluating_where_only_one_is_given(self) -> None:
        evaluating = resolved("--eval_split", "0.05", "--eval_strategy", "epoch")
        assert (evaluating["save_strategy"], evaluating["save_every_minutes"]) == ("best", 10)
        saving = resolved("--eval_split", "0.05", "--save_steps", "50")
        assert (saving["eval_steps"], saving["save_steps"]) == (50, 50)

    def test_saves_are_by_the_clock_unless_it_is_said_at_which_steps(self, tmp_path: Path) -> None:
        def saving(*words: str) -> tuple[object, ...]:
            settings = resolved(*words)
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
            found = [
                (each["save_strategy"], each["save_steps"], each["save_every_minutes"])
                for each in (settings, resolved("--config", str(tmp_path / "config.yaml")))
            ]
            assert found[0] == found[1]
            return found[0]

        assert saving() == ("steps", None, 10)
        assert saving("--save_steps", "50") == ("steps", 50, 0)
        assert saving("--save_steps", "50", "--save_every_minutes", "3") == ("steps", 50, 3)
        assert saving("--save_strategy", "steps") == ("steps", 0.1, 0)
        assert saving("--save_strategy", "no") == ("no", None, 0)
        assert saving("--save_strategy", "epoch") == ("epoch", None, 0)
        assert saving("--eval_split", "0.1") == ("best", None, 10)
        assert saving("--eval_split", "0.1", "--load_best_model_at_end", "false") == ("steps", None, 10)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved()))
        again = resolved("--config", str(tmp_path / "config.yaml"), "--eval_split", "0.1")
        assert again["save_strategy"] == "best"

    def test_evaluating_follows_saving_in_the_settings_of_a_run_without_evaluation(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved("--save_steps", "50")))
        settings = resolved("--config", str(tmp_path / "config.yaml"), "--eval_split", "0.05")
        assert (settings["eval_strategy"], settings["eval_steps"], settings["save_steps"]) == (
            "steps",
            50,
            50,
        )

    def test_a_recipe_without_checkpoints_still_evaluates(self) -> None:
        settings = resolved("--recipe", "lambda-7b-4bit", "--eval_split", "0.05")
        assert (settings["eval_strategy"], settings["save_strategy"]) == ("steps", "no")
        assert settings["load_best_model_at_end"] is False

    def test_evaluation_batch_follows_the_training_batch(self) -> None:
        assert resolved("-b", "3")["per_device_eval_batch_size"] == 3
        assert (
            resolved("-b", "3", "--eval_split", "0.1", "--per_device_eval_batch_size", "5")[
                "per_device_eval_batch_size"
            ]
            == 5
        )

    def test_a_short_run_logs_every_step_unless_told(self) -> None:
        assert resolved("-s", "20")["logging_steps"] == 1
        assert resolved("-s", "20", "--logging_steps", "5")["logging_steps"] == 5
        assert resolved("-s", "500")["logging_steps"] == 10

    @pytest.mark.parametrize(
        ("argv", "dtype"),
        [
            (["--bf16"], "bf16"),
            (["--fp16", "true"], "fp16"),
            (["--bf16", "false"], "fp32"),
            (["--fp16", "false"], "auto"),
            (["--bf16", "--compute_dtype", "bf16"], "bf16"),
        ],
    )
    def test_trainers_names_for_the_compute_type(self, argv: list[str], dtype: str) -> None:
        settings = resolved(*argv)
        assert settings["compute_dtype"] == dtype
        assert not settings.keys() & {"bf16", "fp16"}

    def test_columns_that_were_renamed(self) -> None:
        data = config.parse(["--text_column", "body", "--output_column", "answer"]).data
        assert data.columns() == {"text": "body", "output": "answer"}


@dataclasses.dataclass(kw_only=True)
class Extra:
    adapter: str | None = dataclasses.field(default=None, metadata={"help": "Folder of the adapter."})
    temperature: float = dataclasses.field(default=0.7, metadata={"help": "Of sampling."})


def test_a_commands_own_flags(tmp_path: Path) -> None:
    configuration = config.parse(["--adapter", "a", "-m", "tiny"], extra_arguments=Extra)
    assert configuration.extra == Extra(adapter="a", temperature=0.7)
    # A shared setting of the same name is another: what a run began with.
    assert "adapter" not in configuration.resolved()
    file = write(tmp_path / "c.yaml", adapter="a")
    assert config.parse(["--config", file], extra_arguments=Extra).extra.adapter is None
    assert config.parse(["--config", file]).run.adapter == "a"
    file = write(tmp_path / "d.yaml", temperature=0.5)
    with pytest.raises(UserError, match="only be given as the flag --temperature"):
        config.parse(["--config", file], extra_arguments=Extra)
    with pytest.raises(UserError, match="did you mean --adapter"):
        config.parse(["--adaptr", "a"], extra_arguments=Extra)


def test_resume_takes_a_path_or_none() -> None:
    assert config.parse(["--resume", "--output_dir", "x"]).run.resume == "latest"
    assert config.parse(["--resume", "runs/a/checkpoints/step-3"]).run.resume == "runs/a/checkpoints/step-3"
    assert config.parse([]).run.resume is None


class TestForwarded:
    """The settings that TRL's trainer is given, against the installed SFTConfig."""

    FIELDS = tuple(settings_of(TrainerArguments))

    @staticmethod
    def of_the_class() -> dict[str, tuple[set[str], tuple[str, ...] | None, object]]:
        """Field → the names of its types, its choices and its default."""
        from trl import SFTConfig

        found = {}
        hints = typing.get_type_hints(SFTConfig)
        for field in dataclasses.fields(SFTConfig):
            hint = hints[field.name]
            union = typing.get_origin(hint) in (types.UnionType, typing.Union)
            members = typing.get_args(hint) if union else (hint,)
            kinds = {(typing.get_origin(member) or member).__name__ for member in members}
            enums = [each for each in members if isinstance(each, type) and issubclass(each, enum.Enum)]
            choices = [item.value for item in enums[0]] if enums else field.metadata.get("choices")
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            found[field.name] = (
                kinds,
                tuple(choices) if choices else None,
                getattr(default, "value", default),
            )
        return found

    @pytest.mark.parametrize("ours", FIELDS, ids=lambda each: each.name)
    def test_name_type_and_default_are_the_librarys(self, ours: Setting) -> None:
        kinds, choices, default = self.of_the_class()[ours.name]
        assert ("list" if ours.is_list else ours.kind.__name__) in kinds
        if ours.name == "save_steps":  # unset here: by the clock
            assert (ours.optional, ours.default) == (True, None)
        else:
            assert (ours.optional, ours.default) == ("NoneType" in kinds, default)
        assert set(ours.choices or ()) <= set(choices or ())

    def test_what_a_file_may_say_of_what_is_not_taken(self) -> None:
        """The libraries' defaults, whatever release they are of."""
        defaults = {name: default for name, (_, _, default) in self.of_the_class().items() if name in INSTEAD}
        assert {name for name, default in defaults.items() if not holds_anyway(name, default)} == set()

    def test_what_the_trainer_shares_with_us_and_what_is_not_taken(self) -> None:
        library = self.of_the_class().keys()
        ours = {each.name for each in our_settings()}
        assert ours & library == set(SHARED)
        assert not INSTEAD.keys() & (ours | {field.name for field in self.FIELDS})


class TestTraining:
    """The trainer's settings that come of it."""

    def test_what_we_do_ourselves_is_off_in_trl(self) -> None:
        configuration = config.parse(["--gradient_accumulation_steps", "4", "-s", "5", "--eval_split", "0.5"])
        training = configuration.training
        assert configuration.data.packing
        assert not training.packing
        assert not training.padding_free
        assert (configuration.run.gradient_accumulation_steps, training.gradient_accumulation_steps) == (4, 1)
        assert (training.max_steps, training.max_length, training.seed) == (5, 2048, 42)
        assert training.eval_strategy == "steps"
        assert training.load_best_model_at_end
        assert configuration.training is training

    def test_types_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        auto = config.parse([]).training
        assert (auto.bf16, auto.fp16, auto.use_cpu) == (False, False, True)
        assert config.parse(["--compute_dtype", "bf16"]).training.bf16
        assert config.parse(["--compute_dtype", "fp8"]).training.bf16
        assert config.parse(["--recipe", "lambda-7b-4bit"]).training.fp16

    def test_what_trl_refuses_is_told_as_the_users_to_mend(self) -> None:
        configuration = config.parse(["--lr_scheduler_type", "reduce_lr_on_plateau"])
        with pytest.raises(UserError, match="eval strategy"):
            _ = configuration.training


class TestCheckpointing:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([], "auto"),
            (["--gradient_checkpointing", "true"], "full"),
            (["--gradient_checkpointing", "false"], "none"),
            (["--checkpointing", "none"], "none"),
            (["--recipe", "lambda-7b-4bit"], "full"),
            (["--recipe", "lambda-7b-4bit", "--gradient_checkpointing", "false"], "none"),
        ],
    )
    def test_the_trainers_name_means_the_same(self, words: list[str], expected: str) -> None:
        assert config.parse(words).run.checkpointing == expected

    def test_a_contradiction_is_refused(self) -> None:
        with pytest.raises(UserError, match="give --checkpointing alone"):
            config.parse(["--gradient_checkpointing", "true", "--checkpointing", "none"])


def test_a_run_is_gone_on_with_by_its_folder_alone(tmp_path: Path) -> None:
    before = config.parse(["-m", "tiny", "--lora_r", "4", "--dataset_name", "rows.jsonl", "--max_steps", "9"])
    write(tmp_path / "config.yaml", **before.resolved())
    checkpoint = tmp_path / "checkpoints" / "step-3"
    checkpoint.mkdir(parents=True)
    for words in (
        ["--resume", "--output_dir", str(tmp_path)],
        ["--resume", str(tmp_path)],
        ["--resume", str(checkpoint)],
    ):
        again = config.parse([*words, "--max_steps", "12"])
        # Of the first form of settings, whose `auto` did not mean the tokenizer's own chat template.
        assert again.resolved() == {**before.resolved(), "max_steps": 12, "template": "format"}
    # A file that is named says it all, and a run without one is left to the flags.
    other = write(tmp_path / "other.yaml", lora_r=16)
    assert config.parse(["--resume", str(tmp_path), "--config", str(other)]).method.r == 16
    (tmp_path / "config.yaml").unlink()
    assert config.parse(["--resume", str(tmp_path)]).method == config.parse([]).method
