"""What an engine's unfinished requests need of a layout, for the controller.

May import vllm's types.
"""

from __future__ import annotations

from typing import Any

from vllm_flying.core.hints import HINT_KEY, HintError, parse_hint, urgent_width
from vllm_flying.scheduler.facade import FlyingScheduler
from vllm_flying.scheduler.limits import kv_tokens_expected


def unfinished_needs(facade: FlyingScheduler) -> dict[str, Any]:
    """Prompt tokens still to be computed, KV tokens of the largest request, and the widest group anyone wants."""
    requests = [request for scheduler in facade.schedulers.values() for request in scheduler.requests.values()]
    requests += facade.held
    longest = max((kv_tokens_expected(request, facade.max_model_len) for request in requests), default=0)
    widths = set(facade.schedulers)
    return {
        "prompt_tokens_queued": sum(max(0, r.num_prompt_tokens - r.num_computed_tokens) for r in requests),
        "largest_request": longest,
        "wanted_width": max((wanted_width(r, widths, facade.engine_tp, facade.num_engines) for r in requests), default=1),
    }


def wanted_width(request: Any, widths: set[int], engine_tp: int, num_engines: int) -> int:
    """The width that a request asks for by its hint, or by a priority that is better than the usual 0."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    try:
        width = parse_hint(extra.get(HINT_KEY)).width(widths, engine_tp)
    except HintError:  # refused at admission; a request of the offline API may still have one
        width = None
    if width is None:
        return urgent_width(widths, num_engines) if request.priority < 0 else 1
    return int(width)
