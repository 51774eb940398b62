"""A context length that fits only a merged group is allowed at start; requests are checked one by one instead.

May import vllm. Wraps the check that vLLM makes in each engine before it sizes the KV pool.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from vllm_flying.patches.apply import Patch

CHECK = "_check_enough_kv_cache_memory"
MODULES = ("vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils")  # from 0.33 on; before


def kv_check_patches(widest: int) -> list[Patch]:
    """What the engine process of a server with groups of up to `widest` engines applies."""

    def wrap(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def check_in_widest_group(available_memory: int, *args: Any, **kwargs: Any) -> None:
            # A page of the same bytes holds `widest` times the tokens in the widest group.
            check(available_memory * widest, *args, **kwargs)

        return check_in_widest_group

    return [Patch(_owner(), CHECK, wrap)]


def _owner() -> Any:
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        if hasattr(module, CHECK):
            return module
    raise RuntimeError(f"vLLM has {CHECK} in none of {', '.join(MODULES)}")
