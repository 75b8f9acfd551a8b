"""Arguments, saved tensors and double backward of all autograd Functions of LoRA layers.

A Function takes the differentiable tensors as arguments, in addition to the layers as data:

    apply(x, ..., layers, backend, *differentiable(layers))

and its backward gives a gradient for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..backends import UNFORCED, forced_backend
from ..layer import Grads, Layer, Needs
from ..quant import QuantState, as_quant_state

# Names of layers by the parameters of their adapters, for messages.
LAYER_NAMES = WeakTensorKeyDictionary()

_T = TypeVar("_T")
_OFF: AbstractContextManager[Any] = nullcontext()


# ---- before the node ----------------------------------------------------------------------------


def prepared(
    x: Tensor, layers: Sequence[Layer], backend: str | None
) -> tuple[Tensor, list[Layer], str]:
    """A call's x and layers as the ops take them, and the backend of forward and backward.

    Under autocast x, the adapters, the biases and dense weights are cast to autocast's dtype, as
    torch.nn.functional.linear does; dense weights in the ops' forward and again in their backward,
    so that no copy is kept. A seed that dropout needs and lacks is drawn with torch.randint, in the
    order of the layers.

    Raises:
        ValueError: a weight requires a gradient. TypeError: a quant_state lacks a field.
    """
    dtype = autocast_dtype(x)
    ready = [prepared_layer(x, layer, dtype) for layer in layers]
    return x if dtype is None else x.to(dtype), ready, settled(backend)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region around a call on x, None outside."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def prepared_layer(x: Tensor, layer: Layer, dtype: torch.dtype | None) -> Layer:
    """One layer of `prepared`; `dtype` is that of autocast."""
    check_frozen(layer.weight)
    if layer.quant_state is not None and type(layer.quant_state) is not QuantState:
        layer = layer._replace(quant_state=as_quant_state(layer.quant_state))
    if dtype is not None:
        bias = None if layer.bias is None else layer.bias.to(dtype)
        A, B = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
        compute_dtype = dtype if layer.quant_state is None else layer.compute_dtype
        layer = layer._replace(lora_A=A, lora_B=B, bias=bias, compute_dtype=compute_dtype)
    if layer.dropout_p == 0.0:
        return layer if layer.seed is None else layer._replace(seed=None)
    return layer if layer.seed is not None else layer._replace(seed=draw_seed(x))


def settled(backend: str | None) -> str:
    """The backend of forward and backward, which may run outside of a `use_backend` block."""
    return forced_backend(backend) or UNFORCED


def check_frozen(weight: Tensor) -> None:
    """Raises a ValueError for a base weight that wants a gradient."""
    if weight.requires_grad:
        raise ValueError("weight must be frozen (requires_grad=False): fastlora never trains it")


def check_arguments(x: object, scaling: object, what: str = "x") -> None:
    """Raises a TypeError unless x is a tensor, and scaling a number that wants no gradient."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(x).__name__}")
    if isinstance(scaling, Tensor) and scaling.requires_grad:
        raise TypeError("scaling must be a number, got a tensor that wants a gradient")


