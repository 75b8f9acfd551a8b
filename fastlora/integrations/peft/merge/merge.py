"""Merging adapters into the base weight, and taking them out again.

PEFT knows how each of its layers and variants merges. Here its own code does that on one layer at a
time, on a copy of the base weight and the adapters in fp32, and the result is rounded once: to the
base's dtype, or to 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import Tensor, nn

from ... import bitsandbytes as bnb
from ...names import plain_name
from ..names import SHORT_DTYPES, check_module
from .kept import check_kept, kept_of
from .layer import cant_keep_reason, merge_layer, merged_copy, unmerge_layer
from .originals import OriginalWeights, Source
from .report import MergeReport, MergeRow
from .tied import part_shared

INTO = ("4bit", "dense")
Moments = Mapping[str, Tensor]


def merge_adapter(
    model: nn.Module,
    adapter_names: Sequence[str] | None = None,
    *,
    into: str = "4bit",
    dtype: torch.dtype | None = None,
    base: Source | None = None,
    moments: Moments | None = None,
    compare: bool = True,
    keep_base: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """`W <- round(W + dW)` in every layer that the adapters change, with PEFT's own `dW`.

    The adapters stay in the model, marked as merged: `unmerge_adapter` takes them out,
    `merge_and_unload` leaves the merged model. All sums are in fp32 and rounded once. At any time
    one layer has copies, in fp32. Weights that layers share (tied embeddings, replicated layers)
    are parted, so that each gets its own update; the config then no longer calls them tied.

    Args:
        model: a model with PEFT's layers inside.
        adapter_names: which; the active ones when None.
        into: what a 4-bit layer becomes. "4bit": quantised again, as it was. "dense": an
            `nn.Linear`. Dense layers stay dense.
        dtype: of the layers that become dense: fp32, bf16 or fp16; None takes the one from before
            quantisation. A model whose norms are in fp32, as prepare_model_for_kbit_training leaves
            them, runs with fp32 alone.
        base: the weights from before quantisation (a model, a state dict, or a folder of
            safetensors files). 4-bit layers then become `round(W_16 + dW)`.
        moments: layer name -> `[K, K]`, `x^T x` over typical inputs; `InputMoments` collects them.
            4-bit layers that it names are quantised by `quantize_with_feedback`. Not with
            `base`: models came out worse with both than with `base` alone.
        compare: measure PEFT's own merge for the report, too. It costs a copy of one
            layer and about as much time again.
        keep_base: keep what the merge changes of the base weights, so that `unmerge_adapter` gives
            them back bit for bit, however often: for loops that merge at each step. In bf16 that is
            a bit for each weight and two bytes for each that changed. Merges into a layer whose
            base is kept keep it, too.
        progress: called with the number of layers done, and of all.

    Returns:
        A row a layer; prints as a table.

    Raises:
        TypeError: model is no nn.Module. ValueError: another argument doesn't fit, or a layer can't
            be merged; nothing has changed then. Also when a sum overflows, which only merging
            shows: the layers before the one named are merged then.
    """
    check_module(model)
    if into not in INTO:
        raise ValueError(f"into must be one of {INTO}, got {into!r}")
    if dtype is not None and dtype not in SHORT_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if into == "dense" and moments is not None:
        raise ValueError("moments must be None with into='dense', which rounds nothing to 4 bits")
    if base is not None and moments is not None:
        raise ValueError(
            "moments must be None with base: rounding by moments made a model on 16-bit weights "
            "worse than plain rounding did"
        )
    plan = _plan(model, adapter_names)
    originals = None if base is None else OriginalWeights(base)
    for merge in plan:
        merge.check(originals, moments)
        if keep_base or kept_of(merge.layer):
            with onload_layer(merge.layer):
                reason = cant_keep_reason(merge.layer, merge.adapters)
            if reason is not None:
                raise ValueError(f"model: layer {merge.key}: {reason}")
    _try_variants(plan)
    # What PEFT checks for the model as a whole.
    check = getattr(getattr(model, "base_model", model), "_check_merge_allowed", None)
    if callable(check):
        check()
    part_shared(model, [merge.layer for merge in plan])

    rows = []
    for done, merge in enumerate(plan):
        with onload_layer(merge.layer):
            rows.append(
                merge.run(
                    originals,
                    moments,
                    into=into,
                    dtype=dtype,
                    compare=compare,
                    keep_base=keep_base,
                )
            )
        if progress is not None:
            progress(done + 1, len(plan))
    return MergeReport(rows)


def unmerge_adapter(model: nn.Module) -> int:
    """`W <- round(W - dW)` in every merged layer, in fp32 with one rounding.

    As with PEFT's own method, what rounding took is not given back; a 4-bit weight is quantised
    again. After a merge with `keep_base` every bit is as before instead, also where a 4-bit layer
    had become dense; shared weights stay parted.

    Returns:
        How many layers were unmerged.

    Raises:
        TypeError: model is no nn.Module. ValueError: a weight whose base was kept has changed since
            it was merged; nothing is unmerged then.
    """
    check_module(model)
    named = [(k, m) for k, m in model.named_modules() if isinstance(m, BaseTunerLayer) and m.merged]
    for key, layer in named:
        with onload_layer(layer):
            try:
                check_kept(layer)
            except ValueError as error:
                raise ValueError(f"model: layer {key}: {error}") from None
    merged = [layer for _, layer in named]
    for layer in merged:
        with onload_layer(layer):
            unmerge_layer(layer)
    return len(merged)


# ---- what is to be done, and whether it can be ---------------------------------------------------


@dataclass(frozen=True)
class _Merge:
    """One layer, and the adapters to merge into it."""

    key: str
    layer: Any
    adapters: list[str]

    @property
    def name(self) -> str:
        """The layer's name in the model that the adapters were added to."""
        return plain_name(self.key)

    @property
    def is_4bit(self) -> bool:
        return bnb.is_linear4bit(self.layer.get_base_layer())

    def check(self, originals: OriginalWeights | None, moments: Moments | None) -> None:
        """Raises ValueError when the layer can't be merged."""
        layer, linear, what = self.layer, self.layer.get_base_layer(), f"model: layer {self.key}"
        if type(layer).merge is BaseTunerLayer.merge:
            raise ValueError(f"{what}: PEFT's {type(layer).__name__} can't be merged")
        biased = any(getattr(layer, "lora_bias", {}).get(name) for name in self.adapters)
        if biased and getattr(linear, "bias", None) is None:
            raise ValueError(f"{what}: lora_bias needs a bias in the base layer, got none")
        for name, parameter in _adapter_parameters(layer, self.adapters):
            if not parameter.is_meta and not parameter.isfinite().all():
                raise ValueError(f"{what}: {name} must be finite, got inf or NaN")
        if not self.is_4bit:
            return
        if bnb.is_repacked(linear) and (reason := bnb.unpack_reason(linear)) is not None:
            raise ValueError(f"{what}: {reason}")
        bnb.unpack(linear)
        try:
            _, state = bnb.packed(linear)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        if originals is not None:
            turned = bnb.was_conv1d(linear)
            originals.check(self.name, state.shape[::-1] if turned else state.shape)
        K = state.shape[-1]
        # InputMoments makes them of the layer's own inputs, and not before they are asked for.
        given = moments.get(self.key) if isinstance(moments, dict) else None
        if given is not None and tuple(given.shape) != (K, K):
            raise ValueError(f"moments: {self.key} must be [{K}, {K}], got {tuple(given.shape)}")

    def run(
        self, originals: OriginalWeights | None, moments: Moments | None, **options: Any
    ) -> MergeRow:
        """Merges the layer; see `merge_layer` for `options`."""
        original = originals[self.name] if originals is not None and self.is_4bit else None
        if original is not None and bnb.was_conv1d(self.layer.get_base_layer()):
            original = original.T
        given = moments[self.key] if moments is not None and self.key in moments else None
        try:
            return merge_layer(
                self.key, self.layer, self.adapters, original=original, moments=given, **options
            )
        except ValueError as error:
            raise ValueError(f"model: layer {self.key}: {error}") from error


