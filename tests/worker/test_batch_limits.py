"""Limits of a group against those of stock vLLM of its size: vLLM's own configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

from tests.support.checkpoints import make_checkpoint
from vllm_flying.patches.engine_args import EXTENSIONS
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


def test_what_was_set_holds_though_it_is_vllms_default(tmp_path: Path) -> None:
    """The defaults of an engine by itself, given by hand; asked twice, as vLLM's front end does."""
    context = UsageContext.OPENAI_API_SERVER
    tokens, seqs = (defaults[context] for defaults in EngineArgs.get_batch_defaults(1))
    for given in ({"max_num_batched_tokens": tokens}, {"max_num_seqs": seqs}, {"max_num_batched_tokens": tokens, "max_num_seqs": seqs}):
        arguments = EngineArgs(
            model=str(make_checkpoint("llama", tmp_path)), max_model_len=512, data_parallel_size=2,
            worker_extension_cls=EXTENSIONS[0], **given,
        )  # fmt: skip
        for _ in range(2):
            engine = arguments.create_engine_config(context)
            wide = wide_vllm_config(engine, 2)
            for name in given:
                assert getattr(wide.scheduler_config, name) == getattr(engine.scheduler_config, name), (name, given)
