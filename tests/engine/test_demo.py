"""`make demo` as a user runs it: answers stay the same through its switches, and nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_flying.demo import checkpoint
from vllm_flying.frontend.runtime import MEMORY

pytestmark = [pytest.mark.engine, pytest.mark.alone]

pytest.importorskip("gguf", reason="the extra `demo` is not installed: gguf is missing")
try:
    checkpoint.gguf_file()
except FileNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)

LIMIT_S = 600.0
GONE_S = 10.0


def processes_with(variable: str) -> list[str]:
    """Command lines of the processes that have `variable`, NAME=VALUE, in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def runtime_directories() -> set[Path]:
    return set(MEMORY.glob("vllm-flying-*"))


def test_the_demo_answers_switches_and_leaves_nothing(tmp_path: Path) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    scratch.mkdir()
    before = runtime_directories()
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "TMPDIR": str(scratch)}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_flying.demo"], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    switches = [line for line in done.stdout.partition("\nSwitches:\n")[2].splitlines() if line.startswith("- switch ")]
    assert [line.split()[2] for line in switches] == [f"{number}:" for number in range(1, 7)], done.stdout
    assert all(" ms; worker " in line for line in switches), switches
    assert sum("is rank 1 of 2" in line for line in switches) == 3, "each merge says what its workers are"
    assert "17 chats, 6 switches; answers that differ from the first phase's: 0 " in done.stdout, done.stdout
    assert "The capital of France is Paris." in done.stdout
    deadline = time.monotonic() + GONE_S
    while (left := processes_with(f"TMPDIR={scratch}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert list(scratch.glob("vllm-flying-*")) == []
    assert runtime_directories() <= before
    assert [path.name for path in (cache / "vllm-flying-demo").iterdir()] == ["smollm2-135m-padded"]
