"""Times a whole model in a worker, PEFT and fastlora in turn.

There is one model. Before each sample its layers become PEFT's own, or fastlora's.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import torch_dtype
from ..process import Leader
from .plan import ModelPlan

if TYPE_CHECKING:
    import torch

MODEL_PROVIDERS = ("peft", "fastlora")
# A second model, whose weights bitsandbytes may repack.
_PACKED = "bnb-packed"
# Rounding in a bf16 network changes the gradients by a few per cent of their norm; a wrong layer
# changes them by more than this.
_GRADIENTS_MAY_DIFFER = 0.2
_LOSSES_MAY_DIFFER = 0.02


def work(request: dict[str, Any], leader: Leader) -> dict[str, float] | None:
    """Times the model of `request["plan"]`, with the events of `measure.work`.

    With `request["memory_of"]`, a mode and a provider, it measures their peak memory instead, and
    returns it.
    """
    import torch

    plan = ModelPlan.from_dict(request["plan"])
    if plan.threads:
        torch.set_num_threads(plan.threads)
    model = _Model(plan)
    if "memory_of" in request:
        return {"peak_mb": model.peak_mb(*request["memory_of"])}
    from .measure import interleave
    from .rows import machine, timed_row

    shared = {**machine(), "allocator": request["allocator"]}
    leader.emit("machine", **shared)
    for mode in plan.modes:
        providers = [*MODEL_PROVIDERS]
        if mode == "decode" and model.repacks:
            providers.append(_PACKED)
        samples = plan.budget.rounds * len(providers)
        leader.emit("case", text=f"{mode}: {Path(plan.model).name}", samples=samples)
        if (fault := model.fault(mode)) is not None:
            leader.emit("refused", row=plan.row(mode, "fastlora"), reason=fault, wrong=True)
        else:
            timings = interleave(
                {name: [model.call(mode, name)] for name in providers},
                plan.budget,
                lambda: leader.emit("tick"),
                model.switch,
            )
            baseline = timings["peft"].seconds
            for name, timing in timings.items():
                what = shared | plan.row(mode, name)
                leader.emit("row", row=timed_row(what, timing.seconds, timing.calls, baseline))
        leader.emit("done")
    return None


class _Model:
    """A causal LM with an adapter on every linear layer, and the call to time for each mode."""

    def __init__(self, plan: ModelPlan) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        from ...integrations.transformers import load_causal_lm
        from ..console import quiet_libraries
        from ..finetune.model import cast_adapter

        quiet_libraries()
        self._plan = plan
        layer = plan.layer
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            model, _ = load_causal_lm(
                _with_weights(Path(plan.model), Path(scratch), layer.dtype),
                quant=layer.quant,
                double_quant=layer.nested,
                dtype=torch_dtype(layer.dtype),
            )
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=layer.R,
            lora_alpha=2 * layer.R,
            lora_dropout=layer.dropout,
            target_modules="all-linear",
        )
        self._model: Any = get_peft_model(model, config)
        cast_adapter(self._model, torch_dtype(layer.adapter_dtype))
        for name, parameter in self._model.named_parameters():
            if "lora_B" in name:
                # B starts at zero, which would make A's gradient zero.
                parameter.data.normal_(0, 0.02)
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-5)
        shape = (plan.batch, plan.length)
        self._tokens = torch.randint(0, model.config.vocab_size, shape)
        self._packed: Any = None

    @property
    def repacks(self) -> bool:
        """Whether bitsandbytes would rewrite the weights for inference on this CPU."""
        if self._plan.layer.quant == "none" or self._plan.layer.dtype != "bf16":
            return False
        from bitsandbytes.functional import has_avx512bf16

        return bool(has_avx512bf16())

    def switch(self, provider: str) -> None:
        """Puts the layers on PEFT's code or on fastlora's."""
        from ...integrations.bitsandbytes import disable_cpu_repacking
        from ...integrations.peft import accelerate, restore

        if provider == "fastlora":
            accelerate(self._model, verbose=False)
        elif provider == "peft":
            restore(self._model)
            disable_cpu_repacking(self._model)

    def call(self, mode: str, provider: str) -> Callable[[], object]:
        """The call to time in `mode`; `switch` must come first."""
        if mode == "decode":
            return self._decoding(provider)
        self._prepare(mode)
        return self._step

    def _prepare(self, mode: str) -> None:
        from ..finetune.model import enable_checkpointing

        model = self._model
        model.train(mode != "decode")
        base = model.get_base_model()
        if mode == "train-checkpointed":
            enable_checkpointing(base)
        elif getattr(base, "is_gradient_checkpointing", False):
            base.gradient_checkpointing_disable()

    def _step(self) -> torch.Tensor:
        loss = self._model(input_ids=self._tokens, labels=self._tokens, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def _decoding(self, provider: str) -> Callable[[], object]:
        import torch
        from transformers import DynamicCache

        from ...integrations.bitsandbytes import restore_cpu_repacking

        self._prepare("decode")
        model = self._model
        if provider == _PACKED:
            if self._packed is None:
                self.switch("peft")
                self._packed = copy.deepcopy(self._model)
                restore_cpu_repacking(self._packed)
            model = self._packed
        else:
            self.switch(provider)
        cache = DynamicCache()
        token = self._tokens[:, -1:]
        with torch.no_grad():
            model(input_ids=self._tokens, past_key_values=cache, use_cache=True)

        def decode() -> object:
            with torch.no_grad():
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                cache.crop(-1)
                return logits

        return decode

    def fault(self, mode: str) -> str | None:
        """The first error of fastlora's loss and gradients without dropout, or None."""
        import torch

        losses, gradients = [], []
        self._prepare(mode)
        # Only dropout is off; everything else is as timed.
        for module in self._model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        for provider in MODEL_PROVIDERS:
            self.switch(provider)
            with torch.set_grad_enabled(mode != "decode"):
                loss = self._model(input_ids=self._tokens, labels=self._tokens).loss
            losses.append(float(loss.detach()))
            if mode != "decode":
                grads = torch.autograd.grad(loss, self._trained)
                gradients.append(torch.cat([grad.float().flatten() for grad in grads]))
        peft, ours = losses
        if not abs(ours - peft) <= _LOSSES_MAY_DIFFER * abs(peft):
            return f"the loss is {ours:.4f}, PEFT's {peft:.4f}."
        if gradients:
            off = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
            if not off <= _GRADIENTS_MAY_DIFFER:
                return f"the gradients are off by {off:.0%} of PEFT's norm."
        return None

    def peak_mb(self, mode: str, provider: str) -> float:
        """Growth of the resident memory in MiB, over the loaded model, in a few calls."""
        from .memory import peak_mb

        self.switch(provider)
        return peak_mb(self.call(mode, provider), 2)


def _with_weights(path: Path, scratch: Path, dtype: str) -> Path:
    """`path`, or if it only has a config, a model with random weights in `scratch`."""
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return path
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from ...integrations.transformers.loading import load_config

    config = load_config(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype))
    model.save_pretrained(scratch)
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a").save_pretrained(scratch)
    return scratch
