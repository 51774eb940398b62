"""The table of layouts in a worker: width -> config, communicators and a stock model runner of its own.

May import torch and vllm. Built at start; a switch picks a row. Row 1 is the engine by itself, made by vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config

from vllm_flying.loader.loaders import VIEW_FORMAT
from vllm_flying.worker.batch_limits import take_default_limits
from vllm_flying.worker.communicators import use_communicators
from vllm_flying.worker.kv_views import kernel_block_size
from vllm_flying.worker.pages import PageMap
from vllm_flying.worker.relay import Relay


@dataclass
class WorkerLayout:
    """One row: everything a worker needs to act in a group of `width` engines."""

    width: int
    vllm_config: VllmConfig
    communicators: dict[str, Any]
    runner: Any = None
    pages: PageMap = field(default_factory=PageMap)
    relay: Relay | None = None

    @property
    def tensor_parallel_group(self) -> Any:
        """The GroupCoordinator of this layout's tensor-parallel group."""
        return self.communicators["_TP"]


    @property
    def kernel_blocks_per_page(self) -> int:
        """Kernel blocks of one page; known once the KV cache is initialised."""
        return int(self.vllm_config.cache_config.block_size) // kernel_block_size(self.runner)


class LayoutTable:
    """All layouts of one worker, and the one that is active."""

    def __init__(self, layouts: dict[int, WorkerLayout]) -> None:
        self._layouts = layouts
        self.active_width = 1

    @property
    def active(self) -> WorkerLayout:
        """The layout whose communicators are in place."""
        return self._layouts[self.active_width]

    @property
    def wide(self) -> list[WorkerLayout]:
        """Every layout wider than one engine, ascending: the same order on all workers."""
        return [self._layouts[width] for width in sorted(self._layouts) if width > 1]

    def __getitem__(self, width: int) -> WorkerLayout:
        return self._layouts[width]

    def activate(self, width: int) -> WorkerLayout:
        """Put a layout's communicators in place. Microseconds; talks to nobody."""
        layout = self._layouts[width]
        use_communicators(layout.communicators)
        self.active_width = width
        return layout

    @contextmanager
    def activated(self, width: int) -> Iterator[WorkerLayout]:
        """Context in which a layout is active and its config is vLLM's current one."""
        before = self.active_width
        layout = self.activate(width)
        try:
            with set_current_vllm_config(layout.vllm_config):
                yield layout
        finally:
            self.activate(before)


def wide_vllm_config(vllm_config: VllmConfig, width: int) -> VllmConfig:
    """The config of a group of `width` engines. To be taken before any model is built from `vllm_config`."""
    wide = copy.deepcopy(vllm_config)
    wide.parallel_config.tensor_parallel_size *= width
    wide.parallel_config.world_size *= width
    if wide.cache_config.block_size is not None:
        wide.cache_config.block_size *= width
    wide.compilation_config.static_forward_context = {}
    take_default_limits(wide, vllm_config)
    wide.load_config.load_format = VIEW_FORMAT
    return wide