def _plan(model: nn.Module, adapter_names: Sequence[str] | None) -> list[_Merge]:
    """The layers that hold one of the adapters, and those of it that are not merged yet."""
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names must be a list of names, got the string {adapter_names!r}")
    layers = [(key, m) for key, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ValueError("model must have PEFT's layers inside, got none")
    plan, held = [], set()
    for key, layer in layers:
        wanted = dict.fromkeys(layer.active_adapters if adapter_names is None else adapter_names)
        held_here = {name for part in layer.adapter_layer_names for name in getattr(layer, part)}
        there = [name for name in wanted if name in held_here]
        held.update(there)
        if left := [name for name in there if name not in layer.merged_adapters]:
            plan.append(_Merge(key, layer, left))
    if missing := set(adapter_names or ()) - held:
        raise ValueError(f"adapter_names: no layer has {', '.join(sorted(missing))}")
    if not plan:
        what = "are merged already; call unmerge_adapter first" if held else "are none"
        raise ValueError(f"adapter_names: the adapters to merge {what}")
    return plan


def _try_variants(plan: list[_Merge]) -> None:
    """Raises what the variants raise that can't be merged (aLoRA, Arrow): each is tried once."""
    tried = set()
    for merge in plan:
        variants = getattr(merge.layer, "lora_variant", {})
        for adapter in merge.adapters:
            if adapter in variants and type(variants[adapter]) not in tried:
                tried.add(type(variants[adapter]))
                try:
                    merged_copy(merge.layer, [adapter])
                except (NotImplementedError, RuntimeError) as error:
                    raise ValueError(f"model: layer {merge.key}: {error}") from error


def _adapter_parameters(layer: Any, adapters: list[str]) -> Iterator[tuple[str, nn.Parameter]]:
    for attribute in layer.adapter_layer_names:
        for name, parameter in getattr(layer, attribute).named_parameters():
            if name.partition(".")[0] in adapters:
                yield f"{attribute}.{name}", parameter
