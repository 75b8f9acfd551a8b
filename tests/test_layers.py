"""Imports and includes go one way; see CONTRIBUTING.md. Read from the sources, nothing is run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastlora"

# A module imports from its own level and from lower ones. fastlora itself is below all, for _C; its
# lazy exports and __main__ are above all.
LEVELS = (
    ("version",),
    ("quant", "tolerance", "tuning"),
    ("layer",),
    ("reference",),
    ("backends",),
    ("ops",),
    ("autograd",),
    ("nn",),
    ("integrations",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

PEERS = ("accelerate", "bitsandbytes", "datasets", "gguf", "matplotlib", "peft", "transformers")
MODULES = sorted(PACKAGE.rglob("*.py"))
TEST_MODULES = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}

# csrc folder -> folders whose headers it may include. Torch and Python are named in bindings alone.
CSRC_MAY_INCLUDE = {
    "common": {"common"},
    "cpu": {"common", "cpu"},
    "cuda": {"common", "cuda"},
    "bindings": {"common", "cpu", "cuda", "bindings"},
}
FRAMEWORK_HEADER = re.compile(r"^(torch|ATen|c10|pybind11)/|^Python\.h$")


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every import that runs, and whether it runs only when a function is called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, lazy
        elif not is_type_checking(node):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, lazy or inside)


def own_targets(path: Path, node: ast.stmt) -> list[str]:
    """Layers of fastlora that a relative import names; `.` and `..` count from the file's place."""
    if not isinstance(node, ast.ImportFrom) or node.level == 0:
        return []
    package = path.relative_to(PACKAGE).parts[:-1]
    base = package[: len(package) - (node.level - 1)]
    full = (*base, *(node.module.split(".") if node.module else ()))
    if full:
        return [full[0]]
    return [alias.name for alias in node.names if alias.name in LEVEL]


