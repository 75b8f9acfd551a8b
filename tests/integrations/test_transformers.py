"""The Trainer's callbacks, loading models, the GGUF cache, perplexity."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import fastlora
from fastlora import tuning
from fastlora.integrations import transformers as hf
from fastlora.integrations.peft import FastLoraLinear
from tests.integrations.models import last_reasons
from tests.tiny import write_gguf

VOCABULARY = 50


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0"
    )


@pytest.fixture
def folder(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def trained(model: nn.Module, out: Path, *callbacks: Any, **options: Any) -> Trainer:
    examples = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 6
    arguments = TrainingArguments(
        out,
        max_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        seed=0,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=list(callbacks))
    trainer.train()
    return trainer


def lora(model: nn.Module) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


# ---- callbacks -------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", [False, True])
def test_the_callback_trains_as_peft_does(
    restore: bool, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    stock = trained(lora(llama), tmp_path)
    other = LlamaForCausalLM(llama.config)
    other.load_state_dict(state)
    model = lora(other)
    fast = trained(model, tmp_path, hf.FastLoraCallback(restore=restore))
    theirs, ours = (
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (stock, fast)
    )
    # Two orders of summation in fp32, over three steps of AdamW.
    assert ours == pytest.approx(theirs, rel=1e-4)
    fast_layers = sum(isinstance(module, FastLoraLinear) for module in model.modules())
    assert fast_layers == (0 if restore else 14)


def test_the_callback_acts_before_the_model_is_used(
    llama: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` before `train`, options, and one line to the user in all."""
    model = lora(llama)
    callback = hf.FastLoraCallback(restore=True, fuse="mlp", verbose=True)
    examples = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 6
    arguments = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[])
    trainer = Trainer(
        model, arguments, train_dataset=examples, eval_dataset=examples, callbacks=[callback]
    )
    assert last_reasons(model) == {None}
    trainer.evaluate()
    assert last_reasons(model) == {""}
    fused = [fusion.fused for fusion in fastlora.explain(model).fusions]
    assert fused and all(fused)
    trainer.train()
    assert capsys.readouterr().err.count("LoRA layers accelerated") == 1
    assert not any(row.fast for row in fastlora.explain(model).rows)


def test_a_callback_that_is_added_later(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = lora(llama)
    examples = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 6
    arguments = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[])
    trainer = Trainer(model, arguments, train_dataset=examples)
    trainer.add_callback(hf.FastLoraCallback())
    trainer.train()
    assert last_reasons(model) == {""}


