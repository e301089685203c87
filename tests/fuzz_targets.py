"""The kinds of input that ``fuzz.py`` tries: for each a strategy, and what is done with its values in a folder."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fuzz_inputs import (
    COLUMNS,
    SECTIONS,
    as_json,
    checkpoint_files,
    csv_text,
    deep,
    ds_values,
    json_mutations,
    lines,
    model_config,
    mutations,
    row,
    section,
    shard_cases,
    template_text,
    text,
    tokenizer_config,
    tree,
    word,
    yaml_text,
)
from helpers import ENGLISH, QUICKSTART, make_tiny_model, make_tokenizer, tiny_flags, tiny_llama, train
from hypothesis import strategies as st
from store_samples import NAMESPACE, open_store, same, samples, value

from toolkit.config import flags
from toolkit.config.schema import DataConfig, MaskConfig, RunConfig

Target = Callable[[Any], object]


def _put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def parse(*words: str) -> Any:
    return flags.parse(flags.create_parser("fuzz"), QUICKSTART, list(words))


def recipe_text(folder: Path) -> Target:
    return lambda content: parse("--config", str(_put(folder / "recipe.yaml", content)))


def recipe_values(folder: Path) -> Target:
    def target(values: Any) -> None:
        dumped = yaml.safe_dump(values, allow_unicode=False)
        parse("--config", str(_put(folder / "recipe.yaml", dumped)))

    return target


def command_line(folder: Path) -> Target:
    from toolkit.slurm.request import add_flags, read_request

    def target(words: list[str]) -> None:
        parser = flags.create_parser("fuzz")
        add_flags(parser)
        read_request(flags.parse(parser, QUICKSTART, words).arguments)

    return target


def deepspeed(folder: Path) -> Target:
    from toolkit.engine.deepspeed.config import load_ds_config, resolve_ds_config
    from toolkit.engine.deepspeed.json_file import read_ds_config, zero_stage

    scheduled = RunConfig(mask=MaskConfig(schedule=[{"train": "head", "until_step": 1}]))  # type: ignore[list-item]

    def target(content: str | bytes) -> None:
        path = _put(folder / "ds.json", content)
        resolved = resolve_ds_config(read_ds_config(path), RunConfig(), 2, 32, path)
        assert 0 <= zero_stage(resolved) <= 3
        load_ds_config(path, scheduled, 2, 32)

    return target


@cache
def _tokenizer() -> Any:
    return make_tokenizer()


def rows(folder: Path) -> Target:
    from toolkit.data.dataset import load_dataset

    def target(case: tuple[str, str | bytes, str]) -> None:
        suffix, content, on_bad_row = case
        path = _put(folder / f"rows.{suffix}", content)
        config = DataConfig(path=str(path), max_length=64, on_bad_row=on_bad_row)  # type: ignore[arg-type]
        load_dataset(config, _tokenizer(), 0).save_skipped(folder / "skipped.jsonl")

    return target


def tables(folder: Path) -> Target:
    """Columns that pyarrow can hold, written as Parquet."""
    import pyarrow
    import pyarrow.parquet

    from toolkit.config.schema import DataConfig
    from toolkit.data.questions import questions_of
    from toolkit.data.sources import read_rows

    def target(columns: dict[str, list[Any]]) -> None:
        path = folder / "rows.parquet"
        try:
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, ValueError, TypeError):
            return  # no table
        rows(folder)(("parquet", path.read_bytes(), "skip"))
        questions_of(read_rows(str(path), "train"), DataConfig())

    return target


def checkpoint(folder: Path) -> Target:
    """The JSON files of a checkpoint and the pointer to it, each damaged in turn."""
    from toolkit.checkpoint.catalog import latest_checkpoint
    from toolkit.checkpoint.choice import choose_checkpoint
    from toolkit.checkpoint.restore import Checkpoint
    from toolkit.checkpoint.run_directory import claim
    from toolkit.runtime.distributed import World
    from toolkit.runtime.errors import FrostlineError

    run = _make_run(folder)
    whole = run / "checkpoints" / "step-00000001"
    places = {path.name: path for path in run.rglob("*") if path.is_file()}
    files = {name: path.read_bytes() for name, path in places.items()}

    def target(case: tuple[str, str | bytes]) -> None:
        name, content = case
        _put(places[name], content)
        try:
            state = latest_checkpoint(run)
            assert state is None or state.parent == run / "checkpoints", "the pointer led elsewhere"
            for read in (
                lambda: Checkpoint(whole).delta(),  # as if the manifest agreed with the damage
                lambda: choose_checkpoint(run, 1),
                lambda: claim(parse("--output.dir", str(run)).config, QUICKSTART, World(), create=False).__enter__(),
            ):
                with contextlib.suppress(FrostlineError):
                    read()
        finally:
            places[name].write_bytes(files[name])

    return target


def _make_run(folder: Path) -> Path:
    """A run directory as a run of one step leaves it."""
    run = folder / "run"
    flags_ = tiny_flags(make_tiny_model(folder / "model"), run, "--train.max_steps", 1, "--prefix.cache", "off")
    with contextlib.redirect_stderr(io.StringIO()):
        assert train(*flags_) == 0
    for path in run.rglob("tensorboard"):  # of which no JSON is read before a model loads
        shutil.rmtree(path)
    return run


def shards(folder: Path) -> Target:
    """Shards of the activation cache, damaged; also with a header of any content under its right name."""
    from toolkit.activation_cache.shard import _name_of

    with open_store(folder / "made") as made:
        made.write(samples(range(3)))
    (path,) = (folder / "made").glob("*/*.safetensors")
    whole = path.read_bytes()
    place = folder / "cache" / NAMESPACE.sha256
    place.mkdir(parents=True)

    def target(case: tuple[str, bytes]) -> None:
        kind, content = case
        for old in place.glob("*.safetensors"):
            old.unlink()
        if kind == "header":
            length = int.from_bytes(whole[:8], "little")
            header = content.replace(b"OWNER", NAMESPACE.sha256.encode())
            content = len(header).to_bytes(8, "little") + header + whole[8 + length :]
            _put(place / _name_of(content[: 8 + len(header)]), content)
        else:
            _put(place / path.name, content)
        with open_store(folder / "cache") as store:
            store.prefetch(samples(range(3)))
            for number, key in enumerate(samples(range(3))):
                found = store.read(key)
                assert found is None or kind == "header" or same(found, value(number)), "it gave other values"

    return target


def model_directory(folder: Path) -> Target:
    """JSON files of a model, damaged; nothing is loaded but their content."""
    from toolkit.config.schema import ModelConfig
    from toolkit.mask.layer_mask import build_mask
    from toolkit.models.load import load, load_tokenizer
    from toolkit.planning.meta_model import meta_model

    directory = folder / "model"
    tiny_llama().save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}

    def target(case: tuple[str, Any]) -> None:
        name, content = case
        _put(directory / name, content if isinstance(content, bytes) else as_json(content))
        config = ModelConfig(name_or_path=str(directory))
        try:
            build_mask(MaskConfig(train=["last:1"]), meta_model(config).anatomy)
            load(config, load_tokenizer(config))
        finally:
            for old, whole in files.items():
                (directory / old).write_bytes(whole)
            if name not in files:
                (directory / name).unlink()

    return target


def template(folder: Path) -> Target:
    from toolkit.data.examples import Encoder

    tokenizer = make_tokenizer()

    def target(content: str) -> None:
        tokenizer.chat_template = content
        Encoder(tokenizer, 64)

    return target


TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Path], Target]]] = {
    "recipe_text": (st.one_of(yaml_text, deep, st.text(), st.binary()), recipe_text),
    "recipe_values": (st.one_of(tree, st.dictionaries(st.sampled_from(SECTIONS), section, max_size=4)), recipe_values),
    "command_line": (st.lists(word, max_size=6), command_line),
    "deepspeed": (
        st.one_of(json_mutations(ds_values).map(as_json), st.dictionaries(text, tree).map(as_json), deep, st.binary()),
        deepspeed,
    ),
    "rows": (
        st.tuples(
            st.sampled_from(["json", "jsonl", "csv", "parquet"]),
            st.one_of(
                lines,
                csv_text,
                deep,
                st.binary(),
                st.lists(row, max_size=3).map(as_json),
                st.dictionaries(text, row, max_size=3).map(as_json),
                mutations(ENGLISH.read_bytes()[:3000]),
            ),
            st.sampled_from(["error", "skip"]),
        ),
        rows,
    ),
    "tables": (st.dictionaries(COLUMNS, st.lists(tree, min_size=1, max_size=2), min_size=1, max_size=4), tables),
    "checkpoint": (
        st.tuples(
            checkpoint_files,
            st.one_of(
                text, st.binary(), tree.map(as_json), deep, st.just("../../elsewhere"), st.just("step-00000001/..")
            ),
        ),
        checkpoint,
    ),
    "shards": (st.deferred(shard_cases), shards),
    "model_directory": (
        st.one_of(
            st.tuples(st.just("config.json"), json_mutations(model_config)),
            st.tuples(st.just("tokenizer_config.json"), json_mutations(tokenizer_config())),
            st.tuples(
                st.just("model.safetensors.index.json"), st.one_of(tree, json_mutations({"weight_map": {"a": "b"}}))
            ),
            st.tuples(st.just("generation_config.json"), tree),
            st.tuples(st.sampled_from(["config.json", "tokenizer.json", "model.safetensors"]), st.binary()),
        ),
        model_directory,
    ),
    "template": (st.one_of(template_text, st.text()), template),
}
"""By name: what hypothesis makes, and what is done with it."""
