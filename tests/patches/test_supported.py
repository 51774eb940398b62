"""Models and arguments that can't change their layout are refused with the reason; vLLM's own configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)

from vllm_flying.patches.supported import NotSupportedError, check_arguments, check_config
from vllm_flying.worker.kv_views import KVLayoutError, wide_kv_cache_config

SMALL = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=256,
)  # fmt: skip
LATENT = dict(
    kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, moe_intermediate_size=32,
    n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
)  # fmt: skip
QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}}


def arguments(directory: Path, family: str, more: dict[str, Any], **given: Any) -> EngineArgs:
    config = getattr(transformers, f"{family}Config")(**SMALL, **more)
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(directory)
    return EngineArgs(
        model=str(directory), dtype="bfloat16", skip_tokenizer_init=True, additional_config={"flying": {"num_engines": 2}}, **given
    )


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("Mixtral", {"num_local_experts": 4}, "mixture-of-experts"),
        ("DeepseekV2", LATENT, "latent attention"),
        ("Llama", QUANTISED, r"quantised weights \(\w*gptq\w*\)"),
        ("Llama", {"head_dtype": "float32"}, r"leave head_dtype \(torch.float32\) out"),
    ],
)
def test_models_that_can_not_change_their_layout(tmp_path: Path, family: str, more: dict[str, Any], reason: str) -> None:
    config = arguments(tmp_path, family, more).create_engine_config()
    with pytest.raises(NotSupportedError, match=reason):
        check_config(config)


def test_every_width_must_divide_the_heads(tmp_path: Path) -> None:
    check_config(arguments(tmp_path, "Llama", {}).create_engine_config())
    with pytest.raises(NotSupportedError, match="KV heads = 4 is not a multiple of the tensor-parallel degree 8"):
        given = arguments(tmp_path, "Llama", {})
        given.additional_config = {"flying": {"num_engines": 8}}
        check_config(given.create_engine_config())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"data_parallel_size_local": 1}, "--data-parallel-size-local 1: all 2 engines must be on this host"),
        ({"data_parallel_backend": "ray"}, "--data-parallel-backend ray"),
        ({"data_parallel_external_lb": True}, "--data-parallel-external-lb"),
        ({"nnodes": 2}, "--nnodes 2"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
    ],
)
def test_arguments_that_exclude_switching(tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    fine = arguments(tmp_path, "Llama", {}, data_parallel_size=2)
    check_arguments(fine)
    for name, value in given.items():
        setattr(fine, name, value)
    with pytest.raises(NotSupportedError, match=reason):
        check_arguments(fine)


def kv_config(spec: KVCacheSpec) -> KVCacheConfig:
    return KVCacheConfig(8, [], [KVCacheGroupSpec(["layer"], spec)])


def test_only_full_attention_whose_heads_divide_gets_wider_pages() -> None:
    sizes: dict[str, Any] = dict(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    whole = FullAttentionSpec(**sizes)
    (wide,) = wide_kv_cache_config(kv_config(whole), 2).kv_cache_groups
    spec = wide.kv_cache_spec
    assert isinstance(spec, FullAttentionSpec) and (spec.block_size, spec.num_kv_heads) == (32, 1)
    assert spec.page_size_bytes == whole.page_size_bytes
    with pytest.raises(KVLayoutError, match="2 KV heads per worker can't be shared by groups of 4"):
        wide_kv_cache_config(kv_config(whole), 4)
    with pytest.raises(KVLayoutError, match="keep a SlidingWindowSpec"):
        wide_kv_cache_config(kv_config(SlidingWindowSpec(**sizes, sliding_window=64)), 2)
