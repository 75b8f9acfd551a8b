"""What `keep_base=True` keeps of base weights, so that unmerging gives them back bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn
from torch.nn.functional import pad

from ....quant import packed_bytes
from ... import bitsandbytes as bnb
from ..swap import is_fast, swap_in, swap_out

_CURE = (
    "what keep_base kept does not fit; load the model again, or take the adapters out by PEFT's "
    "own unmerge_adapter, which rounds"
)
# On a layer: a KeptBase for each merge since its base weight was its own, in order.
_KEPT = "_fastlora_kept_base"


@dataclass(frozen=True)
class KeptTensor:
    """The elements of a tensor before a change, where it changed.

    n bits and the changed elements, whatever the dtype: in bf16, `n / 8 + 2 changed` bytes.

    Args:
        changed: uint8 [ceil(n / 8)], a bit for each element.
        values: what the changed elements were.
        after: a checksum of the changed tensor.
    """

    changed: Tensor
    values: Tensor
    after: int

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> KeptTensor:
        """What is to be kept of `before`, which became `after`."""
        changed = (_bits(before) != _bits(after)).reshape(-1)
        return cls(_packed(changed), before.reshape(-1)[changed], _checksum(after))

    def fits(self, tensor: Tensor) -> bool:
        """Whether `tensor` is still the changed one."""
        return tensor.dtype == self.values.dtype and _checksum(tensor) == self.after

    def restore(self, tensor: Tensor) -> None:
        """Gives the changed elements of `tensor` back."""
        changed = _unpacked(self.changed.to(tensor.device))[: tensor.numel()]
        tensor[changed.view(tensor.shape)] = self.values.to(tensor.device)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.changed.nbytes + self.values.nbytes


@dataclass(frozen=True)
class KeptBase:
    """The base layer before a merge.

    Args:
        adapters: which were merged.
        base: the module, which a merge may replace.
        tensors: what changed in its weights, by their names; bytes of a 4-bit one.
        state: the `quant_state` of a 4-bit one.
    """

    adapters: list[str]
    base: nn.Module
    tensors: Mapping[str, KeptTensor]
    state: Any

    def check(self, layer: Any) -> None:
        """Raises ValueError where the base of `layer` is no longer what the merge left."""
        if layer.get_base_layer() is not self.base and not bnb.is_linear4bit(self.base):
            raise ValueError(f"its base layer was exchanged since it was merged; {_CURE}")
        if layer.merged_adapters[-len(self.adapters) :] != self.adapters:
            raise ValueError(f"other adapters were merged into it since, without fastlora; {_CURE}")
        for name, tensor in _weights(self.base, self.tensors).items():
            if not self.tensors[name].fits(tensor):
                raise ValueError(f"its {name} has changed since it was merged; {_CURE}")

    @torch.no_grad()
    def restore(self, layer: Any) -> None:
        """Puts the base layer of `layer` back as it was."""
        for name, tensor in _weights(self.base, self.tensors).items():
            self.tensors[name].restore(tensor)
        if self.state is not None:
            bnb.set_quant_state(self.base, self.state)
        if layer.get_base_layer() is not self.base:  # a 4-bit one, which has become dense
            _put_4bit_back(layer, self.base)
        for adapter in self.adapters:
            layer.merged_adapters.remove(adapter)
            # A norm that PEFT's own unmerge of DoRA would use.
            getattr(layer, "_caches", {}).pop(f"{adapter}-weight_norm", None)


@contextmanager
def keeping(layer: Any, names: list[str], keep: bool) -> Iterator[None]:
    """Keeps the base of `layer` over a merge inside, if asked for or if it is kept already.

    Args:
        layer: one of PEFT's.
        names: the parameters of its base layer that the merge can change.
    """
    earlier = kept_of(layer)
    if not earlier:
        forget_kept(layer)  # of merges that were taken out otherwise
    if not (keep or earlier):
        yield
        return
    base, merged = layer.get_base_layer(), list(layer.merged_adapters)
    before = {name: t.detach().clone() for name, t in _weights(base, names).items()}
    state = bnb.raw_quant_state(base) if bnb.is_linear4bit(base) else None
    yield
    new = [name for name in layer.merged_adapters if name not in merged]
    after = _weights(base, names)
    tensors = {name: KeptTensor.of(before[name], after[name]) for name in names}
    setattr(layer, _KEPT, [*earlier, KeptBase(new, base, tensors, state)])
    # PEFT unmerges by itself, in a call with disabled adapters, for one.
    layer.unmerge = _Unmerge(layer)


class _Unmerge:
    """Stands for `unmerge` of a layer whose base is kept. A class of its own, for copies of it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self) -> None:
        layer = self.layer
        try:
            check_kept(layer)
        except ValueError as error:
            warnings.warn(
                f"fastlora: unmerging with rounding; a layer was merged, and {error}", stacklevel=2
            )
            forget_kept(layer)
        else:
            restore_kept(layer)
        if layer.merged:
            layer.unmerge()


