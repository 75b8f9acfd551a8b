"""`python -m fastlora.cli.bench.model`: times a whole model, PEFT and fastlora in turn; see `pipe`.

There is one model: between two samples its layers are PEFT's own again, or fastlora's. Takes a
`ModelRequest`. Events as in `worker`; with `memory_of` one event, "memory", instead.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..process import Emit, serve
from .case import DTYPES, Layer

if TYPE_CHECKING:
    import torch

MODEL_PROVIDERS = ("peft", "fastlora")
# The second model of a run, whose weights bitsandbytes may repack.
_PACKED = "bnb-packed"
# The two sets of gradients differ by the rounding of a bf16 network, a few per cent of their norm;
# one wrong layer turns them by more than this.
_GRADIENTS_MAY_DIFFER = 0.2
_LOSSES_MAY_DIFFER = 0.02


@dataclass(frozen=True)
class ModelRequest:
    """What to time.

    Args:
        model: folder, GGUF file, or a folder with config.json alone for random weights.
        modes: names in MODEL_MODES.
        layer: R, dtype, quant, nested, dropout and adapter_dtype; N and K do not count.
        batch, length: sequences of a step and tokens in each; in decoding, the tokens before.
        rounds: samples of each provider.
        sample_seconds: least length of a sample.
        allocator: what it runs under, for the rows.
        threads: of torch; None for torch's own choice.
        memory_of: measure the peak memory of (mode, provider), and nothing else.
    """

    model: str
    modes: list[str]
    layer: Layer
    batch: int
    length: int
    rounds: int
    sample_seconds: float
    allocator: str
    threads: int | None
    memory_of: tuple[str, str] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelRequest:
        """Undoes `as_dict`."""
        return cls(**{**fields, "layer": Layer(**fields["layer"])})

    def row(self, mode: str, provider: str) -> dict[str, str]:
        """The columns that say what was measured."""
        layer = self.layer
        path = Path(self.model).resolve()
        return {
            "op": f"model {path.stem if path.is_file() else path.name}",
            "mode": mode,
            "provider": provider,
            "M": str(self.batch * (1 if mode == "decode" else self.length)),
            "R": str(layer.R),
            "dtype": layer.dtype,
            "quant": layer.quant_name,
            "dropout": f"{layer.dropout:g}",
            "adapter_dtype": layer.adapter_dtype,
        }


def work(fields: dict[str, Any], emit: Emit) -> None:
    """Does the request; `emit` is told of every event."""
    import torch

    request = ModelRequest.from_dict(fields)
    if request.threads:
        torch.set_num_threads(request.threads)
    model = _Model(request)
    if request.memory_of is not None:
        emit("memory", {"peak_mb": model.peak_mb(*request.memory_of)})
        return
    from .measure import Budget, interleave
    from .rows import COLUMNS, machine, timing_columns

    shared = {**machine(), "allocator": request.allocator}
    emit("machine", shared)
    for mode in request.modes:
        providers = [*MODEL_PROVIDERS]
        if mode == "decode" and model.repacks:
            providers.append(_PACKED)
        text = f"{mode}: {Path(request.model).name}"
        emit("case", {"text": text, "samples": request.rounds * len(providers)})
        if (fault := model.fault(mode)) is not None:
            row = request.row(mode, "fastlora")
            emit("refused", {"row": row, "reason": fault, "wrong": True})
            emit("done", {})
            continue
        timings = interleave(
            {name: [model.call(mode, name)] for name in providers},
            Budget(request.rounds, request.sample_seconds),
            lambda: emit("tick", {}),
            model.switch,
        )
        for name, timing in timings.items():
            columns = timing_columns(timing.seconds, timings["peft"].seconds)
            row = dict.fromkeys(COLUMNS, "") | shared | request.row(mode, name) | columns
            emit("row", {"row": {**row, "calls": str(timing.calls)}})
        emit("done", {})


class _Model:
    """A causal LM with an adapter on every linear layer, and what to call for each mode."""

    def __init__(self, request: ModelRequest) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        from ...integrations.transformers import load_causal_lm
        from ..console import quiet_libraries
        from ..finetune.model import cast_adapter

        quiet_libraries()
        self._request = request
        layer = request.layer
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            model, _ = load_causal_lm(
                _with_weights(Path(request.model), Path(scratch), layer.dtype),
                quant=layer.quant,
                double_quant=layer.nested,
                dtype=getattr(torch, DTYPES[layer.dtype]),
            )
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=layer.R,
            lora_alpha=2 * layer.R,
            lora_dropout=layer.dropout,
            target_modules="all-linear",
        )
        self._model: Any = get_peft_model(model, config)
        cast_adapter(self._model, getattr(torch, DTYPES[layer.adapter_dtype]))
        for name, parameter in self._model.named_parameters():
            if "lora_B" in name:
                # It starts at zero, which would hide A's gradient from the check.
                parameter.data.normal_(0, 0.02)
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-5)
        shape = (request.batch, request.length)
        self._tokens = torch.randint(0, model.config.vocab_size, shape)
        self._packed: Any = None

    @property
    def repacks(self) -> bool:
        """Whether bitsandbytes would rewrite the weights for inference on this CPU."""
        if self._request.layer.quant == "none" or self._request.layer.dtype != "bf16":
            return False
        from bitsandbytes.functional import has_avx512bf16

        return bool(has_avx512bf16())

    def switch(self, provider: str) -> None:
        """Makes the layers PEFT's own, or fastlora's."""
        from ...integrations.bitsandbytes import disable_cpu_repacking
        from ...integrations.peft import accelerate, restore

        if provider == "fastlora":
            accelerate(self._model, verbose=False)
        elif provider == "peft":
            restore(self._model)
            disable_cpu_repacking(self._model)

    def call(self, mode: str, provider: str) -> Callable[[], object]:
        """What one call of `mode` is; `switch` goes before it."""
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
        """What is wrong with fastlora's loss and gradients, or None; without dropout."""
        import torch

        losses, gradients = [], []
        self._prepare(mode)
        # Dropout off, and everything else as it is timed.
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
        import torch

        from ...integrations.transformers import peak_memory, reset_peak_memory
        from .memory import release_free_memory

        self.switch(provider)
        call = self.call(mode, provider)
        device = torch.device("cpu")
        release_free_memory()
        reset_peak_memory(device)
        before = peak_memory(device)
        for _ in range(2):
            call()
        return (peak_memory(device) - before) / 2**20


def _with_weights(path: Path, scratch: Path, dtype: str) -> Path:
    """`path`, or where it has a config alone, a model in `scratch` with random weights."""
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return path
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPES[dtype]))
    model.save_pretrained(scratch)
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a").save_pretrained(scratch)
    return scratch


if __name__ == "__main__":
    sys.exit(serve(work))
