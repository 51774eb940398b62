"""Requests on their way from one engine's scheduler to another's.

May import vllm. A request that has computed nothing yet is plain state; only its block hasher (a closure of its
engine) and its compiled grammar (rebuilt where it arrives) stay behind.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest


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
