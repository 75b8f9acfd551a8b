"""The ranking by signal-to-noise: its formula in numpy, a planted signal, and what PEFT targets."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

import fastlora
from fastlora.integrations import bitsandbytes as bnb
from fastlora.integrations.names import kind_of
from fastlora.integrations.spectrum import Spectrum, SpectrumRow, signal_to_noise
from tests.integrations.models import MLP4bit, linear4bit, llama, lora_layers, peft_model


def by_numpy(weight: np.ndarray) -> float:
    s = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    sigma = (np.percentile(s, 75) - np.percentile(s, 25)) / 1.349
    edge = sigma * np.sqrt((1 + np.sqrt(min(weight.shape) / max(weight.shape))) ** 2)
    return float(s[s > edge].sum() / s[s <= edge].sum() / s.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (40, 40), (129, 7)])
def test_is_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    noise = torch.randn(shape, generator=generator)
    strong = torch.randn(shape[0], 2, generator=generator) @ torch.randn(
        2, shape[1], generator=generator
    )
    # Without a strong part under the edge there is nothing in the denominator.
    weight = (noise * 0.1 + strong - strong.mean()).to(dtype)
    weight[:, : shape[1] // 2] = 0
    assert signal_to_noise(weight) == pytest.approx(by_numpy(weight.float().numpy()), rel=1e-5)


def test_weights_at_the_edges() -> None:
    assert signal_to_noise(torch.zeros(8, 5)) == 0.0
    # Equal singular values: their spread, and with it the edge, is zero.
    assert signal_to_noise(torch.eye(6)) == math.inf
    assert signal_to_noise(torch.ones(1, 9)) == math.inf


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), "must be a float of 16 bits or more"),
        (torch.zeros(4, 4, dtype=torch.int8), "must be a float of 16 bits or more"),
        (torch.full((4, 4), torch.nan), "must be finite"),
    ],
)
def test_what_is_no_weight(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        signal_to_noise(weight)


class Stack(nn.Module):
    """Layers of two kinds, in each of which two carry a planted signal."""

    SIGNAL = ("layers.1.up", "layers.6.up", "layers.3.down", "layers.6.down")

    def __init__(self, four_bit: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Module() for _ in range(8))
        for i, layer in enumerate(self.layers):
            for kind, (K, N) in {"up": (128, 192), "down": (192, 128)}.items():
                linear = linear4bit(K, N) if four_bit else nn.Linear(K, N)
                weight = torch.randn(N, K) / K**0.5
                if f"layers.{i}.{kind}" in self.SIGNAL:
                    # A spectrum that falls off: its middle half is narrow beside its largest.
                    weight = weight + 0.4 * torch.randn(N, 24) @ torch.randn(24, K) / K**0.5
                if four_bit:
                    bnb.store(linear, *fastlora.quantize_4bit(weight, 64, "nf4"))
                else:
                    linear.weight.data = weight
                setattr(layer, kind, linear)


def relative(model: nn.Module) -> dict[str, float]:
    return {row.name: row.snr for row in fastlora.spectrum(model).rows}


def test_ranks_as_the_formula_does() -> None:
    model = Stack()
    want = {
        name: by_numpy(module.weight.detach().numpy())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    ranking = fastlora.spectrum(model, 0.3)
    assert {row.name: row.snr for row in ranking.rows} == pytest.approx(want, rel=1e-5)
    for kind in ("up", "down"):
        names = [row.name for row in ranking.rows if row.name.endswith(kind)]
        assert names == sorted(names, key=lambda name: -want[name])
        # 0.3 of 8 layers, rounded up.
        assert [n for n in ranking.target_modules if n.endswith(kind)] == names[:3]


def test_4_bit_weights_are_decoded() -> None:
    dense, four_bit = relative(Stack()), relative(Stack(four_bit=True))
    assert dense.keys() == four_bit.keys()
    # Quantising adds noise of a tenth of the weight.
    assert all(0.5 < four_bit[name] / dense[name] < 2 for name in dense)


def planted() -> Spectrum:
    """A signal of rank 8 above a bulk that ends below the edge which its middle half gives."""
    model = Stack()
    generator = torch.Generator().manual_seed(5)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        N, K = module.weight.shape
        U, _, Vh = torch.linalg.svd(torch.randn(N, K, generator=generator), full_matrices=False)
        s = torch.ones(min(N, K))
        s[: len(s) // 2] = 0.1
        if name in Stack.SIGNAL:
            s[-8:] = 3.0
        module.weight.data = U @ torch.diag(s) @ Vh
    return fastlora.spectrum(model)


def test_finds_a_planted_signal() -> None:
    ranking = planted()
    assert sorted(ranking.target_modules) == sorted(Stack.SIGNAL)
    # 8 values of 3 over 56 of 1 and 64 of 0.1, over 3; the others have nothing above the edge.
    assert {round(row.snr, 4) for row in ranking.rows} == {round(24 / 62.4 / 3, 4), 0.0}


def test_targets_are_pefts() -> None:
    """Both forms adapt just the layers chosen, and the regular expression is short."""
    ranking = planted()
    for targets in (ranking.target_modules, ranking.regex):
        model = get_peft_model(Stack(), LoraConfig(target_modules=targets))
        adapted = {
            name.removeprefix("base_model.model.")
            for name, module in model.named_modules()
            if module in lora_layers(model)
        }
        assert adapted == set(Stack.SIGNAL)
    assert ranking.regex == r"layers\.(1|6)\.up|layers\.(3|6)\.down"


def row(name: str, chosen: bool) -> SpectrumRow:
    return SpectrumRow(name, kind_of(name), (2, 3), 1.0, chosen)


@pytest.mark.parametrize(
    ("chosen", "regex"),
    [
        (["h.2.q", "h.10.q", "h.2.k", "h.10.k"], r"h\.(2|10)\.(q|k)"),
        (["h.2.q", "h.3.k"], r"h\.2\.q|h\.3\.k"),
        (["h.2.e.0.w", "h.12.e.1.w"], r"(h\.2\.e\.0\.w|h\.12\.e\.1\.w)"),
        (["head"], r"head"),
    ],
)
def test_regex(chosen: list[str], regex: str) -> None:
    rows = [row(name, True) for name in chosen]
    kinds = {r.kind for r in rows}
    others = [row(kind.replace("*", "77"), False) for kind in kinds if "*" in kind]
    rows = sorted(
        rows + others, key=lambda r: list(dict.fromkeys(x.kind for x in rows)).index(r.kind)
    )
    ranking = Spectrum(rows, 0.5)
    assert ranking.regex == regex
    matched = [r.name for r in rows if re.fullmatch(regex, r.name)]
    assert matched == ranking.target_modules and set(matched) == set(chosen)


def test_a_model_with_adapters_is_ranked_by_its_base() -> None:
    torch.manual_seed(0)
    plain = llama()
    want = relative(plain)
    got = relative(peft_model(plain))
    assert got.keys() == want.keys() and got == pytest.approx(want)
    assert set(relative(peft_model(MLP4bit()))) == {"up", "down"}


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_folder_is_read_weight_by_weight(four_bit: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    if four_bit:
        from transformers import BitsAndBytesConfig

        quantised = LlamaForCausalLM.from_pretrained(
            tmp_path,
            dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            ),
            device_map={"": "cpu"},
        )
        quantised.save_pretrained(tmp_path / "4bit")
        tmp_path, model = tmp_path / "4bit", quantised
    want = relative(model)
    # PEFT's "all-linear" leaves the head out, and so does a folder's ranking.
    assert want.pop("lm_head") > 0
    calls: list[tuple[int, int]] = []
    ranking = fastlora.spectrum(tmp_path, progress=lambda *done: calls.append(done))
    assert {r.name: r.snr for r in ranking.rows} == pytest.approx(want, rel=1e-5)
    assert calls[-1] == (14, 14)


def test_prints_and_serialises() -> None:
    ranking = planted()
    text = str(ranking)
    assert "4 of 16 linear layers chosen" in text and "layers.*.up (x8)" in text
    again = json.loads(json.dumps(ranking.as_dict()))
    assert again["regex"] == ranking.regex and again["target_modules"] == ranking.target_modules
    assert [layer["chosen"] for layer in again["layers"]].count(True) == 4


def test_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share must be above 0"):
        fastlora.spectrum(Stack(), 0.0)
    with pytest.raises(ValueError, match="linear layers, got none"):
        fastlora.spectrum(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match=r"config\.json"):
        fastlora.spectrum(tmp_path)
    with pytest.raises(TypeError, match="model or a folder, got int"):
        fastlora.spectrum(3)  # type: ignore[arg-type]
