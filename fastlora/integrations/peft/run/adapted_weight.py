"""`AdaptedWeight`: the tensor `W + scaling * left right`, which is not built until it has to be.

PEFT's `target_parameters` puts the adapted weight in place of the parameter and lets the model's
own code use it. So does this module, with a tensor that knows its parts. Products of activations
with it, and the ways in which models pick and turn experts, run on W, left and right; anything
else, in Python or below, finds an ordinary tensor, built once, with gradients for its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ....autograd.common import autocast_off
from ....autograd.grouped import grouped_lora_linear
from ....autograd.linear import lora_linear


class AdaptedWeight(Tensor):
    """`W + scaling * left right`, `[..., rows, columns]`, a wrapper without memory of its own.

    `adapted_weight` builds one. Its value, if it is asked for, is that of PEFT's code.

    Args:
        base: W, `[rows, columns]` or a stack of them.
        left: `[..., rows, R]`.
        right: `[..., R, columns]`.
        scaling: factor of the product.
        built_for: names of the operations that wanted the value; parts of a weight share the list.
        picked: a weight for each row of x, as `stack[experts_of_rows]` gives it.
    """

    base: Tensor
    left: Tensor
    right: Tensor
    scaling: float
    built_for: list[str]
    picked: bool
    _value: Tensor | None
    _experts: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None

    @staticmethod
    def __new__(cls, base: Tensor) -> AdaptedWeight:
        return Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )

    def value(self) -> Tensor:
        """The weight as an ordinary tensor, without gradients; built once."""
        if self._value is None:
            with torch.no_grad(), torch.autocast(self.base.device.type, enabled=False):
                left, right = (t.to(self.base.dtype) for t in (self.left, self.right))
                add = torch.baddbmm if self.base.dim() == 3 else torch.addmm
                self._value = add(self.base, left, right, alpha=self.scaling)
        return self._value

    def expert(self, e: int) -> AdaptedWeight:
        """`self[e]` of a stack."""
        if self._experts is None:
            # Unbound at once: the gradient of one slice alone would be as large as the stack's.
            self._experts = self.left.unbind(), self.right.unbind()
        lefts, rights = self._experts
        return adapted_weight(self.base[e], lefts[e], rights[e], self.scaling, self.built_for)

    def pick(self, experts: Tensor) -> AdaptedWeight:
        """`self[experts]` of a stack: as many copies of W as the model wants, and no W + BA."""
        parts = (self.base[experts], self.left[experts], self.right[experts])
        weight = adapted_weight(*parts, self.scaling, self.built_for)
        weight.picked = True
        return weight

    def turned(self) -> AdaptedWeight:
        """`self.mT`."""
        factors = (self.right.mT, self.left.mT)
        weight = adapted_weight(self.base.mT, *factors, self.scaling, self.built_for)
        weight.picked = self.picked
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            serve = _SERVED.get(_name(func))
            result = NotImplemented
            if serve and (not kwargs or kwargs.keys() <= signature(serve).parameters.keys()):
                result = serve(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def built(weight: AdaptedWeight) -> Tensor:
            if str(func) not in weight.built_for:
                weight.built_for.append(str(func))
            return weight.value()

        args, kwargs = tree_map_only(AdaptedWeight, built, (args, kwargs or {}))
        return func(*args, **kwargs)


def adapted_weight(
    base: Tensor, left: Tensor, right: Tensor, scaling: float, built_for: list[str]
) -> AdaptedWeight:
    """The `AdaptedWeight` of these parts, differentiable in left and right like any tensor."""
    weight: AdaptedWeight = _Adapt.apply(left, right, base, scaling)
    weight.base, weight.left, weight.right, weight.scaling = base, left, right, scaling
    weight.built_for, weight.picked = built_for, False
    weight._value = weight._experts = None
    return weight


class _Adapt(torch.autograd.Function):
    """The place of an `AdaptedWeight` in the graph: `dleft = s dW right^T`, `dright = s left^T dW`.

    It serves code that uses the weight as a whole; served products go to left and right directly.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, base: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.scaling = scaling
        return AdaptedWeight(base)

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        dleft = dright = None
        with autocast_off(dW.device):
            if ctx.needs_input_grad[0]:
                dleft = (dW @ right.to(dW.dtype).mT * ctx.scaling).to(left.dtype)
            if ctx.needs_input_grad[1]:
                dright = (left.to(dW.dtype).mT @ dW * ctx.scaling).to(right.dtype)
        return dleft, dright, None, None


# ---- the operations that need no built weight ---------------------------------------------------
# Each returns NotImplemented where its arguments are not those that the kernels take.


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not AdaptedWeight or weight.dim() != 2:
        return NotImplemented
    return _product(input, weight.turned(), bias)


def _matmul(input: Any, other: Any) -> Any:
    if type(input) is AdaptedWeight and type(other) is Tensor and input.picked and other.dim() == 3:
        y = _picked_product(other.mT, input.turned())
        return y if y is NotImplemented else y.mT
    if type(other) is not AdaptedWeight:
        return NotImplemented
    if other.picked:
        return _picked_product(input, other)
    if other.dim() == 2:
        return _product(input, other, None)
    if type(input) is not Tensor or input.dim() != 3 or len(input) != len(other.base):
        return NotImplemented
    E, rows, _ = input.shape
    ends = torch.arange(1, E + 1, device=input.device) * rows
    y = _grouped_product(input.flatten(0, 1), other, ends, autocasts=True)
    return y if y is NotImplemented else y.view(E, rows, y.shape[-1])


