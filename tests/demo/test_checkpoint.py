"""Heads of zeros don't change what a model computes."""

from __future__ import annotations

import pytest

from vllm_flying.demo.checkpoint import pad_heads


def test_padding_heads_keeps_the_function() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=72, intermediate_size=96, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    padded = pad_heads(model, 12, 4)
    tokens = torch.randint(0, 64, (2, 17))
    with torch.inference_mode():
        assert torch.allclose(model(tokens).logits, padded(tokens).logits, atol=1e-5)
    with pytest.raises(ValueError, match="queries per KV head"):
        pad_heads(model, 16, 4)
