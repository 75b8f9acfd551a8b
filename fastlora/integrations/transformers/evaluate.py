"""Perplexity of a causal LM."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


@torch.no_grad()
def perplexity(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """`exp(mean over label tokens of -log p)`, with the same weight for each token.

    Args:
        model: a causal LM; its training mode is restored afterwards.
        batches: dicts with `input_ids`, `attention_mask` and `labels` (-100 is not counted).

    Raises:
        ValueError: there is no token to predict.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            # Nothing predicts the first token of a row.
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            if tokens:
                total += float(model(**batch).loss) * tokens
                count += tokens
    finally:
        model.train(training)
    if not count:
        raise ValueError("batches must hold at least one label to predict, got none")
    return math.exp(min(total / count, 700.0))
