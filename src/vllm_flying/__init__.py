"""Change the parallel layout of a running vLLM server.

Importable without vLLM: `WorkerExtension`, the class that `--worker-extension-cls` names, is loaded on first use.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_flying.worker.extension import WorkerExtension as WorkerExtension

try:
    __version__ = version("vllm-flying")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["WorkerExtension", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "WorkerExtension":
        from vllm_flying.worker.extension import WorkerExtension

        return WorkerExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
