"""The worker class that the plugin names in `worker_cls`: the extension in front of the platform's own worker.

May import vllm. Imported in worker processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from vllm_flying.worker.extension import WorkerExtension

if TYPE_CHECKING or current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class FlyingWorker(WorkerExtension, PlatformWorker):
    """vLLM's worker for this platform, in several layouts."""
