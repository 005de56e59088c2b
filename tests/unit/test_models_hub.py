"""Models from the hub: what is asked for, what is refused, and what happens without it."""

import json
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoTokenizer

from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import GIB
from falcon_qlora.models import hub, locate
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.models.tokenizer import load_tokenizer

FILES = {
    "README.md": 9000,
    "config.json": 1000,
    "tokenizer.json": 2_000_000,
    "model.safetensors.index.json": 9000,
    "model-00001-of-00002.safetensors": 9 * GIB,
    "model-00002-of-00002.safetensors": 5 * GIB,
    "pytorch_model-00001-of-00001.bin": 14 * GIB,
    "coreml/model.mlpackage": 20 * GIB,
    "modelling_RW.py": 40_000,
}


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub that answers with `answer` (or raises it) and a cache in a folder of its own."""
    fake = SimpleNamespace(answer=FILES, downloaded=None, config={"model_type": "falcon"}, cached=set())

    class Api:
        def model_info(self, repository, *, revision, files_metadata):
            if isinstance(fake.answer, Exception):
                raise fake.answer
            siblings = [SimpleNamespace(rfilename=n, size=s) for n, s in fake.answer.items()]
            return SimpleNamespace(siblings=siblings, sha="0" * 40)

        dataset_info = model_info

    def hf_hub_download(repository, name, *, revision):
        path = tmp_path / name
        path.write_text(json.dumps(fake.config))
        return str(path)

    def snapshot_download(repository, *, revision, allow_patterns=None, local_files_only=False):
        if local_files_only and not (tmp_path / "config.json").exists():
            raise FileNotFoundError("not cached")
        fake.downloaded = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda _, name, **kwargs: name if name in fake.cached else None
    )
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    fake.disk = 100 * GIB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=fake.disk))
    fake.config = {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return fake


def http_error(kind):
    request = httpx2.Request("GET", "https://huggingface.co")
    return kind("no", response=httpx2.Response(401, request=request))


def test_safetensors_are_taken_where_there_are_both(fake_hub, tmp_path):
    assert hub.fetch_model("tiiuae/falcon-7b") == tmp_path
    assert sorted(fake_hub.downloaded) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_torch_files_are_taken_where_there_is_nothing_else():
    names = [
        "config.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.json",
    ]
    assert hub.wanted_files(names, "x/y") == [
        "config.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    with pytest.raises(UserError, match="x/y holds no weights"):
        hub.wanted_files(["config.json", "README.md"], "x/y")


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("files", [["adapter_model.safetensors"], ["adapter_model.bin", "tokenizer.json"]])
def test_an_adapters_repository_is_told_from_a_models(fake_hub, monkeypatch, capsys, offline, files):
    fake_hub.answer = dict.fromkeys(["README.md", "adapter_config.json", *files], 9)
    fake_hub.cached = set(fake_hub.answer)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    told = "tiiuae/some holds an adapter, not a model. Download it .*, name it with --adapter FOLDER, and its"
    for look in (hub.fetch_model, locate.find_config, locate.open_checkpoint):
        with pytest.raises(UserError, match=told):
            look("tiiuae/some")
    assert cli.main(["params", "-m", "tiiuae/some"]) == 2
    assert "name it with --adapter FOLDER" in capsys.readouterr().err
    assert cli.main(["params", "--adapter", "tiiuae/some"]) == 2
    assert "hf download REPOSITORY --local-dir FOLDER" in capsys.readouterr().err
    assert fake_hub.downloaded is None


def test_size_and_free_disk_are_checked_before_any_weights_come(fake_hub):
    fake_hub.disk = 10 * GIB
    with pytest.raises(UserError, match=r"14\.0 GiB more.* 10\.0 GiB are free: 4\.0 GiB short"):
        hub.fetch_model("tiiuae/falcon-7b")
    assert fake_hub.downloaded is None
    fake_hub.cached = {"model-00001-of-00002.safetensors"}
    assert hub.plan_model("tiiuae/falcon-7b").missing_bytes < 6 * GIB
    hub.fetch_model("tiiuae/falcon-7b")
    assert fake_hub.downloaded


@pytest.mark.parametrize(
    ("model_type", "named"),
    [("gpt2", "gpt2"), ("falcon_mamba", "Falcon-Mamba")],
)
def test_other_models_are_refused_before_any_weights_come(fake_hub, model_type, named):
    fake_hub.config = {"model_type": model_type}
    with pytest.raises(UserError, match=f"tiiuae/some.*{named}"):
        hub.fetch_model("tiiuae/some")
    assert fake_hub.downloaded is None


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (RepositoryNotFoundError, "no model 'tiiuae/falcon-8b'"),
        (GatedRepoError, "accept its terms on https://huggingface.co/tiiuae/falcon-8b"),
        (RevisionNotFoundError, "has no revision 'v2'"),
    ],
)
def test_what_the_hub_refuses_is_said(fake_hub, kind, said):
    fake_hub.answer = http_error(kind)
    with pytest.raises(UserError, match=said):
        hub.fetch_model("tiiuae/falcon-8b", revision="v2")


@pytest.mark.parametrize("error", [httpx2.ConnectError("name resolution"), TimeoutError("timed out")])
def test_without_a_hub_the_cache_is_used_or_the_way_out_is_said(fake_hub, tmp_path, error):
    fake_hub.answer = error
    with pytest.raises(
        UserError, match=r"not in the cache.*cannot be reached.*falcon-qlora prepare.*HF_HUB_OFF"
    ):
        hub.fetch_model("tiiuae/falcon-7b")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="in the cache in part only"):
        hub.fetch_model("tiiuae/falcon-7b")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert hub.fetch_model("tiiuae/falcon-7b") == tmp_path


def test_offline_nothing_is_asked(fake_hub, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    fake_hub.answer = AssertionError("asked")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub.fetch_model("tiiuae/falcon-7b")


def test_a_data_sets_size_is_of_its_data_and_of_its_configuration(fake_hub):
    fake_hub.answer = {
        "README.md": 10,
        "a/train.parquet": 4 * GIB,
        "b/train.parquet": 6 * GIB,
        ".gitattributes": 3,
    }
    assert hub.plan_dataset("some/data").total_bytes == 10 * GIB
    one = hub.plan_dataset("some/data", config="a")
    assert one.total_bytes == 4 * GIB
    fake_hub.disk = 10 * GIB
    with pytest.raises(UserError, match=r"needs 12\.0 GiB"):
        hub.plan_dataset("some/data", config="a").check_disk(copies=3)


def test_what_is_on_the_hub_is_told_from_what_is_not(tmp_path):
    assert locate.is_on_hub("tiiuae/falcon-7b")
    assert not any(locate.is_on_hub(name) for name in ["tiny", "random:falcon-7b", str(tmp_path)])
    for name in ["./falcon", "/no/such/folder", str(Path("a") / "b" / "c")]:
        with pytest.raises(UserError, match="no folder"):
            locate.is_on_hub(name)


def test_a_tokenizer_comes_without_the_weights(fake_hub, tmp_path):
    assert hub.fetch_tokenizer("tiiuae/falcon-7b") == tmp_path
    assert sorted(fake_hub.downloaded) == ["config.json", "tokenizer.json"]
    (tmp_path / "config.json").unlink(missing_ok=True)
    fake_hub.answer = TimeoutError("timed out")
    with pytest.raises(
        UserError, match=r"tokenizer of tiiuae/falcon-7b is not in the cache.*falcon-qlora prepare"
    ):
        hub.fetch_tokenizer("tiiuae/falcon-7b")


@pytest.mark.parametrize("model_type", ["falcon", "RefinedWebModel", "RefinedWeb"])
def test_the_tokenizer_of_an_old_configuration_is_loaded_without_remote_code(tmp_path, model_type):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_path() / name, tmp_path)
    config = {"model_type": model_type, "auto_map": {"AutoConfig": "configuration_RW.RWConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    packaged = load_tokenizer("tiny")
    text = "What is 3 + 4?\n"
    assert tokenizer(text)["input_ids"] == packaged(text)["input_ids"]
    assert tokenizer.eos_token_id == packaged.eos_token_id


@pytest.mark.parametrize("model_type", [None, "falcon", "RefinedWeb", "llama", "falcon_h1", "gpt2", "cohere"])
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend", "GPT2TokenizerFast", None])
def test_a_tokenizer_is_what_transformers_makes_of_its_folder(tmp_path, model_type, name):
    settings = json.loads((tiny_path() / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    shutil.copy(tiny_path() / "tokenizer.json", tmp_path)
    named = {} if name is None else {"tokenizer_class": name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | named))
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    text = "<|endoftext|> Falcons, übersetzt\n\n  77 x"
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


FILE = {"rfilename": "config.json", "size": 10}


@pytest.mark.parametrize(
    "answer",
    [
        b"[]",
        b"no JSON",
        b"[" * 20_000,
        b'{"siblings": 3}',
        json.dumps({"id": "x/y", "siblings": [{"size": 1}]}).encode(),
        json.dumps({"id": "x/y", "siblings": [FILE | {"size": "1"}]}).encode(),
        json.dumps({"id": "x/y", "siblings": [FILE | {"rfilename": 5}]}).encode(),
        json.dumps({"id": "x/y", "sha": 5, "siblings": [FILE]}).encode(),
        json.dumps({"id": "x/y", "sha": "a" * 40, "lastModified": "now", "siblings": [FILE]}).encode(),
        json.dumps({"id": "x/y", "sha": "a" * 40, "siblings": [FILE | {"rfilename": "../../x"}]}).encode(),
    ],
)
def test_a_hub_that_answers_with_anything_is_told_of(answer, tmp_path, monkeypatch):
    """The library itself, against a server whose every answer is this one."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
        for name in ("HfApi", "hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(hub, name, partial(getattr(hub, name), endpoint=here))
        for fetch in (hub.fetch_model, hub.fetch_tokenizer):
            with pytest.raises(UserError):
                fetch("x/y")
        server.shutdown()
    assert not (tmp_path.parent / "x").exists()
