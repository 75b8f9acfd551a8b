"""Every configuration of docs/peft.md: PEFT's results, and where each layer ran."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.integrations.models import assert_network_close, last_reasons
from tests.integrations.peft_acts import add, mixed
from tests.integrations.peft_case import step
from tests.integrations.peft_table import CASES, PAGE, served


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_configuration(name: str) -> None:
    case = CASES[name]
    outcome = case.run()
    assert_network_close(outcome.fast, outcome.exact, outcome.stock)
    assert outcome.explained == (case.explained or case.reasons)
    # Layers of which fastlora has no class keep no reason.
    assert outcome.reasons == (case.reasons if not _foreign(case.reasons) else {None})


def _foreign(reasons: frozenset[str]) -> bool:
    return all(reason.startswith("fastlora has no layer") for reason in reasons)


def test_mixed_batches_train_on_4_bit() -> None:
    """PEFT's code can't; the same model with decoded weights in fp32 stands for it."""
    fast, exact, _ = CASES["LoRA on NF4"].trio()
    stock = copy.deepcopy(exact).float()
    assert_network_close(*(mixed(training=True)(model) for model in (fast, exact, stock)))
    assert last_reasons(fast) == {""}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DoRA", "DoRA with dropout, training", "lora_bias", "several"])
def test_compiled(name: str) -> None:
    """`torch.compile` takes them in one graph; its results are those of eager mode."""
    model = CASES.get(name, CASES["LoRA"]).trio()[0]
    if name == "several":
        add(model)
        model.base_model.set_adapter(["default", "other"])
    expected = step(model)
    assert last_reasons(model) == {""}
    torch._dynamo.reset()
    compiled = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    for key, value in expected.items():
        # A compiled model's parameters have a longer name.
        torch.testing.assert_close(compiled.get(key, compiled.get(f"_orig_mod.{key}")), value)


def test_the_page_lists_every_configuration() -> None:
    """`python -m tests.integrations.peft_table` writes it."""
    text = PAGE.read_text()
    for name, case in CASES.items():
        assert f"| {name} | {served(case)} |" in text
