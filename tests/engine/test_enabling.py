"""Enabled by one flag; without it vLLM is as if the package weren't there; what can't work is refused with the reason."""

from __future__ import annotations

import subprocess
import sys
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import make_checkpoint

pytestmark = pytest.mark.engine

ONE_FLAG = {"worker_extension_cls": "vllm_flying.WorkerExtension", "data_parallel_size": 2}

PROBE = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm_flying.patches.apply import applied_patches
for given in eval(sys.argv[2]):
    try:
        arguments = EngineArgs(model=sys.argv[1], enforce_eager=True, max_model_len=256, **given)
        config = arguments.create_engine_config()
        parallel = config.parallel_config
        print("== CONFIG", parallel.worker_cls, parallel.distributed_executor_backend,
              config.scheduler_config.scheduler_cls, config.load_config.load_format, config.additional_config)
    except Exception as error:
        print("== REFUSED", type(error).__name__, error)
    print("PATCHES", sorted(applied_patches()))
"""


def probe(model: Path, *configurations: dict[str, Any]) -> list[str]:
    """For each configuration what became of it, and what is wrapped then in the process, which is the same for all."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(model), repr(configurations)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("== ", "PATCHES", " "))]
    outputs = "\n".join(lines).split("== ")[1:]
    assert len(outputs) == len(configurations), done.stdout
    return outputs


@pytest.fixture(scope="module")
def model(checkpoints: Path) -> Path:
    return make_checkpoint("llama", checkpoints)


REFUSED = [
    ({"additional_config": {"flying": {"weigths": "tiles"}}}, "unknown setting 'weigths'; did you mean 'weights'"),
    ({"additional_config": {"flying": {"widths": [3]}}}, "widths [3]"),
    ({"additional_config": {"flying": {"policy": "fastest"}}}, "policy 'fastest' is unknown; there are: manual"),
    ({"scheduler_cls": "some.Scheduler"}, "--scheduler-cls some.Scheduler"),
    ({"load_format": "tensorizer"}, "--load-format tensorizer"),
    ({"enable_lora": True}, "LoRA"),
    ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
    ({"data_parallel_size": 16}, "KV heads = 4 is not a multiple of the tensor-parallel degree 8"),
]


@pytest.fixture(scope="module")
def with_the_flag(model: Path) -> list[str]:
    """One engine, two, and what is refused, in a process that began without any of them."""
    refused = [{**ONE_FLAG, **arguments} for arguments, _ in REFUSED]
    return probe(model, {**ONE_FLAG, "data_parallel_size": 1}, ONE_FLAG, *refused)


def check_runs_as_stock(output: str) -> None:
    config, patches = output.split("PATCHES")
    assert config.startswith("CONFIG") and "vllm." in config and "flying" not in config, output
    only_the_look_out = ["vllm.engine.arg_utils.EngineArgs.create_engine_config"]
    assert literal_eval(patches.strip()) == only_the_look_out, output


def test_installed_but_not_enabled(model: Path) -> None:
    (output,) = probe(model, {"data_parallel_size": 2})
    check_runs_as_stock(output)


def test_one_engine_runs_as_stock_vllm(with_the_flag: list[str]) -> None:
    check_runs_as_stock(with_the_flag[0])


def test_one_flag_is_enough(with_the_flag: list[str]) -> None:
    output = with_the_flag[1]
    for part in ("worker.worker.FlyingWorker", "executor.FlyingExecutor", "facade.FlyingScheduler", "'num_engines': 2"):
        assert part in output, output
    assert "get_core_engine_for_request" in output


def test_what_can_not_work_is_refused(with_the_flag: list[str]) -> None:
    for output, (arguments, text) in zip(with_the_flag[2:], REFUSED, strict=True):
        assert output.startswith("REFUSED") and text in output, (arguments, output)
