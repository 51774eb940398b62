"""How much KV a request may come to need of a group, and how much of it a group grants.

Pure: no torch, no vllm. One rule for admission, moves and hand-overs: a request is placed only where the group's whole KV
cache can hold its prompt and its max_tokens, since vLLM's queue stands still behind a request that outgrew the cache. A
max_tokens that only fills the context says nothing (vLLM's front end sets it where a client gives none): such a request
goes where it fits now, and may grow until it fills the group that it is in.
"""

from __future__ import annotations


def fills_context(prompt_tokens: int, max_tokens: int, max_model_len: int) -> bool:
    """Whether `max_tokens` is no more than the end of the context."""
    return prompt_tokens + max_tokens >= max_model_len


def kv_tokens_needed(num_tokens: int, prompt_tokens: int, max_tokens: int, max_model_len: int) -> int:
    """KV tokens that a group must be able to hold to take a request that has `num_tokens` by now."""
    if fills_context(prompt_tokens, max_tokens, max_model_len):
        return min(num_tokens + 1, max_model_len)
    return prompt_tokens + max_tokens


def kv_tokens_expected(num_tokens: int, prompt_tokens: int, max_tokens: int, max_model_len: int) -> int:
    """KV tokens that a layout should offer a request: of one that only fills the context, what it will have before long."""
    if fills_context(prompt_tokens, max_tokens, max_model_len):
        return min(num_tokens + num_tokens // 4 + 64, max_model_len)
    return prompt_tokens + max_tokens


def granted_tokens(prompt_tokens: int, max_tokens: int, kv_tokens: int) -> int:
    """The max_tokens of a request in a group that holds `kv_tokens`."""
    return max(1, min(max_tokens, kv_tokens - prompt_tokens))
