"""Names, argument types and options shared by several commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any, TypeVar

# Short name, as in tables -> torch's name.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SHORT_DTYPES = {name: short for short, name in DTYPES.items()}
QUANTS = ("none", "nf4", "fp4")

T = TypeVar("T")


def torch_dtype(name: str) -> Any:
    """The torch dtype with this name, short or torch's own."""
    import torch

    return getattr(torch, DTYPES.get(name, name))


# ---- types -----------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number above 0."""
    return int(_number(text, int, lambda value: value >= 1, "a whole number from 1 on"))


def not_negative(text: str) -> int:
    """A whole number, 0 or above."""
    return int(_number(text, int, lambda value: value >= 0, "a whole number from 0 on"))


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda value: 0.0 < value < float("inf"), "a number above 0")


def share(below: float = 1.0) -> Callable[[str], float]:
    """A number from 0 to below `below`."""
    expected = f"a number from 0 to below {below:g}"
    return lambda text: _number(text, float, lambda value: 0.0 <= value < below, expected)


def several(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Values of a type, with commas between them."""
    return lambda text: [kind(word) for word in text.split(",")]


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """A name in `known`."""

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"expected {', '.join(known)}, got {text}")
        return text

    return name


def shapes(text: str) -> list[tuple[int, int]]:
    """Pairs N,K with colons between them."""
    pairs = []
    for word in text.split(":"):
        numbers = several(positive)(word)
        if len(numbers) != 2:
            raise argparse.ArgumentTypeError(f"expected N,K, got {word}")
        pairs.append((numbers[0], numbers[1]))
    return pairs


def _number(text: str, kind: type[float], fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
    return value


# ---- options ---------------------------------------------------------------------------------


def add_sizes(group: Any, *, tokens: str, quant: str) -> None:
    """--shape, --tokens, --rank and --quant, several of each; None if they are not given.

    Args:
        tokens, quant: the defaults, for the help.
    """
    group.add_argument(
        "--shape",
        type=shapes,
        metavar="N,K",
        help="out_features, in_features; several with : between (4096,4096)",
    )
    group.add_argument("--tokens", type=several(positive), metavar="M,...", help=f"({tokens})")
    group.add_argument("--rank", type=several(positive), metavar="R,...", help="(16)")
    group.add_argument(
        "--quant",
        type=several(one_of(QUANTS)),
        metavar="NAME,...",
        help=f"{' | '.join(QUANTS)} ({quant})",
    )


def add_timing(group: Any) -> None:
    """--rounds, None if it is not given, and --sample-ms."""
    group.add_argument("--rounds", type=positive, metavar="N", help="(9)")
    group.add_argument(
        "--sample-ms",
        type=positive_float,
        default=20.0,
        metavar="MS",
        help="length of a sample (20)",
    )


def add_double_quant(group: Any) -> None:
    """--double-quant and --no-double-quant."""
    group.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="absmax of a 4-bit weight in 8 bits as well (on)",
    )
