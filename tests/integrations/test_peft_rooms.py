"""Imports within integrations/peft: no circle, and nobody imports the package itself."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fastlora.integrations.peft

HOUSE = Path(fastlora.integrations.peft.__file__).parent


def imported(path: Path) -> set[tuple[str, ...]]:
    """The modules of the house that a file imports, in functions too, as paths from the house."""
    found = set()
    here = path.relative_to(HOUSE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not 0 < node.level <= len(here) + 1:
            continue
        base = here[: len(here) + 1 - node.level]
        if node.module is None:
            found |= {(*base, alias.name) for alias in node.names}
        else:
            found.add((*base, *node.module.split(".")))
    return found


MODULES = {
    path.relative_to(HOUSE).with_suffix("").parts: imported(path)
    for path in sorted(HOUSE.rglob("*.py"))
    if path != HOUSE / "__init__.py"
}


def test_the_modules_form_no_circle() -> None:
    assert MODULES["plan", "plan"] >= {("plan", "parts"), ("plan", "reasons")}
    list(TopologicalSorter(MODULES).static_order())


def test_the_rooms_form_no_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for (room, *_), targets in MODULES.items():
        rooms.setdefault(room, set()).update(target[0] for target in targets if target[0] != room)
    assert rooms["plan"] == {"names", "syntax"}
    assert rooms["run"] == {"plan"}
    list(TopologicalSorter(rooms).static_order())


def test_modules_are_imported_from_their_own_files() -> None:
    """Not from a package's `__init__`, which imports all of the package."""
    for module, targets in MODULES.items():
        for target in targets:
            assert target in MODULES, f"{'/'.join(module)} imports {'.'.join(target)}"
