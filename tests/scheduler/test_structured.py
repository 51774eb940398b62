"""A grammar that was compiled anew and replayed allows what the one left behind allows, reasoning or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.checkpoints import make_checkpoint
from vllm_flying.scheduler.departures import can_move
from vllm_flying.scheduler.handover import pack_begun, pack_requests, unpack_begun, unpack_requests
from vllm_flying.scheduler.structured import note_beginning

ENDS_REASONING = 511


class Reasoner:
    """The two questions that vLLM asks of a reasoning parser."""

    def __init__(self, tokenizer: Any, start: bool = True) -> None:
        self.thinks = start

    def is_reasoning_end(self, input_ids: Any) -> bool:
        return not self.thinks or ENDS_REASONING in list(input_ids)

    def is_reasoning_end_streaming(self, input_ids: Any, delta_ids: Any) -> bool:
        return ENDS_REASONING in list(delta_ids)


@pytest.fixture(scope="module")
def config(checkpoints: Path) -> VllmConfig:
    return EngineArgs(model=str(make_checkpoint("llama", checkpoints))).create_engine_config()


@pytest.fixture(scope="module")
def letters(config: VllmConfig) -> list[int]:
    tokenizer = cached_tokenizer_from_config(config.model_config)
    return list(tokenizer.encode("abcdab", add_special_tokens=False))


@pytest.fixture(params=["plain", "reasoning"])
def manager(request: pytest.FixtureRequest, config: VllmConfig) -> StructuredOutputManager:
    manager = StructuredOutputManager(config)
    if request.param == "reasoning":
        manager.reasoner_cls = Reasoner  # type: ignore[assignment]
    return manager


def make_request(manager: StructuredOutputManager, **reasoning: Any) -> Request:
    constraint = StructuredOutputsParams(regex="(ab|cd){3}")
    constraint._backend = "xgrammar"
    params = SamplingParams(max_tokens=20, structured_outputs=constraint)
    request = Request("r", [5, 6, 7], params, None, **reasoning)
    manager.grammar_init(request)
    note_beginning(request)
    return request


def bitmask(manager: StructuredOutputManager, request: Request) -> list[int]:
    structured = request.structured_output_request
    assert structured is not None
    while not structured.is_grammar_ready:
        pass
    mask = manager.grammar_bitmask({"r": request}, ["r"], {})
    assert mask is not None
    return [int(word) for word in mask[0]]


def generate(manager: StructuredOutputManager, request: Request, tokens: list[int]) -> None:
    for token in tokens:
        request.append_output_token_ids(token)
        assert manager.accept_tokens(request, [token])


def output(manager: StructuredOutputManager, letters: list[int], reasoning: dict[str, Any]) -> list[int]:
    """With thoughts before what the grammar rules, where there are any."""
    begins = reasoning.get("reasoning_parser_kwargs", {}).get("start", True) and "reasoning_ended" not in reasoning
    return [300, 301, ENDS_REASONING, *letters] if manager.reasoner_cls and begins else letters


@pytest.mark.parametrize(
    "reasoning", [{}, {"reasoning_ended": True}, {"reasoning_parser_kwargs": {"start": False}}], ids=str
)
def test_a_begun_request_goes_on_where_it_was(
    manager: StructuredOutputManager, letters: list[int], reasoning: dict[str, Any]
) -> None:
    tokens = output(manager, letters, reasoning)
    for count in range(len(tokens) + 1):
        here = make_request(manager, **reasoning)
        bitmask(manager, here)  # waits for the grammar
        here.status = RequestStatus.RUNNING
        generate(manager, here, tokens[:count])
        expected = bitmask(manager, here)
        assert can_move(here)
        there = unpack_begun(pack_begun(here), manager)
        assert there is not None
        twice = unpack_begun(pack_begun(there), manager)  # from the second engine to a third
        assert twice is not None
        for moved in (there, twice):
            assert list(moved.output_token_ids) == tokens[:count]
            assert list(moved.all_token_ids) == [5, 6, 7, *tokens[:count]]
            assert bitmask(manager, moved) == expected
        generate(manager, there, tokens[count:])


def test_a_fresh_request_keeps_what_the_front_end_said(manager: StructuredOutputManager) -> None:
    request = make_request(manager, reasoning_ended=True, reasoning_parser_kwargs={"start": False})
    (there,) = unpack_requests(pack_requests([request]), manager)
    structured = there.structured_output_request
    assert structured is not None
    assert structured.reasoning_ended is True
    assert structured.reasoning_parser_kwargs == {"start": False}
