"""Who may import whom: `shared` stands on nothing of ours, the three parties on `shared` alone (DESIGN.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTIES = {"export", "cloud_backend", "device_app"}
OURS = {"shared", "benchmarks", "examples", "tests", *PARTIES}
HEAVY = {"torch", "transformers", "onnx", "export", "optimum", "accelerate"}
FORBIDDEN = {"shared": OURS - {"shared"} | HEAVY}
FORBIDDEN |= {party: OURS - {"shared", party} for party in PARTIES}
FORBIDDEN["device_app"] |= HEAVY
DYNAMIC = "a name that is not written out"
IMPORTERS = {"__import__", "import_module", "run_module", "run_path", "find_spec", "exec", "eval"}

FILES = [path for folder in sorted(FORBIDDEN) for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(source: str) -> Iterator[str]:
    """Top-level names of everything a module imports, wherever in it, by statement or by call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield str(node.module).partition(".")[0]
            elif node.level > 1:  # packages are one folder deep: two dots leave them
                yield from {str(node.module).partition(".")[0]} if node.module else (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in IMPORTERS:
            yield _named(node)


def _called(function: ast.expr) -> str:
    """`f` of `f(…)` and `a.b.f(…)`; but `model.eval()` and other methods are not builtins."""
    if isinstance(function, ast.Attribute):
        return "" if function.attr in ("exec", "eval") else function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _named(call: ast.Call) -> str:
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if _called(call.func) in ("exec", "eval", "run_path") or not arguments:
        return DYNAMIC
    first = arguments[0]
    if isinstance(first, ast.JoinedStr) and first.values:  # f"export.{name}" is as good as export
        first = first.values[0]
        return first.value.partition(".")[0] if isinstance(first, ast.Constant) and "." in str(first.value) else DYNAMIC
    return str(first.value).partition(".")[0] if isinstance(first, ast.Constant) else DYNAMIC


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_nothing_that_its_folder_may_not(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert not set(imported(path.read_text(encoding="utf-8"))) & (FORBIDDEN[folder] | {DYNAMIC})


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_every_folder_was_looked_at(folder: str) -> None:
    assert any(path.is_relative_to(ROOT / folder) for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_written_from_the_top(path: Path) -> None:
    # `imported` takes two dots to leave a party's folder, which is true one folder deep alone: so there are none.
    assert not [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import export",
        "import export.families as families",
        "import os, export",
        "from export import families",
        "from export.families import TABLE",
        "from .. import export",
        "from ..export import families",
        "def late():\n    import export",
        "if TYPE_CHECKING:\n    from export import families",
        "try:\n    import export\nexcept ImportError:\n    pass",
        "importlib.import_module('export')",
        "importlib.import_module(name='export.families')",
        "import_module('export')",
        "__import__('export')",
        "importlib.import_module(f'export.{name}')",
        "runpy.run_module('export')",
        "importlib.util.find_spec('export')",
    ],
)
def test_an_import_is_seen_in_any_form(source: str) -> None:
    assert "export" in set(imported(source))


@pytest.mark.parametrize(
    "source",
    [
        "import_module(name)",
        "__import__('ex' + 'port')",
        "import_module(f'{name}')",
        "exec('import export')",
        "run_path(p)",
    ],
)
def test_an_import_of_an_unwritten_name_is_seen(source: str) -> None:
    assert set(imported(source)) == {DYNAMIC}


@pytest.mark.parametrize(
    "source", ["from . import session", "from .export import x", "'import export'", "model.eval()"]
)
def test_what_is_no_import_of_another_folder_is_let_be(source: str) -> None:
    assert not set(imported(source))


def test_importing_shared_loads_nothing_heavy() -> None:
    names = [f"shared.{path.stem}" for path in (ROOT / "shared").glob("*.py") if path.stem != "__init__"]
    script = f"import {', '.join(names)}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not set(loaded.split()) & ((OURS - {"shared"}) | HEAVY | {"onnxruntime", "websockets"})
