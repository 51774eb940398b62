"""What a worker's model runner knows of a begun request besides its KV, on its way between layouts.

Touches fields of vLLM's two model runners. Runner V1 keeps a CachedRequestState per request (output tokens, the
generator of a seeded request, prompt logprobs so far); it travels. Runner V2 gets everything anew from the scheduler.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Mapping
from typing import Any


def _is_v1(runner: Any) -> bool:
    return hasattr(runner, "requests")


def export_states(runner: Any, request_ids: Iterable[str]) -> dict[str, bytes]:
    """The states of requests that this runner has run, without their pages."""
    if not _is_v1(runner):
        return {}
    states = {}
    for request_id in request_ids:
        state = runner.requests.get(request_id)
        if state is not None:
            travelling = copy.copy(state)
            travelling.block_ids = tuple([] for _ in state.block_ids)
            # Only while the prompt is being computed: the entry asks for prompt logprobs with the next step.
            prompt_logprobs = runner.num_prompt_logprobs.get(request_id)
            states[request_id] = pickle.dumps((travelling, prompt_logprobs), protocol=pickle.HIGHEST_PROTOCOL)
    return states


def install_states(runner: Any, states: Mapping[str, bytes]) -> None:
    """Have a runner know requests that another one began. `states` come from workers of this server."""
    if not _is_v1(runner):
        return
    for request_id, packed in states.items():
        runner.requests[request_id], prompt_logprobs = pickle.loads(packed)
        if prompt_logprobs is not None:
            runner.num_prompt_logprobs[request_id] = prompt_logprobs


def forget_states(runner: Any, request_ids: Iterable[str]) -> None:
    """Drop requests now, not with the next step: by then they may have come back."""
    for request_id in request_ids:
        if _is_v1(runner):
            state = runner.requests.pop(request_id, None)
            runner._on_request_state_removed(request_id, state)
            runner.num_prompt_logprobs.pop(request_id, None)
            runner.input_batch.remove_request(request_id)
        else:
            runner._remove_request(request_id)