def draw_seed(x: Tensor) -> Tensor:
    """The key of a dropout on x, so that torch.manual_seed and checkpointing replay the mask."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Leaves the autocast region around a call or a backward, if there is one."""
    if not torch.is_autocast_enabled(device.type):
        return _OFF
    return torch.autocast(device.type, enabled=False)


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]."""
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a tensor without dimensions")
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def working(layer: Layer) -> Layer:
    """The layer with a dense weight in its compute_dtype."""
    if layer.compute_dtype is None or layer.quant_state is not None:
        return layer
    return layer._replace(weight=layer.weight.to(layer.compute_dtype))


# ---- the node -----------------------------------------------------------------------------------


def differentiable(layers: Sequence[Layer]) -> list[Tensor | None]:
    """The layers' tensors that may get a gradient: bias, lora_A and lora_B of each."""
    return [t for layer in layers for t in (layer.bias, layer.lora_A, layer.lora_B)]


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward will be asked for a gradient of any of `tensors`."""
    if torch.is_grad_enabled():
        for t in tensors:  # any() over a generator costs three times as much
            if t is not None and t.requires_grad:
                return True
    return False


class Saved:
    """Everything that a backward needs: tensors, layers and the backend.

    Every tensor goes through `save_for_backward`, so that hooks on saved tensors (offloading,
    checkpointing) see it and a change in place of it is an error. A bias is not kept.
    """

    def __init__(
        self,
        ctx: Any,
        tensors: Sequence[Tensor | None],
        layers: Sequence[Layer],
        backend: str | None,
    ) -> None:
        kept: list[Tensor | None] = list(tensors)
        self.count, self.backend = len(kept), backend
        self.statics: list[tuple[Any, ...]] = []
        for weight, A, B, scaling, bias, state, compute_dtype, p, seed, offsets in layers:
            kept += (weight, A, B, seed, offsets)
            hollow, stats = None, 0
            if state is not None:
                tensors_of_state = state.tensors()
                kept += tensors_of_state
                hollow, stats = state.without_tensors(), len(tensors_of_state)
            bias_dtype = None if bias is None else bias.dtype
            self.statics.append((scaling, hollow, stats, compute_dtype, p, bias_dtype))
        ctx.save_for_backward(*kept)

    def restore(self, ctx: Any) -> tuple[tuple[Any, ...], list[Layer]]:
        """The tensors, and the layers around theirs."""
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise RuntimeError(_changed_in_place(ctx)) from error
            raise
        place, layers = self.count, []
        for scaling, state, stats, compute_dtype, p, _ in self.statics:
            weight, A, B, seed, offsets = saved[place : place + 5]
            place += 5
            if state is not None:
                state = state.with_tensors(*saved[place : place + stats])
                place += stats
            layers.append(
                Layer(weight, A, B, scaling, None, state, compute_dtype, p, seed, offsets)
            )
        return saved[: self.count], layers

    def needs(self, ctx: Any, first: int) -> list[Needs]:
        """The gradients that each layer needs, whose `differentiable` begin at argument `first`."""
        asked = ctx.needs_input_grad
        return [
            Needs(asked[0], asked[i + 1], asked[i + 2], asked[i])
            for i in range(first, first + 3 * len(self.statics), 3)
        ]

    def gradients(self, grads: Sequence[Grads]) -> list[Tensor | None]:
        """The gradients of `differentiable`, in its order."""
        out: list[Tensor | None] = []
        for own, static in zip(grads, self.statics, strict=True):
            out += (None if own.bias is None else own.bias.to(static[-1]), own.A, own.B)
        return out


def _changed_in_place(ctx: Any) -> str:
    """What to do about a saved tensor that the model has changed."""
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    # An adapter's parameter is the node's argument, or what was cast to it.
    nodes += [node for each in nodes for node, _ in each.next_functions if node is not None]
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    name = next((LAYER_NAMES[leaf] for leaf in leaves if leaf in LAYER_NAMES), None)
    layer = "a LoRA layer" if name is None else f"layer {name}"
    return (
        f"the backward of {layer} needs a tensor that was changed in place after the call, most "
        "likely its input; don't change that, or give the layer a copy, as PEFT often does: "
        f"fastlora.accelerate(model, copy_inputs=[{name or '<name of the layer>'!r}])"
    )


def run_backward(device: torch.device, kernels: Callable[[], _T], plain: Callable[[], _T]) -> _T:
    """The gradients by `kernels`, or by `plain`, in plain torch, if this backward has a graph.

    Autocast is off in both: a backward may run inside a region that its forward was outside of.
    """
    with autocast_off(device):
        return plain() if torch.is_grad_enabled() else kernels()


def differentiable_gradients(
    run: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    dys: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients that have a graph, for double backward.

    Args:
        run: the forward in plain torch, on the reference backend, as a function of `inputs`.
        inputs: the tensors to differentiate by if their `needs` is True; the others give None.
        dys: the gradient of each result of `run`.
    """
    # Views: one input may depend on another, or have hooks. Both belong to the backward that called
    # this function.
    aliases = [t.view_as(t) for t in inputs]
    wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
    if not wanted:
        return [None] * len(inputs)
    ys = run(*aliases)
    found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def differentiable_bwd(
    forward: Callable[[Tensor, list[Layer]], Tensor],
    dy: Tensor,
    x: Tensor,
    layers: Sequence[Layer],
    needs: Sequence[Needs],
) -> tuple[Tensor | None, list[Grads]]:
    """dx and the other gradients of each layer, those of `forward(x, layers)`, with a graph.

    Args:
        forward: in plain torch, on the reference backend; it gets the layers as `working` makes
            them.
        dy: the gradient of its result.
        layers: a bias of None gets no gradient.
        needs: those of each layer; dx is that of the first.
    """
    names = [
        [name for name in ("bias", "lora_A", "lora_B") if getattr(p, name) is not None]
        for p in layers
    ]

    def run(x: Tensor, *flat: Tensor) -> tuple[Tensor]:
        rest = iter(flat)
        fields: list[dict[str, Any]] = [{name: next(rest) for name in named} for named in names]
        own = [working(p)._replace(**new) for p, new in zip(layers, fields, strict=True)]
        return (forward(x, own),)

    inputs, flags = [x], [needs[0].x]
    for p, named, need in zip(layers, names, needs, strict=True):
        inputs += [getattr(p, name) for name in named]
        asked = {"bias": need.bias, "lora_A": need.A, "lora_B": need.B}
        flags += [asked[name] for name in named]
    dx, *flat = differentiable_gradients(run, inputs, flags, (dy,))
    rest = iter(flat)
    found = [{name: next(rest) for name in named} for named in names]
    return dx, [Grads(None, g.get("lora_A"), g.get("lora_B"), g.get("bias")) for g in found]
