"""Loading and saving models to fine-tune."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .gguf import StrPath, convert_gguf, is_gguf
from .loading import load_model, stored_quantisation

QUANT_TYPES = ("nf4", "fp4", "none")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def load_causal_lm(
    path: StrPath,
    *,
    quant: str = "none",
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    cache_dir: StrPath | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer, from a folder or a GGUF file, ready for `get_peft_model`.

    A 4-bit model is prepared by `peft.prepare_model_for_kbit_training` (without gradient
    checkpointing). bitsandbytes' repacking of weights for CPU inference is switched off: after one
    evaluation it would silently drop the gradients that pass through the frozen weights.

    Args:
        path: folder for `from_pretrained`, or a .gguf file, which is converted once and cached.
        quant: "nf4", "fp4" (by bitsandbytes) or "none".
        double_quant: also store absmax in 8 bits.
        dtype: of the dense weights; the compute dtype of the 4-bit ones.
        device: None means "cuda" if there is one, else "cpu".
        cache_dir: folder for converted GGUF files; see `convert_gguf`.

    Raises:
        FileNotFoundError: path, its config or its tokenizer is missing.
        ValueError: unknown quant, quant for a model that is stored quantised, a tokenizer that
            can't be loaded, or as `load_model`.
    """
    if quant not in QUANT_TYPES:
        raise ValueError(f"quant must be one of {', '.join(QUANT_TYPES)}, got {quant!r}")
    folder = model_folder(path, cache_dir)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(folder)
    stored = stored_quantisation(folder)
    options: dict[str, Any] = {}
    if quant != "none":
        if stored is not None:
            raise ValueError(
                f"quant must be 'none' for {path}, which is stored quantised, got {quant!r}"
            )
        options["quantization_config"] = four_bit(quant, double_quant, dtype)
    if quant != "none" or stored is not None or device.type != "cpu":
        options["device_map"] = {"": device}
    model = load_model(folder, dtype=dtype, **options)
    if quant != "none" or stored is not None:
        from peft import prepare_model_for_kbit_training

        from ..bitsandbytes import disable_cpu_repacking

        disable_cpu_repacking(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model, tokenizer


def four_bit(quant: str, double_quant: bool, dtype: torch.dtype) -> Any:
    """bitsandbytes' config of a 4-bit model; arguments as in `load_causal_lm`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def load_tokenizer(folder: StrPath) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`.

    Raises:
        FileNotFoundError: there is none. ValueError: it can't be built from what is there.
    """
    files = (path for pattern in _TOKENIZER_FILES for path in Path(folder).glob(pattern))
    if not any(files):
        raise FileNotFoundError(f"no tokenizer in {folder}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        # The type depends on what is missing and on the version of Transformers.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the tokenizer in {folder} can't be loaded: {reason}") from error


def model_folder(path: StrPath, cache_dir: StrPath | None = None) -> Path:
    """The folder to load: `path` itself, or the converted copy of a GGUF file.

    Raises:
        FileNotFoundError: there is nothing at path, or no model.
        ValueError: the file is not a GGUF file.
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


def make_savable(model: PreTrainedModel) -> None:
    """Makes a model that was loaded from a 4-bit folder savable.

    On saving, Transformers 5 reverts the conversions that it applied on loading. It can't revert
    the one that assembles 4-bit weights, and need not: the state dict already has the right names.
    Weights that layers share are parted, but for tied embeddings: replicated layers, as PEFT's
    layer_replication makes them, can't be saved otherwise.
    """
    table = getattr(model.get_input_embeddings(), "weight", None)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in seen and parameter is not None and parameter is not table:
                module._parameters[name] = copy.deepcopy(parameter)
            seen.add(id(parameter))
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [c for c in conversions if _is_reversible(c)]


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
