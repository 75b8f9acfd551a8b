"""The suites: named sets of cases behind the project's claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastlora.cli.bench.case import Case, Layer, grid

# (N, K) of linear layers: SmolLM2-135M's q_proj, Llama-3.2-1B's, Llama-2-7B's attention and MLP,
# Llama-3-8B's gate_proj.
SMOL = (576, 576)
ONE_B = (2048, 2048)
ATTENTION = (4096, 4096)
UP, DOWN = (11008, 4096), (4096, 11008)
GATE = (14336, 4096)

TOKENS = (1, 4, 16, 64, 128, 512, 2048)
DECODE_TOKENS = (1, 2, 4, 8, 16)
TRAINING = ("forward", "step")

# The baselines of a claim about a training step.
RIVALS = ("frozen", "peft", "peft-cast", "addmm", "fastlora", "fastlora-cast", "fastlora-frozen")


@dataclass(frozen=True)
class Suite:
    """Cases that are measured together.

    Args:
        what: one line, for the list of suites.
        cases: a function that returns them.
        providers: names in PROVIDERS.
        memory: measure the peak memory too.
    """

    what: str
    cases: Callable[[], list[Case]]
    providers: Sequence[str]
    memory: bool = False


def _layers(shapes: Sequence[tuple[int, int]], **options: object) -> list[Layer]:
    settings: dict[str, object] = {"quant": "nf4", "dropout": 0.05, **options}
    return [Layer(N, K, **settings) for N, K in shapes]  # type: ignore[arg-type]


SUITES = {
    "main": Suite(
        "4096 x 4096 on nf4, training, 1 to 2048 tokens",
        lambda: grid(_layers([ATTENTION]), TOKENS, TRAINING),
        (*RIVALS, "fastlora-peft"),
    ),
    "shapes": Suite(
        "the other shapes of Llama-like models on nf4, training",
        lambda: grid(_layers([SMOL, ONE_B, UP, DOWN, GATE]), (16, 64, 128, 512, 2048), TRAINING),
        ("frozen", "peft", "fastlora", "fastlora-frozen"),
    ),
    "dense": Suite(
        "bf16 base, training, with the compiled PEFT",
        lambda: grid(
            _layers([SMOL, ONE_B, ATTENTION, UP], quant="none"), (16, 64, 128, 512, 2048), TRAINING
        ),
        (*RIVALS, "compile"),
    ),
    "quant": Suite(
        "cost of a 4-bit base over a dense one",
        lambda: grid(_layers([ONE_B, ATTENTION, UP]), (16, 64, 128, 512, 2048), TRAINING),
        ("peft", "frozen-dense", "fastlora", "fastlora-frozen", "fastlora-dense"),
    ),
    "decode": Suite(
        "inference of few tokens, nf4 and dense, with bitsandbytes' repacked weights",
        lambda: grid(
            _layers([ONE_B, ATTENTION, UP, DOWN], dropout=0.0)
            + _layers([ATTENTION], quant="none", dropout=0.0),
            DECODE_TOKENS,
            ["inference"],
        ),
        ("frozen", "frozen-dense", "peft", "bnb-packed", "fastlora", "fastlora-frozen", "read"),
    ),
    "ranks": Suite(
        "ranks 8 and 64, and no dropout",
        lambda: grid(
            [
                *_layers([ATTENTION], R=8),
                *_layers([ATTENTION], R=64),
                *_layers([ATTENTION], dropout=0.0),
            ],
            (16, 64, 512),
            ["step"],
        ),
        ("frozen", "peft", "fastlora", "fastlora-frozen"),
    ),
    "fp32": Suite(
        "fp32 activations",
        lambda: grid(
            _layers([ATTENTION], dtype="fp32", dropout=0.0)
            + _layers([ATTENTION], dtype="fp32", dropout=0.0, quant="none"),
            (16, 64, 128, 512),
            TRAINING,
        ),
        ("frozen", "frozen-dense", "peft", "fastlora", "fastlora-frozen"),
    ),
    "dequantize": Suite(
        "a whole 4-bit weight to a dense one",
        lambda: grid(
            _layers([ONE_B, ATTENTION, GATE]) + _layers([ATTENTION], dtype="fp32"),
            [],
            ["dequantize"],
        ),
        ("bitsandbytes", "fastlora-fresh", "fastlora-out", "write"),
    ),
    "memory": Suite(
        "peak memory of a training step over four layers, 1024 tokens",
        lambda: grid(_layers([ATTENTION]) + _layers([ATTENTION], quant="none"), [1024], ["step"]),
        ("frozen", "peft", "peft-cast", "addmm", "fastlora", "fastlora-peft", "fastlora-frozen"),
        memory=True,
    ),
}
