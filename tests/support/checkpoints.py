"""Tiny random checkpoints of several model families, made on the spot; head counts divide by 4 everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 512
HEADS = dict(num_attention_heads=8, num_key_value_heads=4)
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    max_position_embeddings=8192,
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)

# family -> (transformers config class, model class, config)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**COMMON, **HEADS, "head_dim": 32, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**COMMON, **HEADS}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**COMMON, **HEADS, "head_dim": 32}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**COMMON, **HEADS, "head_dim": 32, "sliding_window": None}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**COMMON, **HEADS, "head_dim": 32}),
    "phi": ("PhiConfig", "PhiForCausalLM", {**COMMON, "num_attention_heads": 8, "num_key_value_heads": 8}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(vocab_size=VOCABULARY, n_embd=256, n_layer=2, n_head=8, n_positions=4096, initializer_range=0.3,
             bos_token_id=0, eos_token_id=1),
    ),
}

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def make_checkpoint(family: str, directory: Path, **overrides: Any) -> Path:
    """A float32 checkpoint of `family` with its tokenizer in `directory / family`; made once per directory."""
    import torch
    import transformers

    target = directory / family
    if (target / "config.json").exists():
        return target
    config_class, model_class, values = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**values, **overrides})
    model = getattr(transformers, model_class)(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(target)
    _write_tokenizer(target)
    return target


def _write_tokenizer(target: Path) -> None:
    """A byte-level tokenizer without merges: special tokens, 256 bytes, and words to fill the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<s>", "</s>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{index}" for index in range(VOCABULARY - len(specials) - len(letters))]
    vocabulary = {token: index for index, token in enumerate([*specials, *letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 8192,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
