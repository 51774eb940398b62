"""Limits of a group against those of stock vLLM of its size: vLLM's own configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

from tests.support.checkpoints import make_checkpoint
from vllm_flying.worker.layout_table import wide_vllm_config


def engine_config(model: Path, context: UsageContext, **arguments: Any) -> VllmConfig:
    return EngineArgs(model=str(model), max_model_len=512, enforce_eager=False, **arguments).create_engine_config(context)


def limits(config: VllmConfig) -> tuple[int, int, list[int] | None]:
    scheduler = config.scheduler_config
    return scheduler.max_num_batched_tokens, scheduler.max_num_seqs, config.compilation_config.compile_ranges_endpoints


@pytest.mark.parametrize("context", [UsageContext.OPENAI_API_SERVER, UsageContext.LLM_CLASS])
@pytest.mark.parametrize("given", [{}, {"max_num_batched_tokens": 200}, {"max_num_batched_tokens": 300}, {"max_num_seqs": 100}])
def test_where_nobody_said_a_group_takes_as_much_as_stock_vllm_of_its_size(
    tmp_path: Path, context: UsageContext, given: dict[str, int]
) -> None:
    model = make_checkpoint("llama", tmp_path)
    engine, stock = (engine_config(model, context, tensor_parallel_size=size, **given) for size in (1, 2))
    alone = limits(engine)
    assert limits(wide_vllm_config(engine, 2)) == limits(stock)
    assert limits(engine) == alone


def test_what_was_set_holds_for_groups_too(tmp_path: Path) -> None:
    config = engine_config(make_checkpoint("llama", tmp_path), UsageContext.OPENAI_API_SERVER, max_num_batched_tokens=900, max_num_seqs=7)
    assert limits(wide_vllm_config(config, 2)) == limits(config)
