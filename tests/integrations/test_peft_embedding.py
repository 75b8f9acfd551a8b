"""PEFT's embedding layer: its results, and every case in which its own code runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import fastlora
from fastlora.integrations.peft import fast_path
from fastlora.integrations.peft.layers import FastLoraEmbedding
from fastlora.integrations.peft.plan.embedding import embedding_plan
from tests.integrations.models import assert_all_close, gradients, last_reasons, lora_layers

V, N, PADDING = 23, 37, 4
IDS = torch.tensor([[0, 4, 4, 22], [7, 7, 1, 3], [4, 2, 19, 7]])


class ClampedEmbedding(Gemma3TextScaledWordEmbedding):
    """Scaled by a forward that does more than scale."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).clamp(-1, 1)


def layer_of(base: nn.Embedding, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """PEFT's layer around `base`, its adapter filled, in `dtype` or in fp32."""
    settings = {"r": 5, "lora_alpha": 7, "target_modules": ["embed"], **options}
    model = get_peft_model(nn.ModuleDict({"embed": base}), LoraConfig(**settings))
    layer = lora_layers(model)[0]
    for x in "AB":
        for parameter in getattr(layer, f"lora_embedding_{x}").values():
            parameter.data.normal_().to(dtype or torch.float32)
            parameter.data = parameter.data.to(dtype or torch.float32)
    return layer


def fast_of(layer: Any) -> Any:
    return lora_layers(fastlora.accelerate(nn.ModuleList([copy.deepcopy(layer)]), verbose=False))[0]


def step(layer: Any, ids: Tensor = IDS, **kwargs: Any) -> dict[str, Tensor]:
    y = layer(ids, **kwargs)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weights.to(y.dtype)).sum().backward()
    return {"y": y.detach(), **gradients(layer)}


def plain_table() -> nn.Embedding:
    return nn.Embedding(V, N, padding_idx=PADDING)


def gemma() -> nn.Embedding:
    return Gemma3TextScaledWordEmbedding(V, N, PADDING, embed_scale=N**0.5)


def bart() -> nn.Embedding:
    return BartScaledWordEmbedding(V, N, PADDING, embed_scale=N**0.5)


@pytest.mark.parametrize("adapter", [None, torch.bfloat16], ids=["fp32 adapter", "bf16 adapter"])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [plain_table, gemma, bart])
def test_results_are_pefts(
    make: Callable[[], nn.Embedding], table: torch.dtype, adapter: torch.dtype | None
) -> None:
    if table == torch.float16 and adapter is not None:
        adapter = torch.float16
    stock = layer_of(make().to(table), adapter)
    # The scale that is exact is the one in the table's dtype: it is a value of the model.
    exact = copy.deepcopy(stock).double()
    scale = getattr(stock.base_layer, "embed_scale", None)
    if isinstance(scale, Tensor):
        exact.base_layer.embed_scale = stock.base_layer.embed_scale.to(table).double()
    fast = fast_of(stock)
    results = step(fast), step(exact), step(stock)
    assert last_reasons(fast) == {""}
    assert results[0]["lora_embedding_A.default"][:, PADDING].count_nonzero() == 0
    assert results[0]["lora_embedding_A.default"][:, 7].count_nonzero() == 5
    assert_all_close(*results)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_outputs_dtype(autocast: bool) -> None:
    for table in (torch.float32, torch.bfloat16):
        stock = layer_of(plain_table().to(table))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert fast_of(stock)(IDS).dtype == stock(IDS).dtype == table


def test_ids_and_arguments_that_change_nothing() -> None:
    fast = fast_of(layer_of(plain_table()))
    y = fast(IDS)
    for ids, kwargs in ((IDS.int(), {}), (IDS, {"alora_offsets": [1, None, 2]})):
        assert torch.equal(fast(ids, **kwargs), y)
        assert last_reasons(fast) == {""}
        assert fast_path(fast, ids, (), kwargs) == (True, "")
    assert fast(IDS[:0]).shape == (0, 4, N)
    assert torch.equal(fast(IDS[0, 0]), y[0, 0])


def test_in_place_of_pefts_and_back() -> None:
    layer = layer_of(plain_table())
    model = nn.ModuleList([layer])
    kind, keys, text = type(layer), list(layer.state_dict()), repr(layer)
    fastlora.accelerate(model, verbose=False)
    assert type(layer) is FastLoraEmbedding
    assert list(layer.state_dict()) == keys and repr(layer) == text
    fastlora.restore(model)
    assert type(layer) is kind and not last_reasons(model) - {None}


