"""A server has a directory of its own, and leaves nothing in shared memory, also of workers that were killed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from vllm_flying.frontend import runtime


@pytest.fixture(autouse=True)
def _no_server_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runtime, "MEMORY", tmp_path)
    monkeypatch.setenv(runtime.VARIABLE, "")  # so that it is as before in the end
    monkeypatch.delenv(runtime.VARIABLE)
    monkeypatch.setattr(runtime.atexit, "register", lambda *_: None)
    yield


def test_each_server_of_a_process_has_its_own_also_where_it_found_a_name_in_its_environment() -> None:
    first, second = runtime.ensure_runtime_directory(), runtime.ensure_runtime_directory()
    assert first != second and first.is_dir() and runtime.runtime_directory() == second
    os.environ[runtime.VARIABLE] = str(first)  # as in a program that a process with a server started
    assert runtime.ensure_runtime_directory() not in (first, second)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_servers_processes_share_its_directory(method: str) -> None:
    own = runtime.ensure_runtime_directory()
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context(method)
    child = context.Process(target=_tell, args=(theirs,))
    child.start()
    assert ours.recv() == own
    child.join()


def _tell(parent: Connection) -> None:
    parent.send(runtime.ensure_runtime_directory())


def test_what_killed_workers_left_goes_with_the_directory(tmp_path: Path) -> None:
    own = runtime.ensure_runtime_directory()
    (own / "layout").write_text("")
    other = tmp_path / "vllm-flying-of-another-tp:1-[0-1]-cpushm_0"
    for file in (other, tmp_path / f"{own.name}-tp:1-[0-1]-cpushm_0"):
        file.write_text("")
    runtime._remove(str(own), os.getpid() + 1)
    assert len(list(tmp_path.iterdir())) == 3, "a forked child takes nothing away"
    runtime._remove(str(own), os.getpid())
    assert list(tmp_path.iterdir()) == [other]
