"""What ``fuzz.py`` makes its inputs of: nonsense, and sound files of each kind with something wrong in them."""

from __future__ import annotations

import json
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from helpers import ENGLISH, ROOT, make_tokenizer, tiny_llama
from hypothesis import strategies as st
from store_samples import open_store, samples

from toolkit.config.recipe import field_paths
from toolkit.config.schema import RunConfig

NASTY = [
    "", " ", "\0", "a\0b", "..", "../../etc/passwd", "/etc/passwd", "~", "a" * 300, "a" * 5000, "null", "none",
    "NaN", ".inf", "1e999", "-1", "0", "9" * 5000, "0x10", "1_000", "2020-99-99", "yes", "on", "{", "[", "[1",
    "{a: b", "&a [*a]", "*a", "!!int x", "!!python/object/apply:os.system [id]", "!!timestamp x", "!!binary x", "%",
    "@", "`", "\ud800", "\U0010ffff", "한국어", "last:4", "blocks:9-1", "re:(", "glob:[", "every:0", "fraction:2",
    "head", "all", "org/name", "a/b/c", "bundled:x", "--x", "https://u:p@h/x",
]  # fmt: skip
text = st.one_of(st.sampled_from(NASTY), st.text(max_size=12))
scalar = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.integers(-3, 3))
tree = st.recursive(
    scalar, lambda part: st.one_of(st.lists(part, max_size=4), st.dictionaries(text, part, max_size=4)), max_leaves=8
)
KEYS = sorted(field_paths())
SECTIONS = sorted(RunConfig.model_fields)


def as_json(values: Any) -> str:
    return json.dumps(values, default=str)


def mutations(original: bytes) -> st.SearchStrategy[bytes]:
    """``original`` cut, with bytes flipped, taken out or put in."""

    def mutate(choices: tuple[str, int, bytes]) -> bytes:
        kind, number, more = choices
        at = number % (len(original) + 1)
        if kind == "cut":
            return original[:at]
        if kind == "insert":
            return original[:at] + more + original[at:]
        if kind == "remove":
            return original[:at] + original[at + len(more) :]
        return original[:at] + bytes(byte ^ 0xFF for byte in original[at : at + 1]) + original[at + 1 :]

    kinds = st.sampled_from(["cut", "insert", "remove", "flip"])
    return st.tuples(kinds, st.integers(0, 2**31), st.binary(min_size=1, max_size=9)).map(mutate)


def json_mutations(original: Any) -> st.SearchStrategy[Any]:
    """A JSON value with one of its parts replaced by something else, or taken out."""
    original = json.loads(json.dumps(original))  # keys become text
    places = list(_places(original))

    def replace(choice: tuple[int, bool, Any]) -> Any:
        number, remove, other = choice
        changed = json.loads(json.dumps(original))
        place = places[number % len(places)]
        if not place:
            return other
        at = changed
        for step in place[:-1]:
            at = at[step]
        if remove and isinstance(at, dict):
            del at[place[-1]]
        else:
            at[place[-1]] = other
        return changed

    return st.tuples(st.integers(0, 2**31), st.booleans(), tree).map(replace)


def _places(part: Any, place: tuple[Any, ...] = ()) -> Any:
    yield place
    if isinstance(part, dict):
        for key, below in part.items():
            yield from _places(below, (*place, key))
    elif isinstance(part, list):
        for index, below in enumerate(part[:3]):
            yield from _places(below, (*place, index))


GOOD = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()[:3]]
COLUMNS = st.sampled_from(["QUESTION", "CONTEXTS", "LONG_ANSWER", "x"])
row = st.one_of(tree, st.dictionaries(COLUMNS, tree, max_size=4), json_mutations(GOOD[0]))
lines = st.lists(row, max_size=4).map(lambda values: "\n".join(map(as_json, values)))
cell = st.one_of(text, st.text(alphabet='",\n;ab', max_size=12))
csv_text = st.lists(st.lists(cell, min_size=1, max_size=4).map(",".join), max_size=4).map(
    lambda lines: "\n".join(["QUESTION,CONTEXTS,LONG_ANSWER", *lines])
)
ds_values = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
word = st.one_of(st.sampled_from([f"--{key}" for key in KEYS]), text, text.map(lambda word: f"--{word}"))
section = st.dictionaries(st.one_of(st.sampled_from([key.split(".")[1] for key in KEYS]), text), tree, max_size=3)
yaml_text = st.lists(
    st.one_of(
        st.builds(
            "{}:\n  {}: {}".format, st.sampled_from(SECTIONS), st.sampled_from([k.split(".")[1] for k in KEYS]), text
        ),
        st.builds("{}: {}".format, st.sampled_from(SECTIONS), text),
        st.text(max_size=20),
    ),
    max_size=3,
).map("\n".join)
deep = st.sampled_from(["[" * 1200, "{a: " * 1200, "- " * 1200, '{"a":' * 1200, "(" * 500])
TEMPLATE = [
    "{{",
    "}}",
    "{%",
    "%}",
    "for i in messages",
    "endfor",
    "if",
    "messages[0]",
    "['content']",
    "|tojson",
    "+",
    "*",
]
template_text = st.lists(st.one_of(st.sampled_from(TEMPLATE), st.text(string.printable, max_size=6)), max_size=12).map(
    " ".join
)
model_config = tiny_llama().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
shard_header = {
    "__metadata__": {"frostline": f"frostline-activations-1 OWNER {'0' * 32}"},
    "0" * 64: {"dtype": "BF16", "shape": [1, 8], "data_offsets": [0, 16]},
}
checkpoint_files = st.sampled_from(
    ["state.json", "mask.json", "base.json", "MANIFEST.json", "latest", "config.yaml", "rank-00000-of-00001.json"]
)


def shard_cases() -> st.SearchStrategy[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as made, open_store(Path(made)) as store:
        store.write(samples(range(3)))
        (path,) = Path(made).glob("*/*.safetensors")
        whole = path.read_bytes()
    headers = st.one_of(json_mutations(shard_header).map(as_json), deep).map(
        lambda found: found.encode("utf-8", "replace")
    )
    return st.one_of(st.tuples(st.just("bytes"), mutations(whole)), st.tuples(st.just("header"), headers))


@cache
def tokenizer_config() -> Any:
    with tempfile.TemporaryDirectory() as made:
        make_tokenizer().save_pretrained(made)
        return json.loads((Path(made) / "tokenizer_config.json").read_text())
