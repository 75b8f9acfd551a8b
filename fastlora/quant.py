"""The 4-bit weight format: code tables, quantisation state, packing rules.

A weight of `n` elements is flattened row-major and cut into blocks of `blocksize` elements (the
last block may be short). Each block has one `absmax`; each element is one of 16 codes, two to a
byte, the first in the high nibble

    weight[i] = code[nibble[i]] * absmax[i // blocksize]

When nested ("double quantisation"), `absmax` is itself stored in 8 bits

    absmax[b] = state2.code[absmax_u8[b]] * state2.absmax[b // 256] + offset

Field names, layout and state-dict keys are those of bitsandbytes, so states go both ways.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BLOCKSIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
QUANT_TYPES: tuple[str, ...] = ("nf4", "fp4")

# Quantiles of the standard normal distribution, one exact zero (QLoRA, arXiv:2305.14314, app. E).
NF4_CODE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Sign, two exponent bits, one mantissa bit, over 12, rounded to fp32. Code 8 is +0, as code 0.
FP4_CODE: tuple[float, ...] = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
    0.0,
    -0.0052083334885537624,
    -0.6666666865348816,
    -1.0,
    -0.3333333432674408,
    -0.5,
    -0.1666666716337204,
    -0.25,
)

_CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}
_EMPTY = torch.empty(0, device="cpu")


def code_table(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """The 16 values that a nibble stands for, `[16]` fp32.

    Args:
        quant_type: "nf4" or "fp4".
        device: where the table goes; the CPU when None.

    Raises:
        ValueError: for another `quant_type`.
    """
    if quant_type not in _CODES:
        raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
    return torch.tensor(_CODES[quant_type], dtype=torch.float32, device=device)


def quantize_bounds(code: Tensor) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbours of the sorted code, `[15]`, and sorted position -> code, `[16]`.

    A scaled value takes the code at the number of midpoints that lie below it.

    Args:
        code: `[16]` fp32, as `code_table` gives it.
    """
    ascending, order = code.sort(stable=True)
    return (ascending[:-1] + ascending[1:]) / 2, order


def dynamic_code() -> Tensor:
    """The 8-bit dynamic map for nested absmax, `[256]` fp32, ascending.

    For each decade `10^(e-6)`, `e = 0..6`: the midpoints of `2^e` equal parts of [0.1, 1], with
    both signs; and 0 and 1.

    Source: 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561.
    """
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        decade = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [decade, -decade]
    return torch.cat(values).sort().values


