"""A context length that fits only a merged group is allowed at start; requests are checked one by one instead.

May import vllm. Wraps the check that vLLM makes in each engine before it sizes the KV pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core import kv_cache_utils

from vllm_flying.patches.apply import Patch

logger = init_logger("vllm.flying")


def kv_check_patches(widest: int) -> list[Patch]:
    """What the engine process of a server with groups of up to `widest` engines applies."""

    def wrap(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def check_in_widest_group(available_memory: int, *args: Any, **kwargs: Any) -> None:
            # A page of the same bytes holds `widest` times the tokens in the widest group.
            check(available_memory * widest, *args, **kwargs)

        return check_in_widest_group

    return [Patch(kv_cache_utils, "_check_enough_kv_cache_memory", wrap)]
