"""No damaged byte of a checkpoint is ever trained on: it is found, named, and the checkpoint before it used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import copy_of, edit_state, files_of, point_to, recut, rewrite_shard
from helpers import invocation, metrics, reseal, tiny_flags, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.checkpoint.catalog import newest_usable
from toolkit.checkpoint.choice import choose_checkpoint
from toolkit.checkpoint.manifest import MANIFEST_FILE, read_sealed, sealed, verify
from toolkit.checkpoint.restore import Checkpoint
from toolkit.checkpoint.run_directory import claim
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.hashed_files import as_json

SHORT = ("--train.max_steps", 6, "--output.save_every_steps", 2, "--output.keep", 9)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps with a checkpoint every two."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(*tiny_flags(tiny_model, run, *SHORT)) == 0
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return copy_of(whole, tmp_path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "one bit": lambda path: path.write_bytes(flip(path.read_bytes(), len(path.read_bytes()) // 2, 1)),
    "gone": lambda path: path.unlink(),
}


def flip(content: bytes, place: int, mask: int) -> bytes:
    return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(run: Path, damage: str) -> None:
    names = files_of(run / "checkpoints" / "step-00000006")
    assert len(names) == 7
    for name in names:
        checkpoint = run / "checkpoints" / "step-00000006"
        content = (checkpoint / name).read_bytes()
        DAMAGES[damage](checkpoint / name)
        with pytest.raises(CheckpointError, match=rf"step-00000006 is damaged:\n  - {name.split('/')[0]}"):
            verify(checkpoint)
        taken = newest_usable(run, must_be_latest=False)
        assert taken is not None
        assert taken.name == "step-00000004", name
        with pytest.raises(CheckpointError, match=r"output\.resume is must, so no other is taken"):
            newest_usable(run, must_be_latest=True)
        with pytest.raises(CheckpointError, match="is damaged"):
            choose_checkpoint(run)
        (checkpoint / name).write_bytes(content)
    taken = newest_usable(run, must_be_latest=True)
    assert taken is not None
    assert taken.name == "step-00000006"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_found(whole: Path, data: st.DataObject) -> None:
    checkpoint = whole / "checkpoints" / "step-00000002"
    path = checkpoint / data.draw(st.sampled_from(files_of(checkpoint)))
    content = path.read_bytes()
    place, mask = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    path.write_bytes(flip(content, place, mask))
    try:
        with pytest.raises(CheckpointError, match="is damaged"):
            verify(checkpoint)
    finally:
        path.write_bytes(content)


def test_a_run_whose_latest_checkpoint_is_damaged_says_so_and_ends_the_same(
    tiny_model: Path, run: Path, whole: Path
) -> None:
    checkpoint = point_to(run, 4)
    shard = checkpoint / "optimizer" / "rank-00000-of-00001.safetensors"
    shard.write_bytes(flip(shard.read_bytes(), 5000, 4))
    flags = tiny_flags(tiny_model, run, *SHORT)
    with pytest.raises(CheckpointError, match=r"output\.resume is must"):
        train(*flags, "--output.resume", "must")
    assert train(*flags) == 0
    assert metrics(run) == metrics(whole)
    verify(checkpoint)


def test_a_run_without_any_whole_checkpoint_is_refused_and_not_begun_anew(tiny_model: Path, run: Path) -> None:
    for checkpoint in (run / "checkpoints").glob("step-*"):
        (checkpoint / "mask.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"(?s)step-00000006 is.*step-00000002 is.*no checkpoint that can be used"
    ):
        train(*tiny_flags(tiny_model, run, *SHORT))
    assert len(metrics(run)) == 6


def test_a_lost_checkpoint_is_named_and_a_lost_pointer_is_no_loss(tiny_model: Path, run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step-00000099")
    expected = "latest names 'step-00000099', which is not there; checkpoints present: step-00000002, step-00000004"
    with pytest.raises(CheckpointError, match=expected):
        train(*tiny_flags(tiny_model, run, *SHORT, "--output.resume", "must"))
    for text in (b"step-00000099", b"../../elsewhere", b"\xff\x00"):
        (run / "checkpoints" / "latest").write_bytes(text)
        try:
            taken = newest_usable(run, must_be_latest=False)
        except CheckpointError as error:
            assert "which is not there" in str(error)
        else:
            assert taken is not None
            assert taken.parent == run / "checkpoints"
    (run / "checkpoints" / "latest").unlink()
    taken = newest_usable(run, must_be_latest=True)
    assert taken is not None
    assert taken.name == "step-00000006"


def manifest_with(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_that_was_tampered_with_is_refused(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000006"
    good = (checkpoint / MANIFEST_FILE).read_text()
    files = json.loads(good)["files"]
    lacking = {name: entry for name, entry in files.items() if name != "mask.json"}
    other = {**files, "mask.json": {"size": 3, "sha256": "0" * 64}}
    for content in ({"files": lacking}, {"files": other}, {"files": {}}, {"step": 4}, {"format": 2}, {"sha256": ""}):
        manifest_with(checkpoint, **content)
        with pytest.raises(CheckpointError, match="does not have the SHA-256 it states"):
            verify(checkpoint)
        (checkpoint / MANIFEST_FILE).write_text(good)
    for content in ("[]", "3", "{}", '{"sha256": 1, "files": []}', "[" * 100_000, "\x00"):
        (checkpoint / MANIFEST_FILE).write_text(content)
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json (cannot be read|has been changed)"):
            verify(checkpoint)


def test_files_that_the_manifest_does_not_know_are_refused(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000006"
    (checkpoint / "optimizer" / "more.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"optimizer/more\.bin is not in MANIFEST\.json"):
        verify(checkpoint)


def test_a_checkpoint_under_another_steps_name_is_refused(run: Path) -> None:
    (run / "checkpoints" / "step-00000006").rename(run / "checkpoints" / "step-00000008")
    with pytest.raises(CheckpointError, match="belongs to step 6"):
        verify(run / "checkpoints" / "step-00000008")


def swap(first: Path, second: Path) -> None:
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def test_two_shards_in_each_others_place_are_found_even_behind_a_forged_manifest(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000006"
    recut(checkpoint, 2)
    verify(checkpoint)
    shards = [checkpoint / "optimizer" / f"rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    swap(*shards)
    with pytest.raises(CheckpointError, match=r"rank-00000-of-00002\.safetensors has \S+ bytes"):
        verify(checkpoint)
    reseal(checkpoint)
    verify(checkpoint)
    with pytest.raises(CheckpointError, match=r"rank-00000-of-00002\.safetensors says it is"):
        Checkpoint(checkpoint)
    swap(*(shard.with_suffix(".json") for shard in shards))
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=r"rank-00000-of-00002\.safetensors says it is"):
        Checkpoint(checkpoint)


def test_a_shard_of_another_step_is_found_behind_a_forged_manifest(run: Path) -> None:
    name = "optimizer/rank-00000-of-00001.safetensors"
    old, new = (run / "checkpoints" / f"step-0000000{step}" for step in (4, 6))
    (new / name).write_bytes((old / name).read_bytes())
    reseal(new)
    with pytest.raises(CheckpointError, match=r"says it is .*'step': '4'"):
        Checkpoint(new)


def test_shards_that_do_not_hold_each_element_once_are_found_behind_a_forged_manifest(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000006"
    index = checkpoint / "optimizer" / "rank-00000-of-00001.json"
    good = json.loads(index.read_text())
    for change in (
        lambda entries: entries[1:],
        lambda entries: [*entries, entries[0]],
        lambda entries: [{**entries[0], "stop": entries[0]["stop"] - 1}, *entries[1:]],
        lambda entries: [{**entries[0], "name": "another"}, *entries[1:]],
    ):
        index.write_text(json.dumps(change(good)))
        reseal(checkpoint)
        with pytest.raises(CheckpointError, match=r"is not in the mask|just once"):
            Checkpoint(checkpoint)
    index.write_text(json.dumps([{"nonsense": 1}]))
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match="optimizer cannot be read"):
        Checkpoint(checkpoint)


def test_a_tensor_of_another_size_or_type_is_found_behind_a_forged_manifest(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000006"
    name = "optimizer/rank-00000-of-00001.safetensors"

    key = f"master/{Checkpoint(checkpoint).mask.names[0]}"
    good = (checkpoint / name).read_bytes()
    for change in (lambda tensor: tensor[:-1], lambda tensor: tensor.bfloat16()):
        rewrite_shard(checkpoint, name, key, change)
        with pytest.raises(CheckpointError, match="a shard has"):
            Checkpoint(checkpoint)
        (checkpoint / name).write_bytes(good)
        reseal(checkpoint)


@pytest.mark.parametrize("field", ["step", "ranks", "epoch", "totals", "recipe", "fingerprints"])
def test_a_state_with_a_value_of_another_kind_is_refused(run: Path, field: str) -> None:
    edit_state(run / "checkpoints" / "step-00000006", **{field: "x"})
    with pytest.raises(CheckpointError, match=rf"state\.json cannot be read \({field}"):
        Checkpoint(run / "checkpoints" / "step-00000006")


def test_a_state_of_a_newer_version_is_refused_by_name(run: Path) -> None:
    edit_state(run / "checkpoints" / "step-00000006", tide="high", versions={"frostline": "9.1"})
    with pytest.raises(CheckpointError, match=r"newer version of frostline \(9\.1, this is .*has tide, which"):
        Checkpoint(run / "checkpoints" / "step-00000006")


NEWER: dict[str, Callable[[Path], object]] = {
    "state": lambda checkpoint: edit_state(checkpoint, tide="high"),
    "manifest": lambda checkpoint: (checkpoint / MANIFEST_FILE).write_text(
        as_json(sealed({**read_sealed(checkpoint / MANIFEST_FILE)[0], "format": 2}))
    ),
}


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize("part", NEWER)
def test_a_checkpoint_of_a_newer_version_ends_the_run_and_nothing_is_lost(
    tiny_model: Path, run: Path, part: str, resume: str
) -> None:
    NEWER[part](run / "checkpoints" / "step-00000006")
    before = files_of(run)
    with pytest.raises(CheckpointError, match="of a newer version of frostline"):
        train(*tiny_flags(tiny_model, run, *SHORT, "--output.resume", resume))
    assert files_of(run) == before


def test_a_run_of_a_newer_version_is_named_where_another_directory_is_taken(
    tiny_model: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    run.rename("runs/quickstart")
    edit_state(Path("runs/quickstart/checkpoints/step-00000006"), tide="high")
    for step in (2, 4):
        shutil.rmtree(f"runs/quickstart/checkpoints/step-{step:08d}")
    given = invocation(*tiny_flags(tiny_model, run, *SHORT, "--output.dir", "none"))
    with claim(given.config, given.recipe, World()) as directory:
        assert directory.path == Path("runs/quickstart-2")
    assert "not taken up: checkpoint runs/quickstart/checkpoints/step-00000006 is of a newer version" in caplog.text


@pytest.mark.parametrize(("key", "default"), [("phase", 0), ("totals", {}), ("versions", {})])
def test_a_state_of_an_earlier_version_may_lack_what_has_a_default(run: Path, key: str, default: object) -> None:
    checkpoint = run / "checkpoints" / "step-00000006"
    state = json.loads((checkpoint / "state.json").read_text())
    del state[key]
    (checkpoint / "state.json").write_text(json.dumps(state))
    reseal(checkpoint)
    assert getattr(Checkpoint(checkpoint).state, key) == default
