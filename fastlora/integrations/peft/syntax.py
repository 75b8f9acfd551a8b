"""The source of a module's forward as a syntax tree."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any


@functools.cache
def source_tree(forward: Any) -> ast.FunctionDef | None:
    """A forward as a syntax tree, None where there is no source that can be followed.

    A decorated forward computes something else than its source says.
    """
    if hasattr(forward, "__wrapped__"):
        return None
    try:
        source = inspect.getsource(forward)
        tree = ast.parse(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError):
        return None
    found = next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)
    if found is None or found.decorator_list:
        return None
    if not found.args.args or found.args.args[0].arg != "self":
        return None
    return found