def _grouped_mm(
    input: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if type(weight) is not AdaptedWeight or weight.dim() != 3 or offs is None:
        return NotImplemented
    if bias is not None or out_dtype not in (None, weight.dtype):
        return NotImplemented
    return _grouped_product(input, weight, offs, autocasts=False)


def _getitem(weight: Any, index: Any) -> Any:
    if type(weight) is not AdaptedWeight or weight.dim() != 3:
        return NotImplemented
    if isinstance(index, Tensor):
        if index.dim() > 1 or index.dtype not in (torch.int32, torch.int64):
            return NotImplemented
        if index.dim() == 1:
            return weight.pick(index)
        index = int(index)
    if type(index) is not int or not -len(weight.base) <= index < len(weight.base):
        return NotImplemented
    return weight.expert(index)


def _iterate(weight: Any) -> Any:
    return iter(_unbind(weight)) if weight.dim() == 3 else NotImplemented


def _unbind(weight: Any, dim: int = 0) -> Any:
    if weight.dim() != 3 or dim != 0:
        return NotImplemented
    return tuple(weight.expert(e) for e in range(len(weight.base)))


def _transpose(weight: Any, dim0: int, dim1: int) -> Any:
    last = {weight.dim() - 1, weight.dim() - 2}
    return weight.turned() if {dim0 % weight.dim(), dim1 % weight.dim()} == last else NotImplemented


def _turn_matrix(weight: Any) -> Any:
    return weight.turned() if weight.dim() == 2 else NotImplemented


def _data_ptr(weight: Any) -> Any:
    """For kernels that take pointers; the value lives as long as the weight."""
    weight.built_for.append("data_ptr")
    return weight.value().data_ptr()


# By name, since one operation has several functions: torch.matmul, Tensor.matmul, the operator.
_SERVED: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "_grouped_mm": _grouped_mm,
    "grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_mm,
    "__getitem__": _getitem,
    "__iter__": _iterate,
    "unbind": _unbind,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "t": _turn_matrix,
    "data_ptr": _data_ptr,
    "mT": AdaptedWeight.turned,
    "T": _turn_matrix,
}


def _name(func: Any) -> str:
    """The name of a function, or of the attribute that it gets."""
    name: str = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name == "__get__" else name


def _fits(x: Any, weight: AdaptedWeight, autocasts: bool) -> Tensor | None:
    """x in the dtype of the product, or None where the kernels don't take the call."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.dim() == 0 or x.device != weight.device:
        return None
    if x.shape[-1] != weight.shape[-2]:
        return None
    if autocasts and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x if x.dtype == weight.dtype else None


def _factors(weight: AdaptedWeight) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B for `x weight`, in a dtype that the kernels take."""
    A, B = weight.left.mT, weight.right.mT
    if A.dtype == B.dtype and A.dtype in (weight.dtype, torch.float32):
        return A, B
    return A.float(), B.float()


def _product(x: Any, weight: AdaptedWeight, bias: Any) -> Any:
    """`x weight + bias` for a matrix `[K, N]`."""
    cast = _fits(x, weight, autocasts=True)
    if cast is None or type(bias) not in (type(None), Tensor, torch.nn.Parameter):
        return NotImplemented
    if bias is not None and torch.is_autocast_enabled(cast.device.type):
        bias = bias.to(cast.dtype)
    if bias is not None and bias.dtype != cast.dtype:
        return NotImplemented
    if not (weight.base.mT.is_contiguous() or weight.base.is_contiguous()):
        return NotImplemented
    A, B = _factors(weight)
    with torch.autocast(cast.device.type, enabled=False):
        return lora_linear(cast, weight.base.mT, bias, A, B, weight.scaling)


def _picked_product(x: Any, weight: AdaptedWeight) -> Any:
    """`x[m] weight[m]` for x `[M, rows, K]`, in plain torch: W lies there once for each m."""
    cast = _fits(x, weight, autocasts=True)
    if cast is None or cast.dim() != 3 or len(cast) != len(weight.base):
        return NotImplemented
    left, right = weight.left.to(cast.dtype), weight.right.to(cast.dtype)
    return torch.baddbmm(cast @ weight.base, cast @ left, right, alpha=weight.scaling)


def _grouped_product(x: Any, weight: AdaptedWeight, ends: Tensor, autocasts: bool) -> Any:
    """`x[m] weight[e]` for a stack `[E, K, N]` and x `[M, K]` sorted by expert."""
    cast = _fits(x, weight, autocasts)
    if cast is None or cast.dim() != 2:
        return NotImplemented
    turned = weight.base.mT.is_contiguous()
    if not turned and not weight.base.is_contiguous():
        return NotImplemented
    stack = (weight.base.mT if turned else weight.base, ends, *_factors(weight), weight.scaling)
    with torch.autocast(cast.device.type, enabled=False):
        return grouped_lora_linear(cast, *stack, transposed=not turned)
