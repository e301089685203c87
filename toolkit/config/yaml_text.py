"""Read YAML from strangers: plain values alone, no key twice, and no more of it than a person writes."""

from __future__ import annotations

from typing import Any

import yaml

MOST_BYTES = 2**20
"""Longest text that is read: PyYAML takes seconds for one of this size."""
_MOST_VALUES = 100_000
"""Most keys and values, where an alias counts as all that it stands for."""
_MOST_NAMED = 5


def load(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return the values of a YAML text, as ``yaml.safe_load`` does.

    Raises:
        yaml.YAMLError: it is no YAML, or PyYAML refuses a value.
        ValueError: a key is given twice, its aliases stand for too much or for themselves, or it is too long.
        RecursionError: it is nested too deeply.
    """
    return compose(text, loader)[1]


def compose(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> tuple[yaml.Node | None, Any]:
    """Return the nodes of a YAML text, which know their lines, and its values; raises as ``load``."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text):,} characters; expected at most {MOST_BYTES:,}")
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None, None
        repeated: list[str] = []
        _count(node, {}, repeated)
        if repeated:
            more = f"; and {len(repeated) - _MOST_NAMED} more" if len(repeated) > _MOST_NAMED else ""
            raise ValueError(f"{'; '.join(repeated[:_MOST_NAMED])}{more}. Keep one of each")
        return node, reader.construct_document(node)
    finally:
        reader.dispose()


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of a JSON object, as an ``object_pairs_hook``; ValueError for a key that is given twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice; keep one")
    return values


def _count(node: yaml.Node, sizes: dict[int, int], repeated: list[str]) -> int:
    """Return how many nodes one stands for, and note the keys that are given twice, with both lines.

    ``sizes`` holds what was counted, 0 while it is; an alias is the node that it stands for.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: an anchor stands for a value that holds itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, (key.tag, str(key.value))
            if isinstance(key, yaml.ScalarNode) and name in lines:
                repeated.append(f"key {name[1][:60]!r} is given twice, in lines {lines[name]} and {line}")
            lines.setdefault(name, line)
            total += _count(key, sizes, repeated) + _count(value, sizes, repeated)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            total += _count(part, sizes, repeated)
    if total > _MOST_VALUES:
        raise ValueError(f"line {node.start_mark.line + 1}: it stands for more than {_MOST_VALUES:,} values")
    sizes[id(node)] = total
    return total
