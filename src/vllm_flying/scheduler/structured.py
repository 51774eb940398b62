"""Structured outputs of requests that change engines: the grammar is compiled anew and brought to where it was.

May import vllm. A compiled grammar and a reasoning parser can't travel, so what arrives replays the request's output
through vLLM's own manager. vLLM overwrites what the front end said of a request's reasoning as tokens come, and a
replay starts from there: it is noted when the request reaches its first engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from vllm.logger import init_logger
from vllm.v1.request import Request
from vllm.v1.structured_output.request import StructuredOutputRequest

logger = init_logger("vllm.flying.engine")

GRAMMAR_LIMIT_S = 5.0


@dataclass(frozen=True)
class Beginning:
    """What the front end said of a request's reasoning: vLLM's fields of the same names."""

    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: dict[str, Any] | None = None


_beginnings: WeakKeyDictionary[Request, Beginning] = WeakKeyDictionary()


def note_beginning(request: Request) -> None:
    """A request has come from a front end: keep what vLLM will overwrite."""
    structured = request.structured_output_request
    if structured is not None:
        _beginnings[request] = Beginning(structured.reasoning_ended, structured.reasoning_parser_kwargs)


def beginning_of(request: Request) -> Beginning:
    """What was noted of a request."""
    return _beginnings.get(request, Beginning())


def begin_again(request: Request, beginning: Beginning, manager: Any) -> None:
    """The request's structured output as on its first engine; its grammar is being compiled."""
    structured = StructuredOutputRequest.from_sampling_params(request.sampling_params)
    request.structured_output_request = structured
    if structured is not None:
        structured.reasoning_ended = beginning.reasoning_ended
        structured.reasoning_parser_kwargs = beginning.reasoning_parser_kwargs
        _beginnings[request] = beginning
        manager.grammar_init(request)


def replay_output(request: Request, manager: Any) -> bool:
    """Bring the grammar to where the request's output is; False if that can't be done. Blocks must not be hashed yet."""
    structured = request.structured_output_request
    if structured is None:
        return True
    grammar = _compiled(structured)
    if grammar is None or isinstance(grammar, Exception):
        logger.warning("The grammar of request %s can't be rebuilt (%s); it stays paused.", request.request_id, grammar)
        return False
    tokens = list(request.output_token_ids)
    del request._output_token_ids[:]
    del request._all_token_ids[request.num_prompt_tokens :]
    accepted = True
    for token in tokens:  # one by one, as they came: the reasoning parser looks at what is new
        request.append_output_token_ids(token)
        accepted = accepted and bool(manager.accept_tokens(request, [token]))
    return accepted


def _compiled(structured: StructuredOutputRequest) -> Any:
    deadline = time.monotonic() + GRAMMAR_LIMIT_S
    while not structured.is_grammar_ready and time.monotonic() < deadline:
        time.sleep(0.001)
    return structured.grammar if structured.is_grammar_ready else None
