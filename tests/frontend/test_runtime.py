"""A server leaves nothing in shared memory, also of workers that were killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_flying.frontend import runtime


def test_what_killed_workers_left_goes_with_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MEMORY", tmp_path)
    monkeypatch.setenv(runtime.VARIABLE, "")  # so that it is as before in the end
    monkeypatch.delenv(runtime.VARIABLE)
    monkeypatch.setattr(runtime.atexit, "register", lambda *_: None)
    own = runtime.ensure_runtime_directory()
    (own / "layout").write_text("")
    other = tmp_path / "vllm-flying-of-another-tp:1-[0-1]-cpushm_0"
    for file in (other, tmp_path / f"{own.name}-tp:1-[0-1]-cpushm_0"):
        file.write_text("")
    runtime._remove(str(own), os.getpid() + 1)
    assert len(list(tmp_path.iterdir())) == 3, "a forked child takes nothing away"
    runtime._remove(str(own), os.getpid())
    assert list(tmp_path.iterdir()) == [other]
