"""A full queue gets vLLM's own answer: the limits of `--max-num-queued-reqs` and `--max-num-queued-tokens` are left alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import SchedulerConfig
from vllm.exceptions import GracefulHTTPError, MaxQueuedTokensError, QueueOverflowError, VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_flying.frontend.board import BoardGroup, BoardState, LayoutBoard
from vllm_flying.frontend.runtime import VARIABLE
from vllm_flying.patches.frontend import _admit_first

PROMPT_TOKENS = 20


class Client(DPLBAsyncMPClient):
    """vLLM's, with engines that take requests and answer nothing."""

    def __init__(self) -> None:
        self.core_engines, self.client_count = [b"0", b"1"], 1
        self.engine_inflight, self.lb_engines = Counter(), [[0, 0, 0.0], [0, 0, 0.0]]
        self.resources = SimpleNamespace(engine_dead=False)
        self.sent: list[str] = []

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.sent.append(request.request_id)

    def shutdown(self, timeout: float | None = None) -> None:
        """There is nothing to end."""


def server(directory: Path, **limits: int) -> tuple[AsyncLLM, Client]:
    """vLLM's engine as an API server has it, as far as it takes requests; two engines apart, each with 100 tokens of KV."""
    LayoutBoard(directory).publish(BoardState(0, 1, (BoardGroup((0,), 100), BoardGroup((1,), 100))))
    llm, client = AsyncLLM.__new__(AsyncLLM), Client()
    llm.engine_core, llm.admission_stats, llm.logger_manager, llm.log_requests = client, None, None, False
    llm.output_processor = OutputProcessor(None, log_stats=False)
    llm.scheduler_config = SchedulerConfig(max_model_len=100, is_encoder_decoder=False, **limits)
    llm.vllm_config = SimpleNamespace(
        additional_config={"flying": {"policy": "manual", "num_engines": 2}}, scheduler_config=llm.scheduler_config,
        cache_config=SimpleNamespace(enable_prefix_caching=False), model_config=SimpleNamespace(max_model_len=100),
    )  # type: ignore[assignment]
    return llm, client


async def send(llm: AsyncLLM, name: str, prompt_tokens: int = PROMPT_TOKENS) -> None:
    params = SamplingParams(max_tokens=8)
    request = EngineCoreRequest(
        request_id=name, prompt_token_ids=list(range(prompt_tokens)), mm_features=None, sampling_params=params,
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
        external_req_id=name,
    )
    queue = RequestOutputCollector(params.output_kind, name)
    await _admit_first(AsyncLLM._add_request)(llm, request, None, None, 0, queue)


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"max_num_queued_reqs": 2}, QueueOverflowError),
        ({"max_num_queued_tokens": 2 * PROMPT_TOKENS}, MaxQueuedTokensError),
    ],
)
def test_what_is_too_much_gets_the_answer_of_stock_vllm(
    limits: dict[str, Any], error: type[GracefulHTTPError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))

    async def test() -> None:
        llm, client = server(tmp_path, **limits)
        await send(llm, "a")
        with pytest.raises(VLLMValidationError, match="may need 128 tokens"):
            await send(llm, "too long", 120)
        await send(llm, "b")
        for name in "cd":
            with pytest.raises(error) as refused:
                await send(llm, name)
            assert refused.value.http_status == HTTPStatus.SERVICE_UNAVAILABLE
        assert client.sent == ["a", "b"], "what the plugin refused took no place, what vLLM refused went nowhere"
        llm.output_processor.abort_requests(["a"], internal=True)
        await send(llm, "e")
        assert client.sent == ["a", "b", "e"]

    asyncio.run(test())


def test_without_a_limit_nobody_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))

    async def test() -> None:
        llm, client = server(tmp_path)
        for number in range(50):
            await send(llm, str(number))
        assert len(client.sent) == 50

    asyncio.run(test())
