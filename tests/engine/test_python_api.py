"""vLLM's Python API without its HTTP server: an AsyncLLM with two engines honours hints in `extra_args`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.load import random_prompts

pytestmark = pytest.mark.engine

LIMIT_S = 400.0
(PROMPT,) = random_prompts(91, (60,))
HINTS = ("auto", "tp", "dp", "tp2")
BEGINNING = "== "


def test_hints_in_extra_args_form_groups(checkpoints: Path) -> None:
    model = make_checkpoint("llama", checkpoints)
    environment = {
        **os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, str(model)], env=environment, capture_output=True, text=True,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(BEGINNING)]
    seen = json.loads(line.removeprefix(BEGINNING))
    assert [seen[hint]["engines"] for hint in HINTS] == [
        [["serving", [0]], ["serving", [1]]],
        [["leading", [0, 1]], ["parked", [0, 1]]],
        [["serving", [0]], ["serving", [1]]],
        [["leading", [0, 1]], ["parked", [0, 1]]],
    ]
    assert all(seen[hint]["tokens"] == seen["auto"]["tokens"] for hint in HINTS), seen
    assert len(seen["auto"]["tokens"]) == 20
    assert "auto, dp, tp, tp2" in seen["refused"]


async def ask(model: str) -> dict[str, Any]:
    """In a process of its own, as a user's program: vLLM's API only, but for the look at the engines."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_flying.frontend.engines import EngineCalls

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model, dtype="float32", enforce_eager=True, max_model_len=512, block_size=32, data_parallel_size=2,
            kv_cache_memory_bytes=8 << 20, worker_extension_cls="vllm_flying.WorkerExtension",
            additional_config={"flying": {"policy": "manual"}},
        )
    )  # fmt: skip
    seen: dict[str, Any] = {}
    try:
        for hint in HINTS:
            tokens = await answer(llm, hint, SamplingParams)
            statuses = await EngineCalls(llm.engine_core).call_all("status")
            seen[hint] = {"tokens": tokens, "engines": [[status["state"], status["group"]] for status in statuses]}
        try:
            await answer(llm, "fast", SamplingParams)
        except VLLMValidationError as error:
            seen["refused"] = str(error)
    finally:
        llm.shutdown()
    return seen


async def answer(llm: Any, hint: str, sampling_params: Any) -> list[int]:
    params = sampling_params(temperature=0, max_tokens=20, ignore_eos=True, extra_args={"parallelism_hint": hint})
    outputs = [output async for output in llm.generate({"prompt_token_ids": PROMPT}, params, f"request-{hint}")]
    return list(outputs[-1].outputs[0].token_ids)


if __name__ == "__main__":
    print(BEGINNING + json.dumps(asyncio.run(ask(sys.argv[1]))), flush=True)
