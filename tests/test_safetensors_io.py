"""Our safetensors files are the library's, and a file that is not one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from toolkit.runtime.safetensors_io import DTYPES, SafetensorsFile, file_size, map_range, serialize, write_safetensors


def every_type() -> dict[str, torch.Tensor]:
    tensors = {name: torch.arange(3, dtype=torch.float32).to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": torch.ones(2, 3).t()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        and found[name].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()
        for name, tensor in expected.items()
    )


def test_the_library_reads_what_is_written_and_what_it_writes_is_read(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_safetensors(ours, every_type(), {"step": "5"})
    save_file({name: tensor.contiguous() for name, tensor in every_type().items()}, theirs)
    assert ours.stat().st_size == file_size(every_type(), {"step": "5"})
    assert same(load_file(ours), every_type())
    with safe_open(ours, "pt") as file:
        assert file.metadata() == {"step": "5"}
    for path in (ours, theirs):
        file = SafetensorsFile(path)
        assert same({name: file.tensor(name) for name in file.entries}, every_type())


def test_the_bytes_are_those_of_the_library() -> None:
    """A shard of a cache is named after its header: an older version's has to stay the same file."""
    tensors = {f"{number:064x}": torch.full((number + 1, 8), 0.5).bfloat16() for number in range(3)}
    assert b"".join(serialize(tensors, {"frostline": "x"})) == save(tensors, {"frostline": "x"})


def test_writing_to_a_mapped_tensor_leaves_the_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "file", {"a": torch.ones(3)})
    file = SafetensorsFile(tmp_path / "file", writable=True)
    start = (tmp_path / "file").stat().st_size - 12
    for tensor in (file.tensor("a"), map_range(tmp_path / "file", start, torch.float32, [3])):
        tensor.zero_()
    assert load_file(tmp_path / "file")["a"].tolist() == [1, 1, 1]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [], 5, {"a": 5}, {"a": {}}, {"a": ENTRY | {"data_offsets": [-8, 0]}}, {"a": ENTRY | {"shape": [-2]}},
        {"a": ENTRY | {"shape": [3]}}, {"a": ENTRY | {"shape": [2.0]}}, {"a": ENTRY | {"dtype": []}},
        {"a": ENTRY | {"data_offsets": ["0", "8"]}}, {"__metadata__": None},
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=r"its header is not one of safetensors|has no size that can be|bytes, which"):
        SafetensorsFile(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="its header is cut off"):
        SafetensorsFile(tmp_path / "file")


def test_a_tensor_beyond_the_end_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "file", {"a": torch.ones(3)})
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends before"):
        SafetensorsFile(tmp_path / "file").tensor("a")
