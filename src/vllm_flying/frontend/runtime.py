"""The runtime directory of a server: where its processes meet and where the layout is announced.

Pure: no torch, no vllm. The process that starts the server makes it; the processes that it starts inherit its name.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "FLYING_RUNTIME_DIR"
# Where vLLM keeps its own queues too: the layout is announced there at every switch, a millisecond sooner than on disk.
MEMORY = Path("/dev/shm")
_made_here: set[tuple[int, str]] = set()  # process and directory: forked children have this set too


def runtime_directory() -> Path:
    """The directory of this server; RuntimeError in a process that doesn't belong to one."""
    name = os.environ.get(VARIABLE)
    if not name:
        raise RuntimeError(
            f"{VARIABLE} is not set: this process was not started by a server with vllm-flying enabled; enable it with "
            "--worker-extension-cls vllm_flying.WorkerExtension"
        )
    return Path(name)


def ensure_runtime_directory() -> Path:
    """Make the directory if this process starts a server; it is removed when this process ends.

    Each server of a process gets its own: in an earlier one's directory its workers would find that one's meeting
    place, and an address where nobody listens any more.
    """
    if not _belongs_to_a_server():
        in_memory = MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
        directory = tempfile.mkdtemp(prefix="vllm-flying-", dir=MEMORY if in_memory else None)
        os.environ[VARIABLE] = directory
        _made_here.add((os.getpid(), directory))
        atexit.register(_remove, directory, os.getpid())
    return runtime_directory()


def _belongs_to_a_server() -> bool:
    # vLLM starts a server's processes with multiprocessing. A program started in another way, with an environment where
    # a server's name happens to be, is a server of its own.
    inherited = VARIABLE in os.environ and multiprocessing.parent_process() is not None
    return inherited and (os.getpid(), os.environ[VARIABLE]) not in _made_here


def _remove(directory: str, owner: int) -> None:
    if os.getpid() != owner:  # forked children run the same handlers
        return
    shutil.rmtree(directory, ignore_errors=True)
    # Workers name their communicators' shared memory after the directory, and vLLM may end them before they give it back.
    for left in MEMORY.glob(f"{Path(directory).name}-*"):
        left.unlink(missing_ok=True)
