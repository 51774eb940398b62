"""What a group takes at once where nobody said: as much as stock vLLM of its size.

May import vllm. On CPU vLLM's defaults for tokens per step and running requests grow with the number of workers, so an engine's would
halve what a pair of engines runs, and change how it trades the time to the first token against the time between two.
"""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_flying.settings import settings_from_vllm_config

LIMITS = ("max_num_batched_tokens", "max_num_seqs")
"""Of a step, as vLLM's arguments and its scheduler's config call them."""


def take_default_limits(wide: VllmConfig, engine: VllmConfig) -> None:
    """Give a group's config vLLM's defaults for its world size where the engine has those for its own; what was given stays."""
    settings = settings_from_vllm_config(engine)
    engine_defaults = EngineArgs.get_batch_defaults(engine.parallel_config.world_size)
    wide_defaults = EngineArgs.get_batch_defaults(wide.parallel_config.world_size)
    for name, of_engine, of_group in zip(LIMITS, engine_defaults, wide_defaults):
        if getattr(settings, f"{name}_given"):
            continue
        limit = getattr(engine.scheduler_config, name)
        context = next((context for context, default in of_engine.items() if default == limit), None)
        if context is not None:
            setattr(wide.scheduler_config, name, of_group[context])
    # As vLLM does where it takes a default: a step has a token at least for each of its requests.
    scheduler = wide.scheduler_config
    scheduler.max_num_seqs = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
    endpoints = wide.compilation_config.compile_ranges_endpoints
    if endpoints:  # the last is the most tokens of a step
        wide.compilation_config.compile_ranges_endpoints = [*endpoints[:-1], wide.scheduler_config.max_num_batched_tokens]