def test_compiled() -> None:
    fast = fast_of(layer_of(plain_table()))
    want = step(fast)
    fast.zero_grad()
    torch._dynamo.reset()
    got = step(torch.compile(fast, backend="aot_eager", fullgraph=True))
    for name, tensor in want.items():
        mine = got[name] if name in got else got[f"_orig_mod.{name}"]
        torch.testing.assert_close(mine, tensor)


# ---- PEFT's own code ---------------------------------------------------------------------------


def hooked(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda *_: None)


def trained(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_()


def second(layer: Any) -> None:
    config = LoraConfig(r=3)
    layer.update_layer("other", 3, lora_alpha=2, config=config)
    layer.set_adapter(["default", "other"])


def narrow_B(layer: Any) -> None:
    parameter = layer.lora_embedding_B["default"]
    parameter.data = parameter.data.bfloat16()


def option(name: str, value: Any) -> Callable[[Any], None]:
    return lambda layer: setattr(layer.base_layer, name, value)


def merged(layer: Any) -> None:
    layer.merge()


def disabled(layer: Any) -> None:
    layer.enable_adapters(False)


def dora_before_variants(layer: Any) -> None:
    """Layers pickled by a PEFT that had no variants know DoRA by `use_dora` alone."""
    layer.use_dora["default"] = True


def hidden(layer: Any) -> None:
    layer.base_layer.__dict__["weight"] = layer.base_layer.weight.detach() * 2


def nothing(layer: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "reason", "kwargs"),
    [
        (hooked, "the base layer has hooks", {}),
        (trained, "the base weight is being trained", {}),
        (second, "several adapters are active on an embedding", {}),
        (merged, "the adapter is merged into the base weight", {}),
        (disabled, "the adapters are disabled", {}),
        (dora_before_variants, "the adapter is a LoRA variant (DoRA)", {}),
        (option("max_norm", 1.0), "the base layer has max_norm", {}),
        (option("scale_grad_by_freq", True), "the base layer has scale_grad_by_freq", {}),
        (option("embed_scale", 2.0), "the base layer has an embed_scale that its forward", {}),
        (hidden, "the base layer has a weight that is an attribute", {}),
        (nothing, "the call passes adapter_names", {"adapter_names": ["default"] * 3}),
    ],
)
def test_pefts_own_code(change: Any, reason: str, kwargs: dict[str, Any]) -> None:
    stock = layer_of(plain_table())
    change(stock)
    fast = fast_of(stock)
    with torch.no_grad():
        assert torch.equal(fast(IDS, **kwargs), stock(IDS, **kwargs))
    (said,) = last_reasons(fast)
    assert said is not None and said.startswith(reason)
    assert fast_path(fast, IDS, (), kwargs) == (False, said)


def test_a_scaled_embedding_compiles_as_pefts() -> None:
    stock = layer_of(gemma())
    fast = fast_of(stock)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), stock(IDS))
    assert not isinstance(embedding_plan(fast, IDS, (), {}), str)


def test_a_patched_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = layer_of(gemma())
    fast = fast_of(stock)
    fast(IDS)
    kind: Any = type(stock.base_layer)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, ids: own(self, ids) + 100)
    torch.testing.assert_close(fast(IDS), stock(IDS))


def test_sparse_gradients_are_pefts() -> None:
    stock = layer_of(plain_table())
    stock.base_layer.sparse = True
    fast = fast_of(stock)
    fast(IDS)
    assert last_reasons(fast) == {"the base layer has sparse, which fastlora's op has not"}


def test_other_embeddings_are_pefts() -> None:
    stock = layer_of(ClampedEmbedding(V, N, PADDING, embed_scale=6.0))
    fast = fast_of(stock)
    assert torch.equal(fast(IDS), stock(IDS))
    (reason,) = last_reasons(fast)
    assert reason == "the base layer is a ClampedEmbedding, not nn.Embedding or a scaled one"


@pytest.mark.filterwarnings("always:LoRA layers run on PEFT's own code")
def test_dtypes_that_differ_are_pefts_and_warn() -> None:
    stock = layer_of(plain_table())
    narrow_B(stock)
    fast = fast_of(stock)
    warns = pytest.warns(UserWarning, match=r"lora_A is in .*float32 and lora_B in .*bfloat16")
    with warns, pytest.raises(RuntimeError):  # PEFT's own product refuses them
        fast(IDS)


def test_explain_of_an_embedding() -> None:
    model = nn.ModuleList([layer_of(gemma().bfloat16())])
    (row,) = fastlora.explain(fastlora.accelerate(model, verbose=False)).rows
    assert (row.fast, row.base, row.shape) == (True, "bf16 Embedding", (N, V))
    model[0].merge()
    (row,) = fastlora.explain(model).rows
    assert row.reason == "the adapter is merged into the base weight"