def test_throughput(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    throughput = hf.ThroughputCallback()
    seen: list[dict[str, float]] = []

    class Keep(transformers.TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            seen.append(dict(kwargs["logs"]))

    options = {"include_num_input_tokens_seen": "all"}
    trained(lora(llama), tmp_path, throughput, Keep(), **options)
    steps = [entry for entry in seen if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert entry["tokens"] == 8
        assert entry["tokens_per_second"] == pytest.approx(8 / entry["seconds"])
        assert entry["peak_memory_mb"] > 0


def test_the_peak_is_forgotten_and_seen() -> None:
    cpu = torch.device("cpu")
    hf.reset_peak_memory(cpu)
    before = hf.peak_memory(cpu)
    block = torch.ones(64 * 2**20 // 4)
    del block
    assert hf.peak_memory(cpu) >= before + 60 * 2**20
    hf.reset_peak_memory(cpu)
    assert hf.peak_memory(cpu) < before + 30 * 2**20


# ---- models ----------------------------------------------------------------------------------


def test_a_dense_model_keeps_its_dtype(folder: Path) -> None:
    model, tokenizer = hf.load_causal_lm(folder, dtype=torch.float16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert len(tokenizer) == VOCABULARY


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_4_bit_model_is_ready_to_train(quant: str, nested: bool, folder: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model, _ = hf.load_causal_lm(folder, quant=quant, double_quant=nested, device="cpu")
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        assert layer.weight.quant_state.quant_type == quant
        assert layer.weight.quant_state.nested == nested
        assert layer.compute_dtype == torch.bfloat16
        # After an evaluation the frozen weight still passes a gradient on.
        assert layer.support_avx512bf16_for_cpu is False
    dense = [p for p in model.parameters() if p.dtype.is_floating_point]
    assert {p.dtype for p in dense} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())


def test_a_stored_4_bit_model_loads_as_it_is(folder: Path, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model, tokenizer = hf.load_causal_lm(folder, quant="nf4", device="cpu")
    model.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    again, _ = hf.load_causal_lm(tmp_path / "stored", device="cpu")
    layers = [m for m in again.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    with pytest.raises(
        ValueError, match=r"quant must be 'none' for .* stored quantised, got 'nf4'"
    ):
        hf.load_causal_lm(tmp_path / "stored", quant="nf4", device="cpu")


def test_unknown_quant(folder: Path) -> None:
    with pytest.raises(ValueError, match="quant must be one of nf4, fp4, none, got 'int8'"):
        hf.load_causal_lm(folder, quant="int8")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "no such folder or file"),
        (b"PK\x03\x04", ValueError, "neither a model folder nor a GGUF file"),
    ],
)
def test_what_is_no_model(
    content: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        hf.model_folder(path)


# ---- GGUF ------------------------------------------------------------------------------------


@pytest.fixture
def conversions(
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """Reading a GGUF file gives the tiny model; the list names every file that was read."""
    read: list[str] = []

    def model(path: Path, **options: Any) -> tuple[LlamaForCausalLM, dict[str, list[str]]]:
        read.append(options["gguf_file"])
        if hasattr(transformers, "GgufConfig"):
            assert options["quantization_config"].dequantize
        kinds = "missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"
        return llama, {kind: [] for kind in kinds}

    monkeypatch.setattr("fastlora.integrations.transformers.gguf._check_blocks", lambda path: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    return read


def gguf(path: Path, content: bytes = b"weights") -> Path:
    path.write_bytes(b"GGUF" + content)
    return path


def test_a_gguf_file_is_converted_once(conversions: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = hf.model_folder(gguf(tmp_path / "a.gguf"), cache)
    assert (first / "model.safetensors").is_file()
    assert (first / "tokenizer.json").is_file()
    assert hf.model_folder(gguf(tmp_path / "same.gguf"), cache) == first
    assert conversions == ["a.gguf"]
    other = hf.model_folder(gguf(tmp_path / "b.gguf", b"others"), cache)
    assert other != first
    assert conversions == ["a.gguf", "b.gguf"]
    assert sorted(p.name for p in (cache / "gguf").iterdir()) == sorted([first.name, other.name])


def test_a_broken_conversion_leaves_nothing(
    conversions: list[str],
    tmp_path: Path,
    llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(llama, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        hf.convert_gguf(gguf(tmp_path / "a.gguf"), tmp_path / "cache")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for converted models and for tuned choices, wherever the environment puts it."""
    monkeypatch.setenv("FASTLORA_CACHE", "/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert hf.cache_folder() == tuning.cache_file("device").parent == Path("/mine")
    monkeypatch.delenv("FASTLORA_CACHE")
    assert hf.cache_folder() == tuning.cache_file("device").parent == Path("/elsewhere/fastlora")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hf.cache_folder() == Path.home() / ".cache" / "fastlora"
    assert hf.cache_folder("~/mine") == Path.home() / "mine"


@pytest.mark.parametrize(
    ("without", "missing"),
    [("blk.0.attn_q", "model.layers.0.self_attn.q_proj.weight"), ("output_norm", "norm.weight")],
)
def test_a_gguf_file_without_a_weight(without: str, missing: str, tmp_path: Path) -> None:
    """Transformers draws it at random, and the conversion would be kept."""
    pytest.importorskip("gguf")
    path, cache = tmp_path / "a.gguf", tmp_path / "cache"
    write_gguf(path)
    assert hf.load_causal_lm(path, cache_dir=cache, device="cpu")[0].config.vocab_size == 40
    write_gguf(path, without={without})
    with pytest.raises(ValueError, match=f"a.gguf doesn't fit the model: it lacks .*{missing}"):
        hf.load_causal_lm(path, cache_dir=cache, device="cpu")
    assert len(list((cache / "gguf").iterdir())) == 1


def test_a_gguf_file_that_promises_more_layers(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    write_gguf(path)
    content = bytearray(path.read_bytes())
    place = content.index(b"block_count") + len(b"block_count") + 4
    content[place : place + 4] = (10**8).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected 100000000 layers, got 12 tensors"):
        hf.model_folder(path, tmp_path / "cache")


def test_a_gguf_file_that_cannot_be_converted_here(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "file").write_text("")
    write_gguf(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"cache_dir: can't write to .* a\.gguf is converted"):
        hf.model_folder(tmp_path / "a.gguf", tmp_path / "file" / "cache")


@pytest.mark.slow
def test_a_real_gguf_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.cli.finetune.demo import PACKAGE, smollm2

    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed")
    # The user's own cache: converting takes half a minute, and the demo needs the same folder.
    monkeypatch.delenv("FASTLORA_CACHE")
    model, tokenizer = hf.load_causal_lm(smollm2(), device="cpu")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode(best).strip() == "Paris"


# ---- perplexity ------------------------------------------------------------------------------


def test_perplexity_weighs_every_token_alike(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(VOCABULARY, (3, 8))
    labels = ids.clone()
    labels[0, 3:] = -100
    rows = [
        {"input_ids": i[None], "attention_mask": torch.ones(1, 8), "labels": label[None]}
        for i, label in zip(ids, labels, strict=True)
    ]
    together = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        logp = llama(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    expected = math.exp(-float(logp[labels[:, 1:] != -100].mean()))
    llama.train()
    assert hf.perplexity(llama, [together]) == pytest.approx(expected, rel=1e-5)
    assert hf.perplexity(llama, rows) == pytest.approx(expected, rel=1e-5)
    assert llama.training


def test_perplexity_of_nothing(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="at least one label"):
        hf.perplexity(llama, [])