def kept_of(layer: Any) -> list[KeptBase]:
    """What was kept of the base of `layer`; nothing where PEFT has unmerged it since."""
    kept: list[KeptBase] = getattr(layer, _KEPT, [])
    merged = set(layer.merged_adapters)
    return kept if all(merged.issuperset(k.adapters) for k in kept) else []


def check_kept(layer: Any) -> None:
    """Raises ValueError where the base of `layer` is not what the latest kept merge left."""
    for kept in kept_of(layer)[-1:]:
        kept.check(layer)


def restore_kept(layer: Any) -> None:
    """Takes the adapters out whose base was kept."""
    for kept in reversed(kept_of(layer)):
        kept.restore(layer)
    forget_kept(layer)


def forget_kept(layer: Any) -> None:
    """Drops what was kept; the layer stays merged."""
    layer.__dict__.pop(_KEPT, None)
    if isinstance(layer.__dict__.get("unmerge"), _Unmerge):
        del layer.unmerge


def not_kept_reason(layer: Any, names: list[str]) -> str | None:
    """Why the base of `layer` can't be kept, or None."""
    try:
        check_kept(layer)
    except ValueError as error:
        return str(error)
    base = layer.get_base_layer()
    plain = all(
        type(base._parameters[name]) is nn.Parameter and base._parameters[name].is_floating_point()
        for name in names
    )
    if isinstance(layer, MultiheadAttention) or not (plain or bnb.is_linear4bit(base)):
        return f"keep_base must be False: PEFT's {type(layer).__name__} merges it in its own way"
    return None


def _weights(base: Any, names: Any) -> dict[str, Tensor]:
    four_bit = bnb.is_linear4bit(base)
    return {
        name: packed_bytes(base._parameters[name])
        if four_bit and name == "weight"
        else base._parameters[name].detach()
        for name in names
    }


def _put_4bit_back(layer: Any, base: nn.Module) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    fast = is_fast(layer)
    swap_out(layer)
    layer.base_layer, layer.__class__ = base, Linear4bit
    if fast:
        swap_in(layer)


def _bits(tensor: Tensor) -> Tensor:
    """`tensor` as integers: -0 differs from 0, and a NaN is equal to itself."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(sizes[tensor.element_size()])


def _checksum(tensor: Tensor) -> int:
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = octets.numel() // 8 * 8
    words = octets[:whole].view(torch.int64)
    # Odd factors, so that no bit is lost and each place counts otherwise.
    places = 2 * torch.arange(len(words), device=words.device) + 1
    return int((words * places).sum()) + int(octets[whole:].sum())


def _packed(bits: Tensor) -> Tensor:
    """Eight bools to a byte, the first lowest."""
    words = pad(bits, (0, -bits.numel() % 8)).view(torch.int64)
    # The product moves the lowest bit of each of its eight bytes into the highest byte.
    return ((words * 0x0102040810204080) >> 56).to(torch.uint8)


def _unpacked(octets: Tensor) -> Tensor:
    bits = torch.arange(256, device=octets.device)[:, None] >> torch.arange(8, device=octets.device)
    words = (bits & 1).to(torch.uint8).view(torch.int64).reshape(-1)
    return words.index_select(0, octets.int()).view(torch.bool)
