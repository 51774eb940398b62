"""The lengths of vLLM's requests, by the rule of `core.lengths`, and of pages.

May import vllm's types. `SamplingParams.max_tokens` stays what the client asked for; `Request.max_tokens`, at which vLLM's
scheduler ends a request, is what its present group grants.
"""

from __future__ import annotations

from typing import Any

from vllm_flying.core import lengths


def kv_tokens_needed(request: Any, max_model_len: int) -> int:
    """KV tokens that a group must be able to hold to take the request."""
    return lengths.kv_tokens_needed(request.num_tokens, *_asked(request), max_model_len)


def kv_tokens_expected(request: Any, max_model_len: int) -> int:
    """KV tokens that a layout should offer the request."""
    return lengths.kv_tokens_expected(request.num_tokens, *_asked(request), max_model_len)


def grant(request: Any, kv_tokens: int) -> None:
    """The request is in a group that holds `kv_tokens`."""
    request.max_tokens = lengths.granted_tokens(*_asked(request), kv_tokens)


def grant_more(request: Any, kv_tokens: int) -> None:
    """Its group holds `kv_tokens` now. What was granted isn't taken back."""
    request.max_tokens = max(request.max_tokens, lengths.granted_tokens(*_asked(request), kv_tokens))


def _asked(request: Any) -> tuple[int, int]:
    return request.num_prompt_tokens, request.sampling_params.max_tokens


def page_tokens(facade: Any, width: int) -> int:
    """KV tokens in a page of a layout of that width; a page has the same bytes in all."""
    return int(facade.schedulers[width].block_size)
