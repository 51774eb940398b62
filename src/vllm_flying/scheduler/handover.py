"""Requests on their way from one engine's scheduler to another's.

May import vllm. A request is plain state but for its block hasher (a closure of its engine) and its compiled grammar:
both stay behind and are made anew where it arrives, the grammar brought forward by the tokens generated so far.
"""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest

logger = init_logger("vllm.flying.engine")

GRAMMAR_LIMIT_S = 5.0


def pack_requests(requests: Sequence[Request]) -> bytes:
    """Requests as bytes. They must not be in any scheduler any more."""
    for request in requests:
        if request.num_computed_tokens or request.num_output_tokens:
            raise ValueError(f"request {request.request_id} has begun; only fresh requests can be handed over")
        request._block_hasher = None
        request.block_hashes = []
        if request.structured_output_request is not None:
            request.structured_output_request = None
            request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    return pickle.dumps(list(requests), protocol=pickle.HIGHEST_PROTOCOL)


def unpack_requests(packed: bytes, structured_output_manager: Any) -> list[Request]:
    """The requests again, their grammars being compiled. `packed` comes from another engine of this server."""
    requests: list[Request] = pickle.loads(packed)
    for request in requests:
        if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            request.structured_output_request = StructuredOutputRequest.from_sampling_params(request.sampling_params)
            structured_output_manager.grammar_init(request)
    return requests


def pack_begun(request: Request) -> bytes:
    """A begun request as bytes. It stays as it is where it is."""
    travelling = copy.copy(request)
    travelling._block_hasher = None
    travelling.block_hashes = []
    travelling.structured_output_request = None
    travelling.status = RequestStatus.PREEMPTED
    travelling.last_sched_seq = 0
    travelling.next_decode_eligible_step = 0
    return pickle.dumps(travelling, protocol=pickle.HIGHEST_PROTOCOL)


def unpack_begun(packed: bytes, structured_output_manager: Any) -> Request | None:
    """The request again, its grammar where it was; None if the grammar can't be brought there."""
    request: Request = pickle.loads(packed)
    request.structured_output_request = StructuredOutputRequest.from_sampling_params(request.sampling_params)
    if request.structured_output_request is not None and not _replay_grammar(request, structured_output_manager):
        return None
    return request


def _replay_grammar(request: Request, structured_output_manager: Any) -> bool:
    structured = request.structured_output_request
    structured_output_manager.grammar_init(request)
    deadline = time.monotonic() + GRAMMAR_LIMIT_S
    while not structured.is_grammar_ready and time.monotonic() < deadline:
        time.sleep(0.001)
    grammar = structured.grammar if structured.is_grammar_ready else None
    if grammar is None or isinstance(grammar, Exception):
        logger.warning("The grammar of request %s can't be rebuilt (%s); it stays paused.", request.request_id, grammar)
        return False
    tokens = list(request.output_token_ids)
    return not tokens or bool(grammar.accept_tokens(request.request_id, tokens))
