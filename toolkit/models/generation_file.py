"""Check ``generation_config.json``, of which transformers drops what it cannot read without a word."""

from __future__ import annotations

from typing import Any

from toolkit.models.source_files import SourceFiles
from toolkit.runtime.errors import ModelError
from toolkit.runtime.printable import one_line

_NAME = "generation_config.json"


def check_generation_file(files: SourceFiles) -> None:
    """Check that a model's generation_config.json, if there is one, is an object whose special tokens are numbers.

    Raises:
        ModelError: it is something else.
        OSError: it cannot be read.
    """
    try:
        values: Any = files.read_json(_NAME)
    except (ValueError, RecursionError) as error:
        raise _fault(files, f"is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise _fault(files, f"holds a {type(values).__name__}; expected an object")
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        token = values.get(name)
        tokens = token if isinstance(token, list) and name == "eos_token_id" else [token]
        if bad := [one for one in tokens if one is not None and type(one) is not int]:
            raise _fault(files, f"has {str(bad[0])[:40]!r} in {name}; expected the number of a token")


def _fault(files: SourceFiles, text: str) -> ModelError:
    return ModelError(
        f"model.name_or_path {files.source!r} cannot be loaded. Its {_NAME} {one_line(text)}. Correct the file, or "
        "remove it"
    )
