"""fastlora in Hugging Face Transformers: callbacks for its Trainer, and models to fine-tune."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

QUANT_TYPES = ("nf4", "fp4", "none")
# Part of the cache key: raise it when a conversion would come out differently.
_GGUF_CACHE_VERSION = 1
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


class FastLoraCallback(TrainerCallback):
    """Runs the Trainer's PEFT model on fastlora's kernels, from the first step of `train()` on.

    Args:
        restore: give the model PEFT's own layers back when training ends.
    """

    def __init__(self, restore: bool = False) -> None:
        self.restore = restore

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from ..peft import accelerate

        accelerate(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.restore:
            from ..peft import restore

            restore(kwargs["model"])


class ThroughputCallback(TrainerCallback):
    """Adds `seconds`, `tokens`, `tokens_per_second` and `peak_memory_mb` to every log entry.

    They are those of the last step, which runs from its first forward to the end of the optimizer's
    step: saving, evaluating and reading data are not part of it. Tokens are counted by the Trainer,
    so they need `TrainingArguments(include_num_input_tokens_seen=...)`. Peak memory counts from the
    start of training (CUDA: allocated; CPU: resident).

    Entries reach the callbacks added after this one, and `last`; the Trainer's own log_history is
    written before.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self._began = 0.0
        self._tokens_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._device = args.device
        self._tokens_before = int(state.num_input_tokens_seen)
        reset_peak_memory(self._device)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._synchronize()
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._synchronize()
        seconds = time.perf_counter() - self._began
        # From the last step's end on: Transformers 4 counts a batch before the step begins.
        tokens = int(state.num_input_tokens_seen) - self._tokens_before
        self._tokens_before += tokens
        self.last = {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak_memory(self._device) / 2**20,
        }

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "loss" in kwargs["logs"]:
            kwargs["logs"].update(self.last)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


# ---- memory ----------------------------------------------------------------------------------


def reset_peak_memory(device: torch.device) -> None:
    """Forgets the peak so far, after giving free memory back: what loading took is left out."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if sys.platform == "linux":
        # glibc keeps freed memory; musl and preloaded allocators have no malloc_trim.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            # A locked-down container: the peak then includes loading, as ru_maxrss would.
            return


def peak_memory(device: torch.device) -> int:
    """Peak bytes since `reset_peak_memory`: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---- models ----------------------------------------------------------------------------------


def load_causal_lm(
    path: str | os.PathLike[str],
    *,
    quant: str = "none",
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer, from a folder or a GGUF file, ready for `get_peft_model`.

    A 4-bit model has been through `peft.prepare_model_for_kbit_training` (without gradient
    checkpointing), and bitsandbytes' repacking of weights for CPU inference is off: after one
    evaluation it silently drops the gradient of the frozen weights.

    Args:
        path: folder that `from_pretrained` reads, or a .gguf file, which is converted once and
            cached.
        quant: "nf4", "fp4" (by bitsandbytes) or "none".
        double_quant: store absmax in 8 bits too.
        dtype: of the dense weights; the compute dtype of the 4-bit ones.
        device: "cuda" where there is one, else "cpu", when None.
        cache_dir: where converted GGUF files lie; see `convert_gguf`.

    Raises:
        FileNotFoundError: path, its config or its tokenizer is missing.
        ValueError: unknown quant, quant for a model that is stored quantised, or a tokenizer that
            can't be loaded.
    """
    if quant not in QUANT_TYPES:
        raise ValueError(f"quant must be one of {', '.join(QUANT_TYPES)}, got {quant!r}")
    folder = model_folder(path, cache_dir)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(folder)
    stored = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    options: dict[str, Any] = {}
    if quant != "none":
        if stored is not None:
            raise ValueError(
                f"quant must be 'none' for {path}, which is stored quantised, got {quant!r}"
            )
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    if quant != "none" or stored is not None or device.type != "cpu":
        options["device_map"] = {"": device}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    if quant != "none" or stored is not None:
        from peft import prepare_model_for_kbit_training

        from ..bitsandbytes import disable_cpu_repacking

        disable_cpu_repacking(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model, tokenizer


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`.

    Raises:
        FileNotFoundError: there is none. ValueError: it can't be built from what is there.
    """
    files = (path for pattern in _TOKENIZER_FILES for path in Path(folder).glob(pattern))
    if not any(files):
        raise FileNotFoundError(f"no tokenizer in {folder}")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        # Which of these comes depends on what is missing and on the version of Transformers.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the tokenizer in {folder} can't be loaded: {reason}") from error


def model_folder(
    path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """The folder to load: `path` itself, or the converted copy of the GGUF file that it names.

    Raises:
        FileNotFoundError: there is nothing at path, or no model. ValueError: a file that is not
            GGUF.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {path}")
        return path
    if not path.is_file():
        raise FileNotFoundError(f"no such folder or file: {path}")
    if not is_gguf(path):
        raise ValueError(f"neither a model folder nor a GGUF file: {path}")
    return convert_gguf(path, cache_dir)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """True for a file that starts as GGUF files do."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def convert_gguf(
    path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Folder with the GGUF file's weights in `dtype`, its config and its tokenizer.

    Reading a GGUF tokenizer takes half a minute, so the result is kept, under the SHA-256 of the
    file. It appears by one rename, so that an interrupted conversion leaves nothing that looks
    complete.

    Args:
        path: the .gguf file.
        cache_dir: where it is kept; see `cache_folder`.
        dtype: bf16 holds 4- to 8-bit codes times their scales with no loss that training notices.
    """
    path = Path(path)
    target = gguf_cache_folder(path, cache_dir, dtype)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"gguf_file": path.name}
    try:
        from transformers import GgufConfig

        # Without it Transformers 5 keeps the weights packed: they can be neither trained nor saved.
        options["quantization_config"] = GgufConfig(gguf_file=path.name, dequantize=True)
    except ImportError:
        # Transformers 4 always unpacks.
        pass
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=target.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **options)
        model.save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:
            # Another process was faster; its folder has the same content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def gguf_cache_folder(
    path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Where `convert_gguf` keeps the file's conversion."""
    name = f"{file_sha256(path)}-{str(dtype).removeprefix('torch.')}-v{_GGUF_CACHE_VERSION}"
    return cache_folder(cache_dir) / "gguf" / name


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, or `$XDG_CACHE_HOME/fastlora`, or `~/.cache/fastlora`."""
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastlora"
    return Path(cache_dir).expanduser()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def make_savable(model: PreTrainedModel) -> None:
    """Lets a model that was loaded in 4 bits from a 4-bit folder be saved.

    Transformers 5 undoes on saving what it did to the weights on loading. It can't undo the
    assembling of 4-bit weights, and needn't: their state dict has the names of the folder.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [c for c in conversions if _is_reversible(c)]


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


# ---- evaluation ------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """`exp(mean over label tokens of -log p)`, each token with the same weight.

    Args:
        model: a causal LM; its training mode is put back afterwards.
        batches: dicts with `input_ids`, `attention_mask` and `labels` (-100: not counted).

    Raises:
        ValueError: no token to predict.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            # The first token of a row has nothing before it that could predict it.
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            if tokens:
                total += float(model(**batch).loss) * tokens
                count += tokens
    finally:
        model.train(training)
    if not count:
        raise ValueError("batches must hold at least one label to predict, got none")
    return math.exp(min(total / count, 700.0))
