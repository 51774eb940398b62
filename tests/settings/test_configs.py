"""The ready files in configs/ are what vLLM reads, and the package needs no vLLM to be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_flying.core.topology import available_widths
from vllm_flying.patches.engine_args import is_enabled
from vllm_flying.patches.supported import check_arguments

CONFIGS = Path(__file__).parents[2] / "configs"
ENGINES = {"cpu-2-engines": (2, 1), "h200x8-8b": (8, 1), "h200x8-70b": (4, 2)}

WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = sys.modules["torch"] = None  # an import of them raises
import vllm_flying
from vllm_flying.cli.main import run
import vllm_flying.controller.controller, vllm_flying.core.transaction, vllm_flying.settings, vllm_flying.plugin
run(["status", "--url", "http://127.0.0.1:9"])
"""


@pytest.mark.parametrize("name", ENGINES)
def test_vllm_reads_the_config(name: str) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    read = AsyncEngineArgs.from_cli_args(parser.parse_args(["--config", str(CONFIGS / f"{name}.yaml")]))
    assert is_enabled(read)
    check_arguments(read)
    assert (read.data_parallel_size, read.tensor_parallel_size) == ENGINES[name]
    assert available_widths(read.data_parallel_size)


def test_every_config_is_looked_at() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(ENGINES)


def test_the_package_is_importable_without_vllm() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_VLLM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "no server answers" in done.stderr, done.stderr