def foreign_targets(node: ast.stmt) -> list[str]:
    """Top-level names of the other packages that an import names."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    return [node.module.split(".")[0]] if node.level == 0 and node.module else []


def peer_fault(path: Path, name: str, lazy: bool) -> str | None:
    """Why this module may not import this peer in this way, or None."""
    layer, parts = layer_of(path), path.relative_to(PACKAGE).parts
    if name == "triton":
        return None if parts[:2] == ("backends", "triton") else "only backends/triton may"
    if name not in PEERS:
        return None
    if layer == "integrations" and (lazy or parts[1].removesuffix(".py") == name):
        return None
    if layer == "cli" and lazy:
        return None
    if layer in ("integrations", "cli"):
        return f"only integrations/{name} may outside a function"
    return "only integrations and cli may"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    faults = []
    layer = layer_of(path)
    assert layer in LEVEL, f"{layer} has no level yet: give it one in LEVELS"
    for node, lazy in imports(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{node.lineno}: `{ast.unparse(node)}`:"
        for target in own_targets(path, node):
            if LEVEL[target] > LEVEL[layer]:
                faults.append(f"{where} {layer} stands below {target}")
        for name in foreign_targets(node):
            if name == "fastlora":
                faults.append(f"{where} imports inside the package are relative")
            fault = peer_fault(path, name, lazy)
            if fault is not None:
                faults.append(f"{where} {fault}")
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            faults.append(f"{where} star import")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("autograd/gated.py", "from ..ops import shared_linear_fwd", True),
        ("autograd/gated.py", "from ..nn import LoraLinear", False),
        ("layer.py", "from .quant import QuantState", True),
        ("layer.py", "from .reference import dequantize_4bit", False),
        ("quant/state.py", "from ..layer import Layer", False),
        ("ops/linear.py", "from ..backends import choose", True),
        ("ops/linear.py", "from .checks import check_weight", True),
        ("ops/linear.py", "from ..autograd import lora_linear", False),
        ("ops/linear.py", "def f():\n    from ..nn import LoraLinear", False),
        ("backends/native/cpu.py", "from ... import ops", False),
        ("backends/native/library.py", "from ... import _C, reference", True),
        ("nn/lora.py", "import peft", False),
        (
            "nn/lora.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft",
            True,
        ),
        ("nn/lora.py", "from fastlora.quant import QuantState", False),
        ("nn/lora.py", "from ..quant import *", False),
        ("integrations/peft/swap_bnb.py", "from peft.tuners.lora.bnb import Linear4bit", True),
        ("integrations/peft/model.py", "import transformers", False),
        ("integrations/peft/model.py", "def f():\n    import transformers", True),
        ("cli/info.py", "import peft", False),
        ("cli/info.py", "def f():\n    import peft", True),
        ("backends/native/cpu.py", "import triton", False),
        ("backends/triton/lora_linear.py", "import triton.language as tl", True),
    ],
)
def test_the_rule_itself(
    path: str, source: str, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    if allowed:
        test_imports_go_down(file)
    else:
        with pytest.raises(AssertionError, match=re.escape(path)):
            test_imports_go_down(file)


# ---- circles -------------------------------------------------------------------------------------

# Modules that have no source in Python: a package gives them, and its __init__ does not.
COMPILED = ("_C",)
# Module -> what it imports -> the place and the line of code that does.
Graph = dict[str, dict[str, str]]


def dotted(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(package: Path) -> tuple[Graph, list[str]]:
    """What each module imports, anywhere in it but under TYPE_CHECKING, and the climbing imports.

    A package's __init__ is a module; `from . import x` imports the submodule x where there is one.
    An import climbs where a module takes a name from the __init__ of a package that it belongs to:
    that __init__ has it from another submodule, or from one that imports this module.
    """
    modules = {dotted(path, package): path for path in sorted(package.rglob("*.py"))}
    graph: Graph = {name: {} for name in modules}
    climbing = []
    for name, path in modules.items():
        parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node, _ in imports(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            where = f"{path.relative_to(package.parent)}:{node.lineno}: `{ast.unparse(node)}`"
            above = parents[: len(parents) - node.level + 1]
            base = ".".join((*above, node.module) if node.module else above)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                if submodule in modules:
                    graph[name].setdefault(submodule, where)
                elif base in modules and alias.name not in COMPILED:
                    graph[name].setdefault(base, where)
                    if name == base or name.startswith(f"{base}."):
                        climbing.append(f"{where}: {alias.name} is no submodule of {base}")
    return graph, climbing


def chain(graph: Graph, start: str, end: str) -> list[str]:
    """The shortest chain of imports from `start` to `end`, one import at least; [] if none."""
    came_from: dict[str, str] = {}
    row = [start]
    while row and end not in came_from:
        following = []
        for module in row:
            for target in graph[module]:
                if target not in came_from:
                    came_from[target] = module
                    following.append(target)
        row = following
    if end not in came_from:
        return []
    modules = [end, came_from[end]]
    while modules[-1] != start:
        modules.append(came_from[modules[-1]])
    return modules[::-1]


def circles(graph: Graph) -> list[list[str]]:
    """A shortest circle of each strongly connected component that has one."""
    found: list[list[str]] = []
    seen: set[str] = set()
    for module in graph:
        if module in seen or not (circle := chain(graph, module, module)):
            continue
        found.append(circle)
        seen |= {m for m in graph if chain(graph, module, m) and chain(graph, m, module)}
    return found


def assert_no_circle(package: Path) -> None:
    graph, climbing = import_graph(package)
    assert not climbing, "\n".join(["climbing imports:", *climbing])
    told = [
        "\n  ".join([" -> ".join(circle), *(graph[a][b] for a, b in pairwise(circle))])
        for circle in circles(graph)
    ]
    assert not told, "\n".join(told)


def test_no_circle_and_no_climbing_import_inside_packages_too() -> None:
    assert_no_circle(PACKAGE)


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"a": "from .b import f", "b": "from .c import f", "c": ""}, None),
        ({"a": "from .b import f", "b": "from .a import g"}, r"x\.a -> x\.b -> x\.a"),
        ({"a": "from . import b", "b": "from . import a"}, r"x\.a -> x\.b -> x\.a"),
        (
            {"a": "from .b import f", "b": "def f():\n    from .a import g"},
            r"(?s)x\.a -> x\.b -> x\.a\s.*x/b\.py:2: `from \.a import g`",
        ),
        (
            {"a": "from .b import f", "b": "class B:\n    try:\n        from . import a\n"
             "    except ImportError:\n        pass"},
            r"x\.a -> x\.b -> x\.a",
        ),
        (
            {
                "a": "from .b import f",
                "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import g",
            },
            None,
        ),
        # Around three modules of two packages, beside another circle.
        (
            {
                "p/__init__": "",
                "p/a": "from ..q.b import f",
                "q/__init__": "",
                "q/b": "from . import c",
                "q/c": "from ..p import a",
                "d": "from .e import f",
                "e": "from .d import f",
            },
            r"(?s)x\.d -> x\.e -> x\.d\s.*x\.p\.a -> x\.q\.b -> x\.q\.c -> x\.p\.a\s",
        ),
        # A package's own submodules: by name they are themselves, not the package.
        ({"p/__init__": "from . import a", "p/a": "from . import b", "p/b": ""}, None),
        (
            {"p/__init__": "from .a import f", "p/a": "from ..p.b import g", "p/b": ""},
            None,
        ),
        (
            {"p/__init__": "from .a import f", "p/a": "from ..c import g", "c": "from .p import f"},
            r"x\.c -> x\.p -> x\.p\.a -> x\.c",
        ),
        # A name that the package has from elsewhere.
        (
            {"p/__init__": "from .b import g", "p/a": "from . import g", "p/b": ""},
            r"climbing imports:\s+x/p/a\.py:1: `from \. import g`: g is no submodule of x\.p",
        ),
        (
            {"p/__init__": "", "p/q/__init__": "", "p/q/a": "def f():\n    from ...p import g"},
            r"x/p/q/a\.py:2: .* g is no submodule of x\.p",
        ),
        ({"p/__init__": "", "p/a": "from .. import _C"}, None),
    ],
)  # fmt: skip
def test_the_rule_of_circles_itself(
    sources: dict[str, str], fault: str | None, tmp_path: Path
) -> None:
    for name, source in {"__init__": "", **sources}.items():
        file = tmp_path / "x" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    if fault is None:
        assert_no_circle(tmp_path / "x")
    else:
        with pytest.raises(AssertionError, match=fault):
            assert_no_circle(tmp_path / "x")


# ---- peers and headers ---------------------------------------------------------------------------


def test_no_peer_is_loaded_unasked() -> None:
    """`import fastlora`, every layer up to nn and the command line need torch and rich alone."""
    modules = ["fastlora", "fastlora.nn", "fastlora.cli"]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    loaded = set(out.split())
    assert set(modules) <= loaded
    assert not loaded & set(PEERS)


def test_includes_go_down() -> None:
    faults = []
    csrc = ROOT / "csrc"
    sources = [path for path in sorted(csrc.rglob("*")) if path.is_file()]
    assert sources
    for path in sources:
        folder = path.relative_to(csrc).parts[0]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if match is None:
                continue
            header = match[1]
            for base in (path.parent, csrc):
                beside = (base / header).resolve()
                if beside.is_file():
                    target = beside.relative_to(csrc).parts[0]
                    if target not in CSRC_MAY_INCLUDE[folder]:
                        faults.append(f"{path.relative_to(ROOT)}:{number}: includes {header}")
                    break
            else:
                if folder != "bindings" and FRAMEWORK_HEADER.search(header):
                    faults.append(f"{path.relative_to(ROOT)}:{number}: includes {header}")
    assert not faults, "\n".join(faults)


def test_no_module_named_utils() -> None:
    named = [path for path in PACKAGE.rglob("*") if path.stem in ("utils", "util", "helpers")]
    assert not named, "name the file after what it holds"


# ---- tests -------------------------------------------------------------------------------------


def imported_tests(source: str) -> list[str]:
    """The imports of test modules: what two of them share stands in a module that is none."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names]
            if TEST_MODULES & {part for name in named for part in name.split(".")}:
                found.append(f"{node.lineno}: `{ast.unparse(node)}`")
    return found


def test_no_module_imports_a_test_module() -> None:
    paths = [path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    assert TEST_MODULES and len(paths) > len(TEST_MODULES)
    faults = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in sorted(paths)
        for fault in imported_tests(path.read_text())
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("from tests.test_backends import run", False),
        ("from tests import cases, test_grouped as grouped", False),
        ("import tests.integrations.test_peft", False),
        ("def f():\n    from .test_cuda import EDGES", False),
        ("from . import test_cuda", False),
        ("from tests.cases import run", True),
        ("from tests.backend_checks import test_dequantize_writes_into_out", True),
    ],
)
def test_the_rule_of_tests_itself(source: str, allowed: bool) -> None:
    assert bool(imported_tests(source)) != allowed