@dataclass(eq=False)
class QuantState:
    """What is needed, beside the packed bytes, to decode a 4-bit weight.

    Args:
        absmax: fp32 `[nblocks]`, or uint8 `[nblocks]` when nested.
        shape: shape of the weight.
        code: fp32 `[16]`; `[256]` for a `state2`.
        dtype: dtype of the weight before it was quantised.
        blocksize: elements per absmax.
        quant_type: "nf4" or "fp4"; "dynamic" for a `state2`.
        offset: fp32 `[]`, the mean taken off absmax before the second quantisation.
        state2: the state of absmax itself, when nested.
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
        """True when absmax is stored in 8 bits."""
        return self.state2 is not None

    def to(self, device: torch.device | str) -> QuantState:
        """This state with every tensor on `device`. Dtypes never change."""
        moved = [None if t is None else t.to(device) for t in self.tensors()]
        return self.with_tensors(*moved)  # type: ignore[arg-type]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """absmax, code, offset, state2.absmax, state2.code: what autograd has to save."""
        inner = self.state2
        nested = (None, None) if inner is None else (inner.absmax, inner.code)
        return self.absmax, self.code, self.offset, *nested

    def with_tensors(
        self,
        absmax: Tensor,
        code: Tensor,
        offset: Tensor | None = None,
        nested_absmax: Tensor | None = None,
        nested_code: Tensor | None = None,
    ) -> QuantState:
        """This state around other tensors, in the order of `tensors`."""
        # On the path of every backward: the constructor costs a fifth of dataclasses.replace.
        state2 = self.state2
        if state2 is not None and nested_absmax is not None and nested_code is not None:
            state2 = QuantState(
                nested_absmax, state2.shape, nested_code, state2.dtype, state2.blocksize, "dynamic"
            )
        return QuantState(
            absmax, self.shape, code, self.dtype, self.blocksize, self.quant_type, offset, state2
        )

    def without_tensors(self) -> QuantState:
        """This state with empty tensors, for `with_tensors` to fill again."""
        return self.with_tensors(_EMPTY, _EMPTY, None, _EMPTY, _EMPTY)

    def expert(self, e: int) -> QuantState:
        """The state of `weight[e]`, of a stack `[E, N, K]` whose blocks belong to one expert each.

        Raises:
            ValueError: absmax is nested, and 256 neighbours that share a scale are of two experts.
        """
        E, *shape = self.shape
        blocks = self.absmax.numel() // E
        state2 = self.state2
        if state2 is not None:
            if blocks % state2.blocksize:
                raise ValueError(
                    f"quant_state must have a multiple of {state2.blocksize} blocks for each "
                    f"expert when absmax is nested, got {blocks}"
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
        """
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
            ValueError: when an entry is missing.
        """
        blobs = [key for key in entries if key.startswith("quant_state.bitsandbytes__")]
        if len(blobs) != 1:
            raise ValueError(
                f"entries must have one key 'quant_state.bitsandbytes__<quant_type>', got {blobs}"
            )
        fields = json.loads(bytes(entries[blobs[0]].cpu().tolist()))
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


def as_quant_state(obj: Any) -> QuantState:
    """`obj` as a `QuantState`; tensors are shared, not copied.

    Args:
        obj: a `QuantState`, bitsandbytes' own, or any object with the same attributes.

    Raises:
        TypeError: when an attribute is missing.
        ValueError: for a weight that bitsandbytes has repacked in place for its AVX-512 kernel, for
            an unknown `quant_type`, and for absmax in 8 bits without `state2`.
    """
    if isinstance(obj, QuantState):
        return obj
    if getattr(obj, "packing_format_for_cpu", False):
        raise ValueError(
            "quant_state must have the standard 4-bit layout, got one that bitsandbytes repacked "
            "in place for its AVX-512 kernel (packing_format_for_cpu); load the weight again and "
            "set `support_avx512bf16_for_cpu = False` on every Linear4bit before its first eval "
            "forward"
        )
    names = ("absmax", "shape", "code", "dtype", "blocksize", "quant_type")
    if missing := [name for name in names if not hasattr(obj, name)]:
        raise TypeError(
            f"quant_state must have {', '.join(names)}, "
            f"got {type(obj).__name__} without {', '.join(missing)}"
        )
    if obj.quant_type not in _CODES:
        raise ValueError(
            f"quant_state.quant_type must be one of {QUANT_TYPES}, got {obj.quant_type!r}"
        )
    inner = getattr(obj, "state2", None)
    offset = getattr(obj, "offset", None)
    if (obj.absmax.dtype == torch.uint8) != (inner is not None and offset is not None):
        raise ValueError(
            "quant_state.absmax must be uint8 with state2 and offset, or floats with neither, "
            f"got {obj.absmax.dtype}, state2 {type(inner).__name__}, offset {type(offset).__name__}"
        )
    state2 = None
    if inner is not None:
        state2 = QuantState(
            inner.absmax, obj.absmax.shape, inner.code, inner.dtype, inner.blocksize, "dynamic"
        )
    return QuantState(
        absmax=obj.absmax,
        shape=torch.Size(obj.shape),
        code=obj.code,
        dtype=obj.dtype,
        blocksize=obj.blocksize,
        quant_type=obj.quant_type,
        offset=offset,
        state2=state2,
    )


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
