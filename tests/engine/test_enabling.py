"""Enabled by one flag; without it vLLM is as if the package weren't there; what can't work is refused with the reason."""

from __future__ import annotations

import subprocess
import sys
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
    except Exception as error:
        print("== REFUSED", type(error).__name__, error)
        continue
    parallel = config.parallel_config
    print("== CONFIG", parallel.worker_cls, parallel.distributed_executor_backend, config.scheduler_config.scheduler_cls,
          config.load_config.load_format, config.additional_config)
print("PATCHES", sorted(applied_patches()))
"""


def probe(model: Path, *configurations: dict[str, Any]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(model), repr(configurations)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith(("== ", "PATCHES", " ")))


@pytest.fixture(scope="module")
def model(checkpoints: Path) -> Path:
    return make_checkpoint("llama", checkpoints)


def test_installed_but_not_enabled(model: Path) -> None:
    output = probe(model, {"data_parallel_size": 2})
    assert "vllm_flying" not in output.split("PATCHES")[0] and " flying" not in output
    assert output.count("vllm.") and "create_engine_config']" in output, "only the look-out for the flag is wrapped"


def test_one_flag_is_enough(model: Path) -> None:
    output = probe(model, ONE_FLAG)
    for part in ("worker.worker.FlyingWorker", "executor.FlyingExecutor", "facade.FlyingScheduler", "'num_engines': 2"):
        assert part in output, output
    assert "get_core_engine_for_request" in output


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


def test_what_can_not_work_is_refused(model: Path) -> None:
    outputs = probe(model, *({**ONE_FLAG, **arguments} for arguments, _ in REFUSED)).split("== ")[1:]
    for output, (arguments, text) in zip(outputs, REFUSED, strict=True):
        assert output.startswith("REFUSED") and text in output, (arguments, output)


def test_one_engine_runs_as_stock_vllm(model: Path) -> None:
    output = probe(model, {**ONE_FLAG, "data_parallel_size": 1})
    assert "vllm_flying." not in output.split("PATCHES")[0], output
