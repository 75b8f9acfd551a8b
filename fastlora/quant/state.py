"""The quantisation state of a 4-bit weight, which decodes its packed bytes, whatever the format.

A weight of `n` elements is flattened row-major and cut into blocks of `blocksize` elements (the
last block may be short). Each block has one `absmax`; each element is one of 16 codes, two to a
byte, the first in the high nibble

    weight[i] = code[nibble[i]] * absmax[i // blocksize]

`absmax` may itself be stored in 8 bits, through a table of 256 values

    absmax[b] = state2.code[absmax_u8[b]] * state2.absmax[b // 256] + offset

Every kernel decodes by these two lines. A format (`quant.FORMATS`) says which tables they use and
how a weight is quantised. Field names and layout are those of bitsandbytes: states go both ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NESTED_BLOCKSIZE = 256
_EMPTY = torch.empty(0, device="cpu")


@dataclass(eq=False)
class QuantState:
    """Everything that decodes the packed bytes of a 4-bit weight.

    Args:
        absmax: fp32 `[nblocks]`, or uint8 `[nblocks]` with a `state2`.
        shape: shape of the weight.
        code: fp32 `[16]`; `[256]` for a `state2`.
        dtype: dtype of the weight before it was quantised.
        blocksize: elements per absmax.
        quant_type: name of the format, a key of `quant.FORMATS`. For a `state2`: "dynamic" (double
            quantisation) or "e8m0" (the scales of MXFP4, which are powers of two).
        offset: fp32 `[]`, the mean taken off absmax before the second quantisation; 0 for "e8m0".
        state2: how to decode absmax itself, when it is stored in 8 bits.
    """

    absmax: Tensor
    shape: torch.Size
    code: Tensor
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    offset: Tensor | None = None
    state2: QuantState | None = None

    @property
    def nested(self) -> bool:
        """True for double quantisation: fp32 absmax that was itself quantised to 8 bits."""
        return self.state2 is not None and self.state2.quant_type == "dynamic"

    def to(self, device: torch.device | str) -> QuantState:
        """This state with every tensor on `device`. Dtypes never change."""
        return self.mapped(lambda t: t.to(device))

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> QuantState:
        """This state with `fn(t)` in place of every tensor t."""
        tensors = [None if t is None else fn(t) for t in self.tensors()]
        return self.with_tensors(*tensors)  # type: ignore[arg-type]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """absmax, code, state2.absmax, state2.code, offset: the order that the torch ops take."""
        inner = self.state2
        if inner is None:
            return self.absmax, self.code, None, None, self.offset
        return self.absmax, self.code, inner.absmax, inner.code, self.offset

    def with_tensors(
        self,
        absmax: Tensor,
        code: Tensor,
        nested_absmax: Tensor | None = None,
        nested_code: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> QuantState:
        """This state around other tensors, in the order of `tensors`."""
        # On the path of every backward: the constructor costs a fifth of dataclasses.replace.
        state2 = self.state2
        if state2 is not None and nested_absmax is not None and nested_code is not None:
            state2 = QuantState(
                nested_absmax,
                state2.shape,
                nested_code,
                state2.dtype,
                state2.blocksize,
                state2.quant_type,
            )
        return QuantState(
            absmax, self.shape, code, self.dtype, self.blocksize, self.quant_type, offset, state2
        )

    def without_tensors(self) -> QuantState:
        """This state with empty tensors, for `with_tensors` to fill again."""
        return self.with_tensors(_EMPTY, _EMPTY, _EMPTY, _EMPTY, None)

    def expert(self, e: int) -> QuantState:
        """The state of `weight[e]`, of a stack `[E, N, K]` whose blocks belong to one expert each.

        Raises:
            ValueError: absmax is stored in 8 bits, and 256 neighbours that share a scale belong to
                two experts.
        """
        E, *shape = self.shape
        blocks = self.absmax.numel() // E
        state2 = self.state2
        if state2 is not None:
            if blocks % state2.blocksize:
                raise ValueError(
                    f"quant_state must have a multiple of {state2.blocksize} blocks for each "
                    f"expert when absmax is stored in 8 bits, got {blocks}"
                )
            scales = blocks // state2.blocksize
            state2 = replace(
                state2,
                absmax=state2.absmax[e * scales : (e + 1) * scales],
                shape=torch.Size((blocks,)),
            )
        absmax = self.absmax.view(-1)[e * blocks : (e + 1) * blocks]
        return replace(self, absmax=absmax, shape=torch.Size(shape), state2=state2)

    def as_dict(self) -> dict[str, Tensor]:
        """State-dict entries, named and encoded as bitsandbytes does (prefix `weight.` left out).

        `absmax`, `quant_map`, when nested `nested_absmax` and `nested_quant_map`, and
        `quant_state.bitsandbytes__<quant_type>`: the remaining fields as JSON in a uint8 tensor.

        Raises:
            ValueError: bitsandbytes has no such format.
        """
        if self.state2 is not None and not self.nested:
            raise ValueError(
                "quant_state must be in a format of bitsandbytes, which has no "
                f"{self.quant_type!r}; FORMATS[{self.quant_type!r}].to_entries has its own keys"
            )
        fields: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": _dtype_name(self.dtype),
            "shape": tuple(self.shape),
        }
        entries = {"absmax": self.absmax, "quant_map": self.code}
        if self.state2 is not None and self.offset is not None:
            entries["nested_absmax"] = self.state2.absmax
            # safetensors refuses tensors that share memory, and states may share one table.
            entries["nested_quant_map"] = self.state2.code.clone()
            fields["nested_blocksize"] = self.state2.blocksize
            fields["nested_dtype"] = _dtype_name(self.state2.dtype)
            fields["nested_offset"] = self.offset.item()
        blob = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
        entries[f"quant_state.bitsandbytes__{self.quant_type}"] = blob
        return entries

    @classmethod
    def from_dict(
        cls, entries: Mapping[str, Tensor], device: torch.device | str | None = None
    ) -> QuantState:
        """The inverse of `as_dict`.

        Args:
            entries: the state-dict entries of one weight, prefix `weight.` left out.
            device: where the tensors go; they stay where they are when None.

        Raises:
            ValueError: when an entry is missing, or its JSON is not that of a state.
        """
        blobs = [key for key in entries if key.startswith("quant_state.bitsandbytes__")]
        if len(blobs) != 1:
            raise ValueError(
                f"entries must have one key 'quant_state.bitsandbytes__<quant_type>', got {blobs}"
            )
        try:
            fields = _fields(entries[blobs[0]])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"entries: {blobs[0]} is no quant state: {error}") from error
        wanted = {"absmax", "quant_map"}
        if "nested_offset" in fields:
            wanted |= {"nested_absmax", "nested_quant_map"}
        if missing := wanted - entries.keys():
            raise ValueError(f"entries must have {sorted(wanted)}, missing {sorted(missing)}")
        state2, offset = None, None
        if "nested_offset" in fields:
            state2 = cls(
                absmax=entries["nested_absmax"],
                shape=entries["absmax"].shape,
                code=entries["nested_quant_map"],
                dtype=getattr(torch, fields["nested_dtype"]),
                blocksize=fields["nested_blocksize"],
                quant_type="dynamic",
            )
            offset = torch.tensor(
                fields["nested_offset"], dtype=torch.float32, device=entries["nested_absmax"].device
            )
        state = cls(
            absmax=entries["absmax"],
            shape=torch.Size(fields["shape"]),
            code=entries["quant_map"],
            dtype=getattr(torch, fields["dtype"]),
            blocksize=fields["blocksize"],
            quant_type=fields["quant_type"],
            offset=offset,
            state2=state2,
        )
        return state if device is None else state.to(device)


# What a state dict's JSON has, and, if absmax is nested, also has.
_KINDS: dict[str, Any] = {"shape": list, "dtype": str, "blocksize": int, "quant_type": str}
_NESTED_KINDS: dict[str, Any] = {
    "nested_dtype": str,
    "nested_blocksize": int,
    "nested_offset": (int, float),
}


def _fields(blob: Tensor) -> dict[str, Any]:
    """The JSON of a state dict's entry, after a look at each value's type.

    Raises:
        ValueError, KeyError, TypeError: it is no JSON, or lacks a value, or has another one.
    """
    fields = json.loads(bytes(blob.cpu().tolist()))
    if not isinstance(fields, dict):
        raise TypeError(f"expected an object, got {fields!r}")
    for name, kind in (_KINDS | (_NESTED_KINDS if "nested_offset" in fields else {})).items():
        value = fields[name]
        is_dtype = isinstance(getattr(torch, str(value), None), torch.dtype)
        if not isinstance(value, kind) or (name.endswith("dtype") and not is_dtype):
            raise TypeError(f"{name} can't be {value!r}")
    if not all(isinstance(size, int) and size >= 0 for size in fields["shape"]):
        raise TypeError(f"shape can't be {fields['shape']!r}")
    return fields


def packed_bytes(weight: Tensor) -> Tensor:
    """The bytes of a packed weight, uint8 `[nbytes]`, sharing its memory.

    Args:
        weight: packed 4-bit weight; contiguous; uint8, or a float dtype that only serves as storage
            (FSDP shards no integers), whose bytes are the same.
    """
    data = weight.detach()
    return (data if data.dtype == torch.uint8 else data.view(torch.uint8)).reshape(-1)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
