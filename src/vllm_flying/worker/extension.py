"""The worker extension: a stock vLLM worker that acts in several layouts.

May import torch and vllm. Named by `--worker-extension-cls`; the general plugin then puts it in front of the
platform's own worker class (see `worker.worker`), where it wraps start-up and each step and adds the switch calls.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed

from vllm_flying.core.leases import Pages
from vllm_flying.core.topology import available_widths
from vllm_flying.frontend.runtime import runtime_directory
from vllm_flying.settings import settings_from_vllm_config
from vllm_flying.worker.communicators import (
    WorkerPlace,
    all_pids,
    build_communicators,
    join_world,
    use_communicators,
)
from vllm_flying.worker.group_calls import GroupCalls
from vllm_flying.worker.host_pool import CanNotShare, HostPool
from vllm_flying.worker.kv_views import SharedPool, kernel_blocks_of, raw_pool, wide_kv_cache_config
from vllm_flying.worker.layout_table import LayoutTable, WorkerLayout, wide_vllm_config
from vllm_flying.worker.memory import memory_report
from vllm_flying.worker.probe import probe_runner
from vllm_flying.worker.relay import Relay, grammar_comes
from vllm_flying.worker.sampling_seed import seed_sampling
from vllm_flying.worker.transfer import layer_pages
from vllm_flying.worker.transports import choose_transport, make_host_pool

logger = init_logger("vllm.flying.worker")

# vLLM compiles the vocabulary mask of tensor-parallel embeddings on first use: for one token, and for any number.
WARM_UP_TOKENS = (16, 24, 1)


class WorkerExtension(GroupCalls):
    """Mixin in front of vLLM's Worker. Methods named `flying_*` are called by the engine process."""

    parallel_config: Any
    model_config: Any
    model_runner: Any
    local_rank: int
    rank: int
    _flying_pids: list[int]
    _flying_grammar_comes: bool
    _flying_probe_results: dict[int, list[tuple[int, int, float]]]

    # ---- start-up -------------------------------------------------------------------------------------------------

    def init_device(self) -> None:
        """Meet the workers of all engines, make every layout's communicators, then let vLLM go on."""
        settings = settings_from_vllm_config(self.vllm_config)
        self._flying_place = WorkerPlace(
            engine=self.parallel_config.data_parallel_index,
            local_rank=self.rank,
            num_engines=settings.num_engines,
            engine_tp=settings.engine_tp,
        )
        widths = available_widths(settings.num_engines, settings.widths)
        configs = {1: self.vllm_config, **{width: wide_vllm_config(self.vllm_config, width) for width in widths}}
        if not current_platform.is_cpu():
            # vLLM picks the device first; joining the world before that would open a context on the wrong one.
            torch.accelerator.set_device_index(self.local_rank)
        self._flying_name_segments()
        directory = runtime_directory()
        backend = current_platform.dist_backend
        logger.info("Meeting %d workers of %d engines.", self._flying_place.world_size, settings.num_engines)
        join_world(
            self._flying_place,
            f"file://{directory / 'rendezvous'}",
            self.local_rank,
            backend,
            settings.startup_timeout_s,
        )
        self._flying_pids = all_pids(self._flying_place)
        pool = build_communicators(self._flying_place, self.vllm_config, widths, backend)
        super().init_device()  # type: ignore[misc]
        self._flying_name_segments()
        use_communicators(pool[1])
        self._flying = LayoutTable(
            {width: WorkerLayout(width, configs[width], pool[width]) for width in (1, *widths)}
        )
        self._flying[1].runner = self.model_runner
        for layout in self._flying.wide:
            layout.relay = Relay(layout.tensor_parallel_group)

    def _flying_name_segments(self) -> None:
        # CPU communicators name their shared memory by this variable: equal on all workers of the world, where vLLM
        # would make it equal within an engine only.
        os.environ["VLLM_DIST_IDENT"] = runtime_directory().name

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights once; build each wider layout's model over them."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        for layout in self._flying.wide:
            with self._flying.activated(layout.width):
                set_random_seed(self.model_config.seed)
                layout.runner = type(self.model_runner)(layout.vllm_config, self.device)
                layout.runner.load_model()
        logger.info("Layouts ready: widths %s over one copy of the weights.", [1, *(w.width for w in self._flying.wide)])

    def determine_available_memory(self) -> Any:
        """Count what every layout needs before vLLM sizes the KV pool."""
        available = super().determine_available_memory()  # type: ignore[misc]
        if current_platform.is_cpu() and self._should_warm_up_model():  # type: ignore[attr-defined]
            for layout in self._flying.wide:
                with self._flying.activated(layout.width):
                    layout.runner.warming_up_model()
        return available

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV pool, then each wider layout's view of the same bytes."""
        host_pool = make_host_pool(kv_cache_config) if current_platform.is_cpu() else CanNotShare("it isn't in CPU memory")
        with SharedPool(host_pool.buffer) if isinstance(host_pool, HostPool) else nullcontext():
            super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        pool = raw_pool(self.model_runner)
        if isinstance(host_pool, HostPool) and pool.data_ptr() != host_pool.buffer.data_ptr():
            raise RuntimeError("vLLM made a KV pool of its own; it must use the one that other workers can read")
        cache_config = self.vllm_config.cache_config
        for layout in self._flying.wide:
            wide = wide_kv_cache_config(kv_cache_config, layout.width)
            wide_cache_config = layout.vllm_config.cache_config
            wide_cache_config.num_gpu_blocks = wide.num_blocks
            wide_cache_config.block_size = cache_config.block_size * layout.width
            wide_cache_config.kv_cache_layout = cache_config.kv_cache_layout
            wide_cache_config.hash_block_size = wide.hash_block_size
            wide_cache_config.cache_hit_alignment_tokens = wide.cache_hit_alignment_tokens
            with self._flying.activated(layout.width), kernel_blocks_of(self.model_runner):
                layout.runner.initialize_kv_cache(wide, kv_cache_allocation_context=SharedPool(pool))
            if raw_pool(layout.runner).data_ptr() != pool.data_ptr():
                raise RuntimeError(f"the layout of width {layout.width} got a KV pool of its own; it must share one")
        self._flying_transport = choose_transport(
            host_pool,
            lambda: layer_pages(self.model_runner, self._flying[1].kernel_blocks_per_page),
            self._flying_place.num_engines,
            get_world_group().cpu_group,
            settings_from_vllm_config(self.vllm_config).staging_bytes,
        )

    def compile_or_warm_up_model(self) -> Any:
        """Warm up every layout, in the same order on all workers: the wider ones meet in collectives."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        for layout in self._flying.wide:
            with self._flying.activated(layout.width):
                if current_platform.is_cpu():
                    with torch.inference_mode():
                        for num_tokens in WARM_UP_TOKENS:
                            layout.runner._dummy_run(num_tokens)
                else:
                    self._flying_with_runner(layout, super().compile_or_warm_up_model)  # type: ignore[misc]
        self._flying_probe_results = {}
        if settings_from_vllm_config(self.vllm_config).policy != "manual":
            most = self.vllm_config.scheduler_config.max_num_batched_tokens
            for layout in (self._flying[1], *self._flying.wide):
                with self._flying.activated(layout.width):
                    self._flying_probe_results[layout.width] = probe_runner(layout.runner, most)
        return times

    def flying_probes(self) -> dict[int, list[tuple[int, int, float]]]:
        """What steps cost in each layout, measured at start."""
        return self._flying_probe_results

    def _flying_with_runner(self, layout: WorkerLayout, call: Any) -> Any:
        alone = self.model_runner
        self.model_runner = layout.runner
        try:
            return call()
        finally:
            self.model_runner = alone

    # ---- steps ----------------------------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step; in a merged group the other members' workers run it too."""
        layout = self._flying.active
        if layout.width > 1:
            assert layout.relay is not None
            layout.relay.send("execute_model", scheduler_output)
            self._flying_grammar_comes = grammar_comes(scheduler_output)
            scheduler_output = layout.pages.translate(scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample after `execute_model`; in a merged group on all members alike, which wait for a grammar only."""
        layout = self._flying.active
        if layout.width > 1 and self._flying_grammar_comes:
            assert layout.relay is not None
            layout.relay.send("sample_tokens", grammar_output)
        return super().sample_tokens(grammar_output)  # type: ignore[misc]

    # ---- switch calls ---------------------------------------------------------------------------------------------

    def flying_lead(self, width: int, virtual: Pages, physical: Pages, seed: int, proving: bool) -> list[dict[str, Any]]:
        """Leading engine: act in the group of `width` from now on; with `proving`, returns the group's proof."""
        self._flying_enter(width, virtual, physical, seed)
        proof: list[dict[str, Any]] = self.flying_together("prove") if proving else []
        return proof

    def flying_follow(
        self, width: int, virtual: Pages, physical: Pages, seed: int
    ) -> tuple[Pages, Pages, list[dict[str, Any]]]:
        """Other engines: run what the leader relays until it leaves.

        Returns the virtual pages that the leader gave back, those that it wrote since the group was formed, and the
        proof of being alone again.
        """
        layout = self._flying_enter(width, virtual, physical, seed)
        assert layout.relay is not None
        leader_pid = self._flying_pids[layout.tensor_parallel_group.ranks[0]]
        while True:
            method, payload = layout.relay.receive(leader_pid)
            if method == "leave":
                returned, written = payload
                return returned, written, self._flying_leave(returned)
            if method == "execute_model":
                output = super().execute_model(layout.pages.translate(payload))  # type: ignore[misc]
                if output is None and not grammar_comes(payload):
                    super().sample_tokens(None)  # type: ignore[misc]
            elif method == "sample_tokens":
                super().sample_tokens(payload)  # type: ignore[misc]
            else:
                self._flying_do(method, payload)

    def flying_release(self, returned: Pages, written: Pages) -> list[dict[str, Any]]:
        """Leading engine: end the group; every member takes its pages behind `returned` back. Proof of being alone."""
        relay = self._flying.active.relay
        assert relay is not None
        relay.send("leave", (returned, written))
        return self._flying_leave(returned)

    def flying_memory(self) -> dict[str, Any]:
        """Bytes of weights and KV in this worker, over unique storages."""
        return memory_report(self._flying)

    def _flying_enter(self, width: int, virtual: Pages, physical: Pages, seed: int) -> WorkerLayout:
        layout = self._flying.activate(width)
        layout.pages.back_only(virtual, physical)
        self.model_runner = layout.runner
        # Unseeded sampling draws from the process's generators: all members must hold the same state.
        seed_sampling(self.device, seed)
        return layout

    def _flying_leave(self, returned: Pages) -> list[dict[str, Any]]:
        self._flying.active.pages.remove(returned)
        self.model_runner = self._flying.activate(1).runner
        return self._flying_do_prove()
