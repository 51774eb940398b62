"""Models for benchmarks with their tokenizers, made on the spot; files are written in the cache folder only."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CACHE = Path.home() / ".cache" / "vllm-flying-bench"
VOCABULARY = 32000


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `model_of` takes; by default about 150M parameters, so that layers dominate overheads on two cores."""
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens; 128256 is Llama 3's")


def model_of(arguments: argparse.Namespace) -> Path:
    """The model that these options ask for."""
    return llama(arguments.layers, arguments.hidden, arguments.vocabulary)


def llama(layers: int, hidden: int, vocabulary: int = VOCABULARY) -> Path:
    """A random Llama in bfloat16 with heads of 64. `vocabulary` is in tokens."""
    target = CACHE / f"llama-{layers}x{hidden}-{vocabulary}"
    if not (target / "config.json").is_file():
        print(f"Making {target} ...", flush=True)
        _write_model(target, layers, hidden, vocabulary)
    if not (target / "tokenizer_config.json").is_file():
        _write_tokenizer(target, vocabulary)
    return target


def _write_model(target: Path, layers: int, hidden: int, vocabulary: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)


def _write_tokenizer(target: Path, vocabulary: int) -> None:
    """A word per token: text made of random tokens has as many tokens again, so that prompts keep their lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    specials = ["<unk>", "<s>", "</s>"]
    words = [*specials, *(f"w{token}" for token in range(len(specials), vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
