"""Requests on their way from one engine's scheduler to another's.

May import vllm. A request is plain state but for its block hasher (a closure of its engine) and its compiled grammar:
both stay behind and are made anew where it arrives, the grammar brought forward by the tokens generated so far.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

from vllm.v1.request import Request, RequestStatus

from vllm_flying.scheduler.structured import Beginning, begin_again, beginning_of, replay_output


def has_begun(request: Request) -> bool:
    """Whether a worker has seen the request: then it is moved. A fresh one is handed over."""
    return bool(request.num_computed_tokens or request.num_output_tokens or request.num_preemptions)


def pack_requests(requests: Sequence[Request]) -> bytes:
    """Requests as bytes. They must not be in any scheduler any more."""
    for request in requests:
        if has_begun(request):
            raise ValueError(f"request {request.request_id} has begun; only fresh requests can be handed over")
        request._block_hasher = None
        request.block_hashes = []
        if request.structured_output_request is not None:
            request.structured_output_request = None
            request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    return _pack([(request, beginning_of(request)) for request in requests])


def unpack_requests(packed: bytes, structured_output_manager: Any) -> list[Request]:
    """The requests again, their grammars being compiled. `packed` comes from another engine of this server."""
    travelling: list[tuple[Request, Beginning]] = pickle.loads(packed)
    for request, beginning in travelling:
        begin_again(request, beginning, structured_output_manager)
    return [request for request, _ in travelling]


def pack_begun(request: Request) -> bytes:
    """A begun request as bytes. It stays as it is where it is."""
    travelling = copy.copy(request)
    travelling._block_hasher = None
    travelling.block_hashes = []
    travelling.structured_output_request = None
    travelling.status = RequestStatus.PREEMPTED
    travelling.last_sched_seq = 0
    travelling.next_decode_eligible_step = 0
    return _pack((travelling, beginning_of(request)))


def unpack_begun(packed: bytes, structured_output_manager: Any) -> Request | None:
    """The request again, its grammar where it was; None if the grammar can't be brought there."""
    travelling: tuple[Request, Beginning] = pickle.loads(packed)
    request, beginning = travelling
    begin_again(request, beginning, structured_output_manager)
    return request if replay_output(request, structured_output_manager) else None


def _pack(travelling: Any) -> bytes:
    return pickle.dumps(travelling, protocol=pickle.HIGHEST_PROTOCOL)
