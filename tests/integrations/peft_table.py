"""PEFT's LoRA configurations, one case each: on fastlora or on PEFT's code, and with what error.

`test_peft_table.py` holds every case to the error policy. Run as a program, this module writes
docs/peft.md from the same cases:

    python -m tests.integrations.peft_table
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import AdaLoraConfig
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    VeloraConfig,
)

from benchmarks.report.document import fill
from tests.integrations.peft_acts import (
    by_eva,
    combined,
    disabled,
    evaluated,
    invoked,
    invoked_in_mixed_batches,
    merged,
    merged_and_unmerged,
    mixed,
    narrow,
    narrow_table,
    optimised,
    ranks_cut,
    switched,
    together,
)
from tests.integrations.peft_case import LENGTH, Case, experts

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"


def why(*reasons: str) -> frozenset[str]:
    return frozenset(reasons)


def variant(name: str) -> frozenset[str]:
    return why(f"the adapter is a LoRA variant ({name})")


def no_class(*kinds: str) -> frozenset[str]:
    """The layers are PEFT's own, which keep no reason of a latest call."""
    return frozenset(f"fastlora has no layer for PEFT's {kind}" for kind in kinds)


EXPERTS = {
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
ALORA = {"alora_invocation_tokens": [1]}
VELORA = why("VeLoRA trains A on compressed activations, which fastlora does not make")
MERGED = why("the adapter is merged into the base weight")

# Those combinations of adapters that keep only a part of their values.
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")

CASES: dict[str, Case] = {
    "LoRA": Case(),
    "LoRA on NF4": Case(four_bit=True),
    "LoRA, bf16 base, fp32 adapters": Case(prepare=narrow),
    "lora_dropout=0.3": Case({"lora_dropout": 0.3}),
    "lora_dropout=0.3 on NF4": Case({"lora_dropout": 0.3}, four_bit=True),
    "use_rslora": Case({"use_rslora": True}),
    "rank_pattern, alpha_pattern": Case({"rank_pattern": {"up": 7}, "alpha_pattern": {"down": 9}}),
    "bias='lora_only'": Case({"bias": "lora_only"}),
    "bias='all'": Case({"bias": "all"}),
    "lora_bias": Case({"lora_bias": True}),
    "lora_bias with dropout, bias='all'": Case(
        {"lora_bias": True, "lora_dropout": 0.3, "bias": "all"}
    ),
    "lora_bias on NF4": Case({"lora_bias": True}, four_bit=True),
    "init gaussian": Case({"init_lora_weights": "gaussian"}),
    "init orthogonal": Case({"init_lora_weights": "orthogonal"}),
    "PiSSA": Case({"init_lora_weights": "pissa"}),
    "PiSSA, fast SVD": Case({"init_lora_weights": "pissa_niter_4"}),
    "OLoRA": Case({"init_lora_weights": "olora"}),
    "EVA": Case({"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}, prepare=by_eva),
    "LoRA-GA": Case({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}),
    "CorDA, IPM": Case({"init_lora_weights": "corda", "corda_config": CordaConfig()}),
    "CorDA, KPM": Case(
        {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")}
    ),
    "LoftQ": Case({"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}),
    "LoRA-FA (optimizer)": Case(act=optimised(create_lorafa_optimizer, r=4, lora_alpha=6)),
    "LoRA+ (optimizer)": Case(
        act=optimised(
            create_loraplus_optimizer, optimizer_cls=torch.optim.SGD, loraplus_lr_ratio=4.0
        )
    ),
    "two active adapters": Case(act=together()),
    "two active adapters, one with dropout": Case(act=together(lora_dropout=0.3)),
    "two active adapters, each with dropout": Case(
        {"lora_dropout": 0.2}, act=together(lora_dropout=0.3)
    ),
    "two active adapters, fp32 and bf16": Case(act=together(torch.bfloat16)),
    "two active adapters with lora_bias": Case({"lora_bias": True}, act=together(lora_bias=True)),
    "two active adapters on NF4": Case(act=together(), four_bit=True),
    "adapter_names": Case(act=mixed(training=False)),
    "adapter_names, training": Case(act=mixed(training=True)),
    "adapter_names, training, lora_bias": Case({"lora_bias": True}, act=mixed(training=True)),
    # In training, PEFT changes bitsandbytes' output in place, which autograd refuses.
    "adapter_names on NF4": Case(act=mixed(training=False), four_bit=True),
    "set_adapter": Case(act=switched),
    "disable_adapter": Case(act=disabled),
    "merge_adapter": Case(act=merged()),
    "merge_adapter(safe_merge=True)": Case(act=merged(safe_merge=True)),
    "merge, unmerge": Case(act=merged_and_unmerged),
    **{
        f"add_weighted_adapter, {kind}": Case(act=combined(kind, **options))
        for kind, options in {
            "linear": {},
            "cat": {},
            "svd": {},
            **{kind: {"density": 0.5} for kind in PRUNED},
            **{f"{kind}_svd": {"density": 0.5} for kind in PRUNED},
        }.items()
    },
    **{
        f"add_weighted_adapter, {kind} on NF4": Case(act=combined(kind, **options), four_bit=True)
        for kind, options in {
            **{kind: {} for kind in ("linear", "cat", "svd")},
            **{kind: {"density": 0.5} for kind in ("ties", "ties_svd", "dare_ties_svd")},
        }.items()
    },
    "modules_to_save": Case({"modules_to_save": ["head"]}),
    "lm_head": Case({"target_modules": ["up", "head"]}),
    "DoRA": Case({"use_dora": True}),
    "DoRA, bias='all'": Case({"use_dora": True, "bias": "all"}),
    "DoRA, bf16 base, fp32 adapters": Case({"use_dora": True}, prepare=narrow),
    "DoRA on NF4": Case({"use_dora": True}, four_bit=True),
    "DoRA with dropout, evaluated": Case({"use_dora": True, "lora_dropout": 0.3}, act=evaluated),
    "DoRA with dropout, training": Case({"use_dora": True, "lora_dropout": 0.25}),
    "DoRA with dropout, bias='all'": Case({"use_dora": True, "lora_dropout": 0.25, "bias": "all"}),
    "DoRA with dropout on NF4": Case({"use_dora": True, "lora_dropout": 0.25}, four_bit=True),
    "DoRA with dropout, bf16 base, fp32 adapters": Case(
        {"use_dora": True, "lora_dropout": 0.25}, prepare=narrow
    ),
    "DoRA, merge, unmerge": Case({"use_dora": True}, act=merged_and_unmerged),
    "MiCA": Case({"init_lora_weights": "mica"}),
    "KaSA": Case({"kasa_config": KasaConfig()}),
    "KaSA with dropout": Case({"kasa_config": KasaConfig(), "lora_dropout": 0.3}),
    "KaSA, bf16 base, fp32 adapters": Case({"kasa_config": KasaConfig()}, prepare=narrow),
    "VeLoRA": Case({"velora_config": VeloraConfig()}, reasons=VELORA),
    "VeLoRA, evaluated": Case({"velora_config": VeloraConfig()}, act=evaluated),
    "aLoRA": Case(ALORA, act=invoked(3, 3, 3)),
    "aLoRA, ragged offsets": Case(ALORA, act=invoked(None, 2, LENGTH + 5)),
    "aLoRA, nothing invoked but one token": Case(ALORA, act=invoked(0, None, 1)),
    "aLoRA, every token": Case(ALORA, act=invoked(LENGTH, LENGTH, LENGTH + 1)),
    "aLoRA with dropout": Case({**ALORA, "lora_dropout": 0.3}, act=invoked(None, 2, LENGTH)),
    "aLoRA with lora_bias": Case({**ALORA, "lora_bias": True}, act=invoked(1, 5, None)),
    "aLoRA, bf16 base, fp32 adapters": Case(ALORA, act=invoked(1, 5, None), prepare=narrow),
    # In training, PEFT changes bitsandbytes' output in place, which autograd refuses.
    "aLoRA on NF4": Case(ALORA, act=invoked(1, 5, None, training=False), four_bit=True),
    "aLoRA beside LoRA": Case(ALORA, act=invoked(1, 5, None, further=True)),
    "aLoRA, adapter_names": Case(ALORA, act=invoked_in_mixed_batches),
    "BD-LoRA": Case(
        {
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2
            )
        },
    ),
    "embedding": Case({"target_modules": ["embed"]}),
    "embedding, bf16 table, fp32 adapters": Case(
        {"target_modules": ["embed"]}, prepare=narrow_table
    ),
    "embedding and linear layers": Case({"target_modules": ["embed", "up", "down"]}),
    "embedding, MiCA": Case({"target_modules": ["embed"], "init_lora_weights": "mica"}),
    "embedding, DoRA": Case(
        {"target_modules": ["embed"], "use_dora": True}, reasons=variant("DoraEmbeddingVariant")
    ),
    "embedding, two active adapters": Case(
        {"target_modules": ["embed"]},
        act=together(target_modules=["embed"]),
        reasons=why("several adapters are active on an embedding"),
    ),
    "embedding, merge, unmerge": Case({"target_modules": ["embed"]}, act=merged_and_unmerged),
    "Conv1d": Case({"target_modules": ["conv"]}, reasons=no_class("Conv1d")),
    "GPT-2's Conv1D (fan_in_fan_out)": Case(
        {"target_modules": ["gpt"], "fan_in_fan_out": True},
    ),
    "GPT-2's Conv1D, bf16 base, fp32 adapters, dropout": Case(
        {"target_modules": ["gpt"], "fan_in_fan_out": True, "lora_dropout": 0.3}, prepare=narrow
    ),
    "GPT-2's Conv1D, DoRA": Case(
        {"target_modules": ["gpt"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "target_parameters, a linear layer's weight": Case(
        {"target_modules": [], "target_parameters": ["up.weight"]}
    ),
    "target_parameters, Mixtral's experts": Case(EXPERTS, experts=experts("Mixtral")),
    "target_parameters, Mixtral's experts in a loop": Case(
        EXPERTS, experts=experts("Mixtral", "eager")
    ),
    "target_parameters, Mixtral's experts, batched_mm": Case(
        EXPERTS, experts=experts("Mixtral", "batched_mm")
    ),
    "target_parameters, gpt-oss's experts": Case(EXPERTS, experts=experts("gpt-oss")),
    "target_parameters, gpt-oss's experts in a loop": Case(
        EXPERTS, experts=experts("gpt-oss", "eager")
    ),
    "target_parameters, experts and linear layers": Case(
        {**EXPERTS, "target_modules": ["up", "down"]}, experts=experts("Mixtral")
    ),
    "target_parameters, two active adapters": Case(
        EXPERTS, experts=experts("Mixtral"), act=together(**EXPERTS)
    ),
    "target_parameters, merge_adapter": Case(
        EXPERTS, experts=experts("gpt-oss"), act=merged(), reasons=MERGED
    ),
    "AdaLoRA": Case(
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["up", "down"])
    ),
    "AdaLoRA with dropout": Case(
        AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, target_modules=["up", "down"], lora_dropout=0.3
        )
    ),
    "AdaLoRA, ranks cut": Case(
        AdaLoraConfig(init_r=4, target_r=1, total_step=9, target_modules=["up", "down"]),
        act=ranks_cut,
    ),
    "AdaLoRA, merge, unmerge": Case(
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["up", "down"]),
        act=merged_and_unmerged,
    ),
}


# ---- docs/peft.md ------------------------------------------------------------------------------


def table() -> str:
    """Markdown: a row for each case, from running it."""
    lines = ["| configuration | runs on | error |", "|---|---|---|"]
    for name, case in CASES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = case.run()
        lines.append(f"| {name} | {served(case)} | {outcome.units():.2f} |")
    return "\n".join(lines)


def served(case: Case) -> str:
    """The table's second cell."""
    if case.reasons == {""}:
        return "fastlora"
    return "PEFT's code: " + "; ".join(sorted(case.reasons))


def main() -> None:
    torch.set_num_threads(1)
    PAGE.write_text(fill(PAGE.read_text(), {"configurations": table()}))


if __name__ == "__main__":
    main()
