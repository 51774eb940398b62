"""Full collections wait until one is asked for, in the server's first process and in those that it spawns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = "from vllm_flying.cli import main\nif __name__ == '__main__':\n    raise SystemExit(main())\n"
CHECK = """
import gc
from multiprocessing.spawn import prepare
usual, others = gc.get_threshold(), len(gc.callbacks)
{start}
assert gc.get_threshold() == (*usual[:2], 1000), gc.get_threshold()
gc.collect(1)
assert gc.get_threshold()[2] == 1000
gc.collect()
assert gc.get_threshold() == usual and len(gc.callbacks) == others
"""


@pytest.mark.parametrize("start", [
    "import vllm_flying.cli", "prepare({{'init_main_from_name': 'vllm_flying.cli.main'}})",
    "prepare({{'init_main_from_path': '{command}'}})",
])  # fmt: skip
def test_until_the_first_full_collection(start: str, tmp_path: Path) -> None:
    command = tmp_path / "vllm-flying"  # as pip writes it
    command.write_text(COMMAND)
    check = CHECK.format(start=start.format(command=command))
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
