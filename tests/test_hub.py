"""The hub, played by a server on 127.0.0.1: a refusal is one clear message, and a dead hub is given up at once."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from exaone_reference import make_exaone
from helpers import make_tokenizer
from stub_hub import Repository, StubHub, ask, stub_hub
from test_bad_input import run_main

from toolkit.config.schema import DataConfig, ModelConfig
from toolkit.data.dataset import load_dataset
from toolkit.data.questions import questions_of
from toolkit.data.sources import read_rows
from toolkit.inference.open_model import open_model
from toolkit.models.load import load, load_tokenizer, resolve_source, stored_dtype
from toolkit.runtime import hub as hub_module
from toolkit.runtime.errors import DataError, ModelError

COMMIT = "e949c91dec92095908d34e6b560af77dd0c993f8"
MODEL, DATA = "LGAI-EXAONE/tiny", "ChuGyouk/PubMedQA-test-Ko"


def write_rows(path: Path, count: int = 20, name: str = "q") -> None:
    """Rows in the columns, and the form, of PubMedQA-test-Ko's one file."""
    rows = [
        {"QUESTION": f"{name} {n}?", "CONTEXTS": ["감염.", f"열 {n}."], "LONG_ANSWER": f"답 {n}.", "LABELS": ["A", "B"]}
        for n in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    make_exaone(root / "model", tied=True)
    write_rows(root / "data" / "pubmedQA_test_translated.json")
    for split in ("train", "validation"):
        write_rows(root / "more" / f"{split}.json", name=split)
    return root


@pytest.fixture
def hub(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """The hub that this process asks, with an empty cache, and no second lost in waiting."""
    repositories = {
        f"models/{MODEL}": Repository(stored / "model", COMMIT),
        f"datasets/{DATA}": Repository(stored / "data", "a" * 40),
        "datasets/org/more": Repository(stored / "more", "b" * 40),
    }
    with stub_hub(repositories) as served:
        ask(monkeypatch, served.url, tmp_path / "hf")
        monkeypatch.setattr(hub_module, "PAUSE_SECONDS", 0.0)
        yield served


def test_a_model_is_loaded_from_its_revision_through_the_redirect_of_its_weights(hub: StubHub) -> None:
    loaded = load(ModelConfig(name_or_path=MODEL, revision=COMMIT, dtype="float32"))
    assert loaded.anatomy.block_count == 6
    assert any(line.startswith("GET /cdn/") and line.endswith("model.safetensors") for line in hub.requests)


def test_an_adapter_on_the_hub_is_not_taken_for_its_base(hub: StubHub, stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored / "model", tmp_path / "adapter")
    named = {"peft_type": "LORA", "base_model_name_or_path": "org/somebody-elses"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(named))
    hub.repositories["models/org/adapter"] = Repository(tmp_path / "adapter", COMMIT)
    for name in ("org/adapter", str(tmp_path / "adapter")):
        with pytest.raises(ModelError, match=r"holds an adapter .*name that model.* in model\.delta"):
            load(ModelConfig(name_or_path=name, dtype="float32"))
    assert not any("somebody-elses" in line for line in hub.requests)


def test_a_model_and_a_data_set_that_moved_are_followed(hub: StubHub) -> None:
    hub.moved = {"org/old": MODEL, "org/rows": DATA}
    assert load_tokenizer(ModelConfig(name_or_path="org/old", revision=COMMIT)).eos_token == "[|endofturn|]"
    assert len(read_rows("org/rows")) == 20


def test_the_only_split_is_taken_and_said(hub: StubHub, said: list[str]) -> None:
    rows = read_rows(DATA)
    assert rows[0].origin == f"{DATA}[test] row 1"
    assert f"{DATA} has one split, test, which is taken" in said
    assert len(questions_of(read_rows(DATA, None, "--split"), DataConfig())) == len(read_rows(DATA, "test")) == 20


def test_of_several_splits_the_usual_one_is_taken_and_said(hub: StubHub, said: list[str]) -> None:
    assert read_rows("org/more")[0].values["QUESTION"] == "train 0?"
    assert said[-1] == "org/more has the splits train, validation; train is taken, as data.split names none"
    assert read_rows("org/more", default_split="validation")[0].values["QUESTION"] == "validation 0?"
    with pytest.raises(DataError, match="has the splits train, validation, and --split names none of them"):
        read_rows("org/more", key="--split", default_split="test")


def test_one_set_for_both_takes_its_validation_split(hub: StubHub) -> None:
    tokenizer = make_tokenizer()
    dataset = load_dataset(DataConfig(path="org/more", validation="org/more"), tokenizer, 0)
    assert {example.origin.partition(" ")[0] for example in dataset.train} == {"org/more[train]"}
    assert {example.origin.partition(" ")[0] for example in dataset.validation} == {"org/more[validation]"}
    with pytest.raises(
        DataError, match=r"20 of 20 validation rows are training rows as well \(org/more\[train\] row 1"
    ):
        load_dataset(DataConfig(path="org/more", validation="org/more", validation_split="train"), tokenizer, 0)
    with pytest.raises(DataError, match="20 of 20 validation rows are training rows as well"):
        load_dataset(DataConfig(path=DATA, validation=DATA), tokenizer, 0)


def test_a_part_of_a_split_can_be_asked_for(hub: StubHub) -> None:
    assert len(read_rows("org/more", "train[:3]+validation")) == 23


@pytest.mark.parametrize("split", ["train", "train[:10%]", "test+dev"])
def test_a_wrong_split_is_refused_with_those_there_are(hub: StubHub, split: str) -> None:
    with pytest.raises(DataError, match=r"data.split is '.*', but .* has no split '(train|dev)'; set .* one of: test$"):
        read_rows(DATA, split)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("evaluate", ["--data.path", DATA, "--data.split", "train"]),
        ("generate", ["--input", DATA, "--split", "train"]),
    ],
)
def test_evaluate_and_generate_name_the_splits_too(
    hub: StubHub, script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, script, MODEL, *flags) == 2
    error = capsys.readouterr().err
    assert f"{flags[2].removeprefix('-').removeprefix('-')} is 'train', but {DATA} has no split 'train'" in error
    assert "Traceback" not in error


