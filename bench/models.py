"""Models for benchmarks, made on the spot."""

from __future__ import annotations

from pathlib import Path

CACHE = Path.home() / ".cache" / "vllm-flying-bench"


def llama_150m() -> Path:
    """A random Llama of about 150M parameters in bfloat16, so that layers dominate overheads on two cores."""
    target = CACHE / "llama-150m"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    print(f"Making {target} ...", flush=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return target
