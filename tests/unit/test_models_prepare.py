"""``falcon-qlora prepare``: sizes first, small things next, weights last; then nothing is missing."""

import re
from types import SimpleNamespace

import pytest

from falcon_qlora.commands import prepare
from falcon_qlora.common.errors import UserError
from falcon_qlora.models import hub
from falcon_qlora.models.tiny import tiny_path

GIB = 2**30


@pytest.fixture
def steps(monkeypatch):
    """A hub that has the packaged model as ``some/falcon``, and a record of what was asked of it."""
    asked = []
    sizes = SimpleNamespace(model=3 * GIB, dataset=1 * GIB, free=100 * GIB)

    def plan(kind):
        def planned(name, **_):
            asked.append(f"plan {kind}")
            missing = getattr(sizes, kind)
            return hub.Download(
                repository=name,
                kind=kind,
                files=("a",),
                total_bytes=missing,
                missing_bytes=missing,
                free_bytes=sizes.free,
                cache=tiny_path(),
            )

        return planned

    def fetch(what):
        def fetched(name, **_):
            asked.append(f"fetch {what}")
            return tiny_path()

        return fetched

    monkeypatch.setattr(hub, "plan_model", plan("model"))
    monkeypatch.setattr(hub, "plan_dataset", plan("dataset"))
    monkeypatch.setattr(hub, "fetch_model", fetch("model"))
    monkeypatch.setattr(hub, "fetch_tokenizer", fetch("tokenizer"))
    sizes.asked = asked
    return sizes


def flags(tmp_path, model="some/falcon", data="sample"):
    return ["-m", model, "--dataset_name", data, "--cache_dir", str(tmp_path), "--max_rows", "20"]


def test_sizes_come_first_and_weights_last_and_the_tokens_are_cached(steps, tmp_path, capsys):
    assert prepare.main(flags(tmp_path)) == 0
    assert steps.asked == ["plan model", "fetch tokenizer", "fetch model"]
    assert list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "model some/falcon: 3.00 GiB, 3.00 GiB to download; 100.0 GiB free" in said
    assert "tokenized and cached" in said
    assert "HF_HUB_OFFLINE=1" in said


READY = "ready: the same flags now train without a network (HF_HUB_OFFLINE=1)"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("", READY),
        ("--gpus 2 --lora_r 4", f"{READY}, if train takes --gpus, --lora_r: not looked at here"),
        ("--streaming --max_steps 1", READY),
        (
            "--streaming --max_steps 1 --eval_split some/rows",
            READY.partition("without")[0]
            + "with the rows of some/rows from the hub, which needs the network",
        ),
    ],
)
def test_it_promises_no_more_than_it_has_looked_at(steps, tmp_path, capsys, more, told):
    assert prepare.main([*flags(tmp_path), *more.split()]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_a_disk_too_small_stops_it_before_anything_is_fetched(steps, tmp_path):
    steps.free = 2 * GIB
    with pytest.raises(UserError, match=r"some/falcon needs 3\.0 GiB.*1\.0 GiB short"):
        prepare.main(flags(tmp_path))
    steps.free = 2.5 * GIB
    with pytest.raises(UserError, match=r"some/rows needs 3\.0 GiB"):
        prepare.main(flags(tmp_path, model="tiny", data="some/rows"))
    assert not any("fetch" in step for step in steps.asked)


def test_all_that_is_downloaded_must_fit_together(steps, tmp_path):
    def refused(*more):
        steps.asked.clear()
        with pytest.raises(UserError) as failed:
            prepare.main([*flags(tmp_path, data="some/rows"), *more])
        return str(failed.value), steps.asked.count("plan dataset")

    steps.free = 5 * GIB  # for the model, or three copies of the rows
    told, sets = refused("--eval_split", "0.5")
    assert sets == 1
    assert re.match(
        r"some/rows needs 3\.0 GiB more .* only 2\.0 GiB are free beside .*: 1\.0 GiB short", told
    )
    steps.free = 8 * GIB
    told, sets = refused("--eval_split", "some/held_out")
    assert sets == 2
    assert re.match(r"some/held_out needs 3\.0 GiB more .* only 2\.0 GiB are free beside", told)
    told, sets = refused("--eval_split", "some/rows")  # downloaded once
    assert sets == 1
    assert "GiB" not in told
    (tmp_path / "held_out.jsonl").write_text('{"text": "here"}\n')
    assert refused("--eval_split", str(tmp_path / "held_out.jsonl"))[1] == 1


def test_a_mistake_in_the_data_shows_before_the_weights_come(steps, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"nothing": "known"}\n')
    with pytest.raises(UserError):
        prepare.main(flags(tmp_path, data=str(tmp_path / "rows.jsonl")))
    assert "fetch model" not in steps.asked


def test_without_a_hub_it_goes_on_with_the_caches(steps, tmp_path, monkeypatch, capsys):
    def unreachable(name, **_):
        raise hub.Unreachable("the hub cannot be reached (timed out)")

    monkeypatch.setattr(hub, "plan_model", unreachable)
    assert prepare.main(flags(tmp_path)) == 0
    assert "going on with what the caches hold" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["tiny", "random:falcon-7b"])
def test_models_that_are_here_ask_the_hub_for_nothing(steps, tmp_path, model):
    arguments = [*flags(tmp_path, model=model), "--tokenizer_name_or_path", str(tiny_path())]
    assert prepare.main(arguments) == 0
    assert steps.asked == []
