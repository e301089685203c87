"""Name a token store by everything that its content depends on: files, task, template, tokenizer, versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import toolkit
from toolkit.data.chat_rendering import Rendering
from toolkit.data.retrieval import retrieval_fingerprint
from toolkit.data.sources import Source
from toolkit.data.token_file import MAGIC
from toolkit.data.tokenising import Encoding
from toolkit.data.tokenizer_digest import tokenizer_code, tokenizer_rules
from toolkit.runtime.errors import DataError
from toolkit.runtime.paths import sources_hash
from toolkit.tasks.choose import AUTO, SHIPPED, load_task

_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_SOURCES = ("data", "tasks", "retrieval", "clinical")
"""Folders of this package that determine what a row becomes."""
_WITHOUT_EFFECT = (
    "path", "split", "name", "revision", "encoding", "separator", "sheet", "limit", "validation", "validation_split",
    "test", "test_split", "folds", "fold", "packing", "on_bad_row", "task",
)  # fmt: skip
"""Keys of the data section that do not change what a row becomes, or say what ``source_identity`` and the task do."""
_TIME_OF_DAY = ("%H", "%I", "%M", "%S", "%p", "%c", "%X", "%T", "%R", "%r", "%s", "%f", "%k", "%l", "%-H", "%-I", "%-M")
"""Directives of strftime that print more than a date."""
_WHOLE_BYTES = 64 << 20
"""A file up to this size is hashed whole."""
_SAMPLES, _SAMPLE_BYTES = 256, 64 << 10
"""Of a larger file, so many blocks of this size are hashed: the first, the last, and others evenly between them."""


def store_key(source: Source, encoding: Encoding) -> str:
    """Return the key of the store of a source.

    A file counts with its path, size, time of modification and content, of which only samples are read if it is larger
    than 64 MiB.

    Raises:
        DataError: the source is not there, or a file of it cannot be read.
        ConfigError: the task file or mapping is wrong.
    """
    tokenizer = encoding.tokenizer
    settings = encoding.config.model_dump(mode="json")
    parts = {
        "format": MAGIC.decode(),
        "files": [_file_identity(file, source) for file in source.files],
        "source": _source_identity(source),
        "task": _task_identity(encoding.config.task),
        "data": {key: value for key, value in settings.items() if key not in _WITHOUT_EFFECT},
        "tokenizer": [tokenizer_rules(tokenizer), tokenizer_code(tokenizer), bool(tokenizer.is_fast)],
        "template": tokenizer.chat_template,
        "ends": list(encoding.ends),
        "rendering": _rendering_identity(encoding.rendering, str(tokenizer.chat_template or "")),
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
        "retrieval": retrieval_fingerprint(encoding.config),
        "sources": sources_hash(Path(toolkit.__file__).parent, *_SOURCES),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _file_identity(file: Path, source: Source) -> list[Any]:
    """Return path, size, time of modification and a hash of the content of a file; DataError if it cannot be read."""
    sha = hashlib.sha256()
    try:
        path = file.resolve()
        stat = path.stat()
        with path.open("rb") as content:
            if stat.st_size <= _WHOLE_BYTES:
                sha.update(content.read())
            else:
                for number in range(_SAMPLES):
                    content.seek(number * (stat.st_size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    sha.update(content.read(_SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error})") from None
    return [str(file), str(path), stat.st_size, stat.st_mtime_ns, sha.hexdigest()]


def _source_identity(source: Source) -> list[Any]:
    """Return what a source reads of its files."""
    options = source.options
    form = [options.encoding, options.separator, options.sheet]
    return [source.path, source.split, source.configuration, source.revision, source.default_split, form]


def _task_identity(task: str | Mapping[str, Any]) -> list[Any]:
    """Return the content of a task; of all that may be taken, for ``auto``."""
    tasks = [load_task(name) for name in SHIPPED] if task == AUTO else [load_task(task)]
    return [task.spec.model_dump(mode="json", by_alias=True) for task in tasks]


def _rendering_identity(rendering: Rendering, template: str) -> list[Any]:
    """Return what of a rendering shows in the rows: of its time only the date, if the template prints no more."""
    rest = [rendering.reasons, rendering.template, rendering.parses_special]
    now = rendering.now or (datetime.now() if "strftime_now" in template else None)  # as the rows are to be rendered
    if now is None:
        return [None, *rest]
    prints_time = any(directive in template for directive in _TIME_OF_DAY)
    return [(now if prints_time else now.date()).isoformat(), *rest]
