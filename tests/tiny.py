"""Tiny models with tokenizers as files, made on the spot."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}<|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "an",
    "old",
    "red",
    "dog",
    "run",
    "far",
    "from",
    "its",
    "own",
    "green",
    "house",
]


def save_model(folder: Path) -> None:
    """A random Llama of two layers with a word tokenizer and a chat template."""
    special = ["<unk>", "<eos>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(set(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_gguf(path: Path, without: Collection[str] = ()) -> None:
    """A Llama of one layer as a GGUF file of 47 kB, but for the tensors named."""
    import gguf
    import numpy as np

    V, H, width = 40, 32, 48
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(H)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(H // 4)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<s>", "</s>", *map(chr, range(ord("a"), ord("z") + 1)), "ab"]
    writer.add_token_list([*tokens, *(f"<{i}>" for i in range(V - len(tokens)))])
    writer.add_token_types([3, 3] + [1] * (V - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (V, H),
        "output_norm": (H,),
        "output": (V, H),
        "blk.0.attn_norm": (H,),
        "blk.0.ffn_norm": (H,),
        **{f"blk.0.attn_{name}": (H, H) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (width, H),
        "blk.0.ffn_up": (width, H),
        "blk.0.ffn_down": (H, width),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name not in without:
            writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
