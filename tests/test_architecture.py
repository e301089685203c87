"""The layers of DESIGN: imports go downwards only, without cycles, and light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

LAYERS = [
    {"runtime"},
    {"config"},
    {"tasks", "slurm", "metrics"},
    {"retrieval"},
    {"clinical"},
    {"models"},
    {"mask"},
    {"data"},
    {"frozen"},
    {"split"},
    {"activation_cache"},
    {"optim"},
    {"engine"},
    {"checkpoint"},
    {"inference"},
    {"evaluation"},
    {"exporting", "planning"},
    {"report"},
    {"training"},
    {"sweeping"},
    {"commands"},
]
RANK = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / "toolkit").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("toolkit", "launch", "benchmarks", "tests")}


def test_every_module_has_a_layer() -> None:
    units = {name.split(".")[1] for name in modules() if "." in name}
    assert units == set(RANK)


def test_imports_go_downwards_only() -> None:
    for name, path in modules().items():
        for target in imports(path):
            assert target.startswith("toolkit"), f"{name} imports {target}"
            if "." not in name or "." not in target:
                continue
            own, other = name.split(".")[1], target.split(".")[1]
            assert own == other or RANK[other] < RANK[own], f"{name} imports {target}, which is not below it"


def test_there_are_no_cycles_within_a_package() -> None:
    known = modules()
    del known["toolkit"]  # the front door imports on first use: test_api.py
    graph = {name: {target for target in imports(path) if target in known} - {name} for name, path in known.items()}

    in_no_cycle: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        for target in graph[name] - in_no_cycle:
            walk(target, (*trail, name))
        in_no_cycle.add(name)

    for name in graph:
        walk(name, ())


def test_no_two_modules_have_a_class_of_the_same_name() -> None:
    found: dict[str, str] = {}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert found.setdefault(node.name, module) == module, f"{node.name} in {found[node.name]} and {module}"


def test_importing_a_module_calls_nothing_for_its_effect() -> None:
    for name, path in modules().items():
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            called = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            assert not called, f"{name} runs {ast.unparse(statement)} when it is imported"


@pytest.mark.parametrize(
    "module",
    [
        "toolkit.config.flags",
        "toolkit.mask.selectors",
        "toolkit.mask.layer_mask",
        "toolkit.engine.deepspeed.config",
        "toolkit.commands.cli",
        "toolkit.slurm.submission",
    ],
)
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
