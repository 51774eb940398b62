"""What can't change its layout is refused at start, with the reason.

Reads vLLM's arguments and config by attribute; imports neither torch nor vllm.
"""

from __future__ import annotations

from typing import Any

from vllm_flying.core.tiles import check_divides
from vllm_flying.settings import settings_from_vllm_config

LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "pt", "npcache", "dummy", "mistral")


class NotSupportedError(ValueError):
    """This server can't run with vllm-flying; the text lists every reason."""


def check_arguments(arguments: Any) -> None:
    """Refuse engine arguments that exclude switching, before vLLM makes a config of them."""
    reasons = []
    for name, meaning in (
        ("data_parallel_external_lb", "requests must be routed by this server, not by an external load balancer"),
        ("data_parallel_hybrid_lb", "requests must be routed by one front end, not one per node"),
        ("enable_lora", "LoRA weights can't be viewed in another layout yet"),
        ("enable_sleep_mode", "sleep mode would free the shared weights and KV pool"),
    ):
        if getattr(arguments, name, False):
            reasons.append(f"--{name.replace('_', '-')}: {meaning}")
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size", "nnodes"):
        if getattr(arguments, name, 1) > 1:
            reasons.append(f"--{name.replace('_', '-')} {getattr(arguments, name)}: can't be combined with switching yet")
    if getattr(arguments, "speculative_config", None):
        reasons.append("--speculative-config: drafts can't change their layout yet")
    if getattr(arguments, "data_parallel_backend", "mp") != "mp":
        reasons.append(f"--data-parallel-backend {arguments.data_parallel_backend}: engines must be processes of this host")
    local = getattr(arguments, "data_parallel_size_local", None)
    if local not in (None, arguments.data_parallel_size):
        reasons.append(f"--data-parallel-size-local {local}: all {arguments.data_parallel_size} engines must be on this host")
    if getattr(arguments, "data_parallel_rank", None) is not None:
        reasons.append("--data-parallel-rank: all engines must belong to this server")
    load_format = str(arguments.load_format)
    if load_format not in (*LOAD_FORMATS, "flying"):
        reasons.append(f"--load-format {load_format}: possible are {', '.join(LOAD_FORMATS)}")
    _raise(reasons)


def check_config(config: Any) -> None:
    """Refuse models and features that exclude switching, once vLLM has resolved its config."""
    reasons = model_reasons(config.model_config)
    if config.kv_transfer_config is not None or getattr(config, "ec_transfer_config", None) is not None:
        reasons.append("KV and encoder-cache connectors can't be combined with switching yet")
    if config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events:
        reasons.append("KV cache events can't be combined with switching yet")
    reasons += _divisions(config)
    _raise(reasons)


def model_reasons(model: Any) -> list[str]:
    """Why a model, given as vLLM's ModelConfig, can't change its layout whatever the widths; empty if it can.

    What its layers keep in the KV cache isn't known before they are built: `worker.kv_views` refuses other kinds then.
    """
    reasons = []
    if model.is_moe:
        reasons.append("mixture-of-experts models can't change their layout yet")
    if model.use_mla:
        reasons.append("models with multi-head latent attention can't change their layout yet")
    if model.runner_type != "generate" or model.is_encoder_decoder:
        reasons.append("only decoder models that generate text can change their layout")
    if model.is_multimodal_model:
        reasons.append("multimodal models can't change their layout yet")
    if model.quantization:
        reasons.append(f"quantised weights ({model.quantization}) can't change their layout yet")
    if model.is_hybrid or model.is_attention_free:
        reasons.append("models with layers other than attention can't change their layout yet")
    if model.head_dtype != model.dtype:
        reasons.append(f"the output head computes in the model's own type: leave head_dtype ({model.head_dtype}) out")
    return reasons


def sizes_to_divide(model: Any) -> list[tuple[str, int]]:
    """Names and sizes of what every width must divide."""
    text = model.hf_text_config
    sizes = [("attention heads", text.num_attention_heads), ("KV heads", model.get_total_num_kv_heads())]
    intermediate = getattr(text, "intermediate_size", None)
    return [*sizes, ("intermediate size", intermediate)] if isinstance(intermediate, int) else sizes


def _divisions(config: Any) -> list[str]:
    settings, sizes = settings_from_vllm_config(config), sizes_to_divide(config.model_config)
    reasons = []
    for width in settings.built_widths():
        for reason in check_divides(sizes, width * settings.engine_tp):
            reasons.append(f"groups of {width} engines: {reason}; leave {width} out of the setting `widths`")
    return reasons


def _raise(reasons: list[str]) -> None:
    if reasons:
        listed = "\n  - ".join(reasons)
        raise NotSupportedError(f"vllm-flying can't run this server:\n  - {listed}")
