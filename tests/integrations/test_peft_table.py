"""Every configuration of docs/peft.md: PEFT's results, and where each layer ran."""

from __future__ import annotations

import pytest

from tests.integrations.models import assert_network_close
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


def test_the_page_lists_every_configuration() -> None:
    """`PYTHONPATH=tests python -m tests.integrations.peft_table` writes it."""
    text = PAGE.read_text()
    for name, case in CASES.items():
        assert f"| {name} | {served(case)} |" in text
