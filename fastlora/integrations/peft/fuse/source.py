"""Reads from the source of a forward whether it is a gated MLP, and of which children."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..syntax import source_tree


class GatedSource(NamedTuple):
    """`down(activation(gate(x)) * up(x))`: the children's names.

    `activation` is a child's name, or what the forward's globals hold under `dotted`, with its
    keyword arguments. `up_first` says that up is called before gate.
    """

    gate: str
    up: str
    down: str
    activation: Any
    keywords: dict[str, Any]
    up_first: bool
    dotted: str = ""


def gated_mlp(module: nn.Module) -> GatedSource | None:
    """The gated MLP that the forward of `module` computes and nothing else; None for all others."""
    kind: Any = type(module)
    tree = source_tree(kind.forward)
    if tree is None:
        return None
    parameters = tree.args
    if len(parameters.args) != 2 or parameters.vararg or parameters.kwonlyargs or parameters.kwarg:
        return None
    result = _returned(copy.deepcopy(tree.body))  # it writes into the nodes
    if result is None or (down := _call(result)) is None or (name := _child(down.func)) is None:
        return None
    product = down.args[0]
    if not (isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult)):
        return None
    x = parameters.args[1].arg
    for left, right in ((product.left, product.right), (product.right, product.left)):
        found = _gate(left, right, x)
        if found is not None:
            outer, gate, up = found
            activation: Any = _child(outer.func)
            dotted = ""
            if activation is None:
                dotted = ".".join(reversed(list(_dotted(outer.func))))
                activation = global_of(kind.forward, dotted)
            keywords = _constants(outer.keywords)
            if activation is None or keywords is None:
                return None
            # Lines and columns are those of the source, whatever was put in where.
            order = (up.lineno, up.col_offset) < (gate.lineno, gate.col_offset)
            names = str(_child(gate.func)), str(_child(up.func)), name
            return GatedSource(*names, activation, keywords, order, dotted)
    return None


def _gate(left: ast.expr, right: ast.expr, x: str) -> tuple[ast.Call, ast.Call, ast.Call] | None:
    """The three calls of `act(self.gate(x))` and `self.up(x)`, where they are that."""
    outer, up = _call(left, keywords=True), _call(right)
    if outer is None or up is None or (gate := _call(outer.args[0])) is None:
        return None
    for call in (gate, up):
        argument = call.args[0]
        if _child(call.func) is None or not isinstance(argument, ast.Name) or argument.id != x:
            return None
    return outer, gate, up


def _call(node: ast.expr, keywords: bool = False) -> ast.Call | None:
    """`node` as a call with one positional argument."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and (keywords or not node.keywords):
        return node
    return None


def _child(node: ast.expr) -> str | None:
    """`name` of an expression `self.name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else None
    return None


def _returned(body: list[ast.stmt]) -> ast.expr | None:
    """What a body of plain assignments returns, with their values put in; None for any other.

    Each value must be used once: one that nobody reads is there for what its calls do, and one that
    is read twice is not computed twice.
    """
    values: dict[str, ast.expr] = {}
    put = _Put(values)
    for statement in body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if isinstance(statement, ast.Return) and statement.value is not None:
            result: ast.expr = put.visit(statement.value)
            return result if all(count == 1 for count in put.reads.values()) else None
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return None
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            return None
        value = put.visit(statement.value)
        if put.reads.get(target.id, 1) != 1:
            return None
        values[target.id], put.reads[target.id] = value, 0
    return None


class _Put(ast.NodeTransformer):
    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values
        self.reads: dict[str, int] = {}  # of each value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.values:
            return node
        self.reads[node.id] += 1
        return self.values[node.id]


def global_of(function: Any, dotted: str) -> Any:
    """What a dotted name means in the globals of `function`, None where it means nothing there."""
    first, *names = dotted.split(".")
    code = getattr(function, "__code__", None)
    if code is None or first in code.co_freevars:
        return None
    found = function.__globals__.get(first)
    for name in names:
        found = getattr(found, name, None)
    return found


def _dotted(node: ast.expr) -> Iterator[str]:
    """The names of `a.b.c`, the last first."""
    while isinstance(node, ast.Attribute):
        yield node.attr
        node = node.value
    yield node.id if isinstance(node, ast.Name) else ""


def _constants(keywords: list[ast.keyword]) -> dict[str, Any] | None:
    values = {}
    for keyword in keywords:
        if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
            return None
        values[keyword.arg] = keyword.value.value
    return values
