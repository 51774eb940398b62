"""What an engine's unfinished requests need of a layout, for the controller.

May import vllm's types.
"""

from __future__ import annotations

from typing import Any

from vllm_flying.core.hints import HintError, hint_of, wanted_width
from vllm_flying.scheduler.facade import FlyingScheduler
from vllm_flying.scheduler.limits import kv_tokens_expected


def unfinished_needs(facade: FlyingScheduler) -> dict[str, Any]:
    """Prompt tokens still to be computed, KV tokens of the largest request, and the widest group anyone wants."""
    requests = [request for scheduler in facade.schedulers.values() for request in scheduler.requests.values()]
    requests += facade.held
    longest = max((kv_tokens_expected(request, facade.max_model_len) for request in requests), default=0)
    return {
        "prompt_tokens_queued": sum(max(0, r.num_prompt_tokens - r.num_computed_tokens) for r in requests),
        "largest_request": longest,
        "wanted_width": max((_wanted_width(request, facade) for request in requests), default=1),
    }


def _wanted_width(request: Any, facade: FlyingScheduler) -> int:
    try:
        hint = hint_of(getattr(request.sampling_params, "extra_args", None))
        widths = facade.schedulers.keys()
        return wanted_width(hint, request.priority < 0, widths, facade.engine_tp, facade.num_engines) or 1
    except HintError:  # refused at admission; a request of the offline API may still have one
        return 1
