"""generation_config.json of a model: what transformers would drop in silence is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import make_tiny_model

from toolkit.config.schema import ModelConfig
from toolkit.models.generation_file import check_generation_file
from toolkit.models.load import load
from toolkit.models.source_files import SourceFiles
from toolkit.runtime.errors import ModelError


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"eos_tok', "is not valid JSON"),
        ("[]", "holds a list; expected an object"),
        ('{"eos_token_id": "0"}', "has '0' in eos_token_id; expected the number of a token"),
        ('{"eos_token_id": [[0]]}', "has '[0]' in eos_token_id"),
        ('{"pad_token_id": [1, 2]}', "has '[1, 2]' in pad_token_id"),
        ('{"bos_token_id": true}', "has 'True' in bos_token_id"),
        ("\udcff", "is not valid JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"Its generation_config\.json .*\. Correct the file, or remove it") as error:
        check_generation_file(SourceFiles(str(tmp_path), None))
    assert said in str(error.value)


def test_a_whole_file_and_none_are_taken_and_loading_looks(tmp_path: Path) -> None:
    files = SourceFiles(str(tmp_path), None)
    check_generation_file(files)
    for content in ("{}", '{"eos_token_id": [1, 2], "pad_token_id": -1, "bos_token_id": null}'):
        (tmp_path / "generation_config.json").write_text(content)
        check_generation_file(files)
    model = make_tiny_model(tmp_path / "model")
    (model / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json is not valid JSON"):
        load(ModelConfig(name_or_path=str(model)))
