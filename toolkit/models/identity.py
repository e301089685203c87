"""Say what a model computes beside its weights: its config by meaning, its generation settings, and remote code."""

from __future__ import annotations

import ast
import hashlib
import json
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from toolkit.runtime.paths import sources_hash

_WITHOUT_MEANING = frozenset({
    "_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache",
    "tie_word_embeddings", "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
    "id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states",
    "eos_token_id", "bos_token_id",
})  # fmt: skip
"""Config keys that change nothing of what a causal model computes, or that weights, recipe or another part state."""


def config_values(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings of a loaded config that its hidden states and logits depend on, as plain JSON values.

    Transformers has read them: two spellings of one setting, such as ``rope_theta`` and ``rope_parameters``, are one
    value. A key without a value counts as absent.
    """
    values = _with_meaning(config.to_dict())
    assert isinstance(values, dict)
    return values


def generation_values(model: PreTrainedModel, ends: Iterable[int] = ()) -> dict[str, Any]:
    """Return the settings of a model's generation_config.json, and the tokens ``ends`` that its files name as ends."""
    settings = model.generation_config
    values = {} if settings is None else settings.to_diff_dict()
    for key in ("transformers_version", "_from_model_config", "eos_token_id"):
        values.pop(key, None)
    found = _with_meaning(values)
    assert isinstance(found, dict)
    return {**found, "ends": list(ends)}


def module_classes(model: nn.Module) -> set[type]:
    """Return the classes of a model's modules and of its config."""
    return {type(module) for module in model.modules()} | {type(getattr(model, "config", model))}


def remote_code(classes: Iterable[type]) -> dict[str, str]:
    """Return the SHA-256 of each source file that came with a model, by its name; empty if no class came so.

    The files are those of ``classes`` and their bases, and what these import from beside them; and, as one, those of
    each module or package that they import from elsewhere and that is not installed, as by ``PYTHONPATH``.
    """
    modules = {base.__module__ for kind in classes for base in kind.__mro__}
    pending: list[tuple[Path, Path]] = []
    for name in sorted(modules):
        file = getattr(sys.modules.get(name), "__file__", None)
        if name.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.") and file:
            pending.append((Path(file), Path(file).parent))
    found: dict[str, str] = {}
    while pending:
        file, folder = pending.pop()
        name = file.relative_to(folder).as_posix()
        with suppress(OSError):  # a name that is no file beside it, such as that of a package
            content = file.read_bytes()
            if found.setdefault(name, sha := hashlib.sha256(content).hexdigest()) != sha:
                found[name] = hashlib.sha256(f"{found[name]}{sha}".encode()).hexdigest()  # of two repositories
            found |= {name: code for name in _imported(content) if (code := _code_elsewhere(name))}
            imported = [folder / f"{module.replace('.', '/')}.py" for module in get_relative_imports(file)]
            known = {folder / name for name in found} | {path for path, _ in pending}
            pending += [(path, folder) for path in imported if path not in known]
    return dict(sorted(found.items()))


def _imported(content: bytes) -> set[str]:
    """Return the outermost modules that a source file imports, of those not beside it."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError):  # it has been run, so its encoding is an unusual one
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names}


def _code_elsewhere(name: str) -> str | None:
    """Return a digest of a module or package that is loaded; None if it is installed, or has no source."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or not file.endswith(".py") or any(Path(file).is_relative_to(root) for root in _installed()):
        return None
    path = Path(file)
    return sources_hash(path.parent, *(() if path.name == "__init__.py" else (path.name,)))


@cache
def _installed() -> tuple[Path, ...]:
    """Return where Python is, and what was installed for it."""
    paths = sysconfig.get_paths()
    own = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return tuple(Path(path) for path in {*own, *site.getsitepackages(), site.getusersitepackages()})


def _with_meaning(value: object) -> object:
    """Return a value as JSON has it, without the keys that have no meaning; what is not finite becomes text."""
    if isinstance(value, Mapping):
        kept = {str(key): _with_meaning(part) for key, part in value.items() if key not in _WITHOUT_MEANING}
        return {key: part for key, part in kept.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_with_meaning(part) for part in value]
    if isinstance(value, float):
        return json.loads(json.dumps(value)) if value - value == 0 else str(value)
    return value if value is None or isinstance(value, str | bool | int) else str(value)