def test_a_gated_model_or_data_set_says_to_accept_its_terms_and_to_log_in(hub: StubHub) -> None:
    for repository in hub.repositories.values():
        repository.gated = True
    with pytest.raises(ModelError, match=rf"the model {MODEL} is gated: accept its terms on .*/{MODEL}, then log in"):
        load_tokenizer(ModelConfig(name_or_path=MODEL))
    with pytest.raises(DataError, match=rf"the data set {DATA} is gated: accept its terms on .*/datasets/{DATA}, then"):
        read_rows(DATA)


def test_a_name_that_the_hub_does_not_know_is_said(hub: StubHub) -> None:
    with pytest.raises(
        ModelError, match=r"there is no model org/nope here, nor one on .* that you may read; check the name"
    ):
        load_tokenizer(ModelConfig(name_or_path="org/nope"))
    with pytest.raises(
        DataError, match=r"there is no data set org/nope here, nor one on .* that you may read; check the name"
    ):
        read_rows("org/nope")
    with pytest.raises(ModelError, match=f"the model {MODEL} has not the revision that is asked for"):
        load_tokenizer(ModelConfig(name_or_path=MODEL, revision="v9"))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the (model|data set) .* \(401\); accept its terms on .* log in with `hf auth login`"),
        (403, r"refuses the (model|data set) .* \(403\); accept its terms"),
        (404, r"there is no (model|data set) .* here, nor one on .* that you may read; check the name"),
        (410, r"there is no (model|data set) .* here or in the local cache, and .* answers 410; check"),
    ],
)
def test_a_bare_status_is_enough_for_a_clear_message(hub: StubHub, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(ModelError, match=message):
        load_tokenizer(ModelConfig(name_or_path=MODEL))
    with pytest.raises(DataError, match=message):
        read_rows(DATA)


def test_being_told_to_wait_is_said(hub: StubHub, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.status = 429
    with pytest.raises(DataError, match="answers 429"):
        read_rows(DATA)
    assert set(said) == {f"{hub.url} answers 429, too many requests; it is asked again when it allows that"}


def dead_url() -> str:
    """Where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("what", ["model", "data"])
def test_a_dead_network_is_tried_twice_said_once_and_then_an_error(
    hub: StubHub, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    url = dead_url()
    ask(monkeypatch, url, tmp_path / "empty")
    with pytest.raises(
        (ModelError, DataError),
        match=rf"there is no .* here or in the local cache, and {url} does not answer .*, 2 times",
    ):
        load_tokenizer(ModelConfig(name_or_path=MODEL)) if what == "model" else read_rows(DATA)
    assert [line.partition(" (")[0] for line in said] == [f"{url} does not answer"] * 2
    assert said[0].endswith("; trying once more")
    assert said[1].endswith("going on with what the local cache holds")


@pytest.mark.parametrize("what", ["model", "data"])
def test_a_hub_that_hangs_is_asked_twice_and_no_more(
    hub: StubHub, what: str, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    hub.hangs_on = ""
    monkeypatch.setattr(hub_module, "TIMEOUT_SECONDS", 0.1)
    with pytest.raises((ModelError, DataError), match=r"does not answer .*, 2 times"):
        load_tokenizer(ModelConfig(name_or_path=MODEL)) if what == "model" else read_rows(DATA)
    assert len(hub.requests) == hub_module.ATTEMPTS
    assert len(said) == 2


def test_a_download_that_stalls_is_resumed_once_and_then_given_up(
    hub: StubHub, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    hub.stalls_on = "tokenizer.json"
    monkeypatch.setattr(hub_module, "TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with pytest.raises(ModelError, match="stopped in the middle of a file"):
        load_tokenizer(ModelConfig(name_or_path=MODEL))
    assert [line for line in hub.requests if line.startswith("GET") and "/tokenizer.json" in line] != []
    assert sum("stopped in the middle of a file" in line for line in said) == 2


def test_a_broken_hub_is_asked_twice(hub: StubHub) -> None:
    hub.status = 503
    with pytest.raises(ModelError, match="answers 503, 2 times"):
        load_tokenizer(ModelConfig(name_or_path=MODEL))
    assert len(hub.requests) == 2


def test_all_attempts_and_the_pause_between_them_take_less_than_ten_seconds() -> None:
    assert hub_module.ATTEMPTS * hub_module.TIMEOUT_SECONDS + (hub_module.ATTEMPTS - 1) * hub_module.PAUSE_SECONDS < 10


def test_no_request_waits_longer_unless_the_user_says_so(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import get_session

    hub_module.set_limits()
    seen = []
    client = get_session()
    monkeypatch.setattr(client, "event_hooks", {"request": [lambda r: seen.append(r.extensions["timeout"])]})
    client.get(f"{hub.url}/api/models/{MODEL}", timeout=100.0)
    client.get(f"{hub.url}/api/models/{MODEL}")
    assert [set(limits.values()) for limits in seen] == [{hub_module.TIMEOUT_SECONDS}] * 2
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "100")
    client.get(f"{hub.url}/api/models/{MODEL}", timeout=100.0)
    assert set(seen[-1].values()) == {100.0}


def test_what_the_cache_holds_is_used_when_the_network_is_dead(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    config = ModelConfig(name_or_path=MODEL, dtype="float32")
    load(config)
    rows = read_rows(DATA)
    ask(monkeypatch, dead_url(), tmp_path / "hf")
    said.clear()
    assert load(config).anatomy.block_count == 6
    assert [row.values for row in read_rows(DATA)] == [row.values for row in rows]
    assert sum("going on with what the local cache holds" in line for line in said) == 1


def test_offline_mode_is_named_where_it_is_the_cause(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=f"there is no model {MODEL} here or in the local cache, and HF_HUB_OFFLINE is set"
    ):
        load_tokenizer(ModelConfig(name_or_path=MODEL))
    with pytest.raises(
        DataError, match=f"there is no data set {DATA} here or in the local cache, and HF_HUB_OFFLINE is set"
    ):
        read_rows(DATA)
    assert hub.requests == []


def test_a_mistyped_path_never_reaches_the_hub(hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for opened in (resolve_source, stored_dtype, open_model):
        with pytest.raises(ModelError, match="'runs/nope' is not an existing directory, although runs/ is one"):
            opened("runs/nope")
    with pytest.raises(ModelError, match="'runs/nope' is not an existing directory"):
        load_tokenizer(ModelConfig(name_or_path="runs/nope"))
    with pytest.raises(DataError, match="runs/nope: no such file"):
        read_rows("runs/nope")
    assert hub.requests == []
