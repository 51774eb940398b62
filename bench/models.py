"""Models for benchmarks, made on the spot."""

from __future__ import annotations

from pathlib import Path

CACHE = Path.home() / ".cache" / "vllm-flying-bench"


def llama_150m() -> Path:
    """About 150M parameters, so that layers dominate overheads on two cores."""
    return llama(layers=8, hidden=1024)


def llama(layers: int, hidden: int) -> Path:
    """A random Llama in bfloat16 with heads of 64."""
    target = CACHE / f"llama-{layers}x{hidden}"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    print(f"Making {target} ...", flush=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return target
