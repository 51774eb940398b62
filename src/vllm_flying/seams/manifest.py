"""The manifest: each vLLM symbol used, the parameters relied on, and what for.

Pure data: no torch, no vllm. `seams.source_check` checks it against any vLLM source tree; a test checks that every
import of vLLM in this package is listed here.
"""

from __future__ import annotations

from dataclasses import dataclass

SUPPORTED = ((0, 32), (0, 34))
"""First supported (major, minor), and the first that isn't any more."""


@dataclass(frozen=True)
class Symbol:
    """`module:name`, where name may be `Class.member`; `parameters` must all be in its signature."""

    module: str
    name: str
    used_for: str
    parameters: tuple[str, ...] = ()
    moved_to: str | None = None
    """Module that has it in later versions."""


@dataclass(frozen=True)
class PatchedSymbol:
    """A function of vLLM's that is wrapped: why no seam serves, what guards it, which test shows it."""

    symbol: Symbol
    reason: str
    guard: str
    test: str


@dataclass(frozen=True)
class ReplacedSymbol:
    """Something of vLLM's that is set to another value: when and why, where and under what guard, which test shows it."""

    module: str
    names: str
    reason: str
    guard: str
    test: str


def _group(module: str, used_for: str, *names: str) -> list[Symbol]:
    """`names` may have the parameters relied on behind them: `Worker.execute_model(scheduler_output)`."""
    parted = ((name, parameters.rstrip(")")) for name, _, parameters in (name.partition("(") for name in names))
    return [Symbol(module, name, used_for, tuple(parameters.split(", ")) if parameters else ()) for name, parameters in parted]


PATCHED = [
    PatchedSymbol(
        Symbol("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "enabling by one flag", ("self",)),
        "one flag must stand for four; vLLM offers plugins no hook between arguments and config",
        "acts only if worker_extension_cls names this plugin; sets arguments, then calls vLLM's function",
        "tests/engine/test_enabling.py",
    ),
    PatchedSymbol(
        Symbol("vllm.v1.engine.async_llm", "AsyncLLM._add_request", "admission", ("self", "request")),
        "a request that no group can hold must be refused before vLLM registers it, and a hint may form a group first",
        "acts only for engine clients of a server with the plugin enabled",
        "tests/engine/test_two_engines.py",
    ),
    PatchedSymbol(
        Symbol("vllm.v1.engine.core_client", "DPAsyncMPClient.add_request_async", "admission", ("self", "request")),
        "with n > 1 vLLM sends the answers' requests without AsyncLLM._add_request, and takes all back if one is refused",
        "admits what was not admitted before, then calls vLLM's function",
        "tests/engine/test_two_engines.py",
    ),
    PatchedSymbol(
        Symbol(
            "vllm.v1.engine.core_client", "DPLBAsyncMPClient.get_core_engine_for_request", "routing", ("self", "request")
        ),
        "vLLM balances over all engines; parked ones take no requests",
        "sets the request's data_parallel_rank, vLLM's own way to choose an engine, then calls vLLM's function",
        "tests/engine/test_four_engines.py",
    ),
    PatchedSymbol(
        Symbol("vllm.v1.engine.core_client", "DPLBAsyncMPClient.abort_requests_async", "aborts", ("self", "request_ids")),
        "vLLM aborts at the engine that a request was sent to; a switch may have handed it to another",
        "until the first switch vLLM's function runs; engines ignore ids they don't know",
        "tests/engine/test_two_engines.py",
    ),
    PatchedSymbol(
        Symbol(
            "vllm.v1.core.kv_cache_utils", "_check_enough_kv_cache_memory", "context longer than one engine's KV",
            ("available_memory", "get_needed_memory", "max_model_len", "estimate_max_model_len"),
            moved_to="vllm.v1.core.kv_cache_planning",
        ),
        "a context that fits only a merged group is refused at start, before any request",
        "applied in engines of a server with the plugin enabled; admission checks each request instead",
        "tests/engine/test_two_engines.py",
    ),
]  # fmt: skip

REPLACED = [
    ReplacedSymbol(
        "vllm.distributed.parallel_state", "_TP, _PP, _DP, _EP, _DCP, _PCP, _ETP, _ENGRAM_DP, _EPLB",
        "at every switch: the globals that models and runners read their communicators from",
        "`worker/communicators`: all of them at once, values that vLLM's own functions made at start",
        "tests/engine/test_four_engines.py",
    ),
    ReplacedSymbol(
        "vllm.v1.attention.backend", "AttentionBackend.get_supported_kernel_block_sizes",
        "at start, while wider layouts make their KV views: the kernel block keeps its size in all layouts",
        "`worker/kv_views`: put back afterwards; another kernel block size is refused",
        "tests/engine/test_four_engines.py",
    ),
    ReplacedSymbol(
        "vllm.v1.worker.utils", "allocate_kv_cache",
        "at start: its `torch.zeros` of int8 is given the pool that is there, by a TorchFunctionMode",
        "`worker/extension`: a pool at another address than the first layout's refuses to start",
        "tests/engine/test_four_engines.py",
    ),
    ReplacedSymbol(
        "vllm.model_executor.layers.linear", "LinearBase.quant_method",
        "at start: layers multiply by tiles, or by a range of the resident weight; vLLM's own place for that",
        "`loader/cutting`, `loader/binding`: layers of other kinds or with quantised weights are refused by name",
        "tests/engine/test_families.py",
    ),
    ReplacedSymbol(
        "vllm.config.compilation", "CompilationConfig.inductor_compile_config",
        "at start: a pass of ours under `post_grad_custom_post_pass`, vLLM's own place for passes",
        "`compilation/concatenation`: a pass that the user put there stays instead",
        "tests/engine/test_packing.py",
    ),
]
"""What is set on vLLM's own modules and objects, beside wraps."""

USED = [
    # Enabling and start-up
    Symbol("vllm.engine.arg_utils", "EngineArgs", "enabling by one flag"),
    *_group("vllm.engine.arg_utils", "flags set on the arguments", "EngineArgs.worker_cls", "EngineArgs.scheduler_cls",
            "EngineArgs.distributed_executor_backend", "EngineArgs.load_format", "EngineArgs.worker_extension_cls",
            "EngineArgs.additional_config", "EngineArgs.data_parallel_size", "EngineArgs.tensor_parallel_size"),
    Symbol("vllm.engine.arg_utils", "EngineArgs.get_batch_defaults", "limits of a group where none were set", ("world_size",)),
    *_group("vllm.engine.arg_utils", "arguments that exclude switching", "EngineArgs.data_parallel_external_lb",
            "EngineArgs.data_parallel_hybrid_lb", "EngineArgs.data_parallel_rank", "EngineArgs.data_parallel_backend",
            "EngineArgs.data_parallel_size_local", "EngineArgs.nnodes", "EngineArgs.pipeline_parallel_size",
            "EngineArgs.decode_context_parallel_size", "EngineArgs.prefill_context_parallel_size",
            "EngineArgs.enable_lora", "EngineArgs.enable_sleep_mode", "EngineArgs.speculative_config"),
    *_group("vllm.entrypoints.cli.serve", "vllm-flying serve", "cmd_init", "ServeSubcommand.subparser_init(subparsers)",
            "ServeSubcommand.validate(args)", "ServeSubcommand.cmd(args)"),
    Symbol("vllm.utils.argparse_utils", "FlexibleArgumentParser", "vllm-flying serve"),
    *_group("vllm.config", "configs per layout", "VllmConfig", "ModelConfig", "set_current_vllm_config"),
    *_group("vllm.config.vllm", "parts of the config", *(f"VllmConfig.{name}" for name in (
        "model_config", "cache_config", "parallel_config", "scheduler_config", "load_config", "compilation_config",
        "additional_config", "kv_transfer_config", "ec_transfer_config", "kv_events_config"))),
    *_group("vllm.config.model", "what a model needs, and whether it is supported", *(f"ModelConfig.{name}" for name in (
        "architecture", "dtype", "hf_text_config", "max_model_len", "quantization", "runner_type", "seed", "is_moe",
        "use_mla", "is_hybrid", "is_attention_free", "is_encoder_decoder", "is_multimodal_model", "get_total_num_kv_heads",
        "get_head_size", "get_total_num_hidden_layers", "get_sliding_window", "head_dtype"))),
    *_group("vllm.config.parallel", "configs per layout", "ParallelConfig.tensor_parallel_size", "ParallelConfig.world_size",
            "ParallelConfig.data_parallel_index"),
    *_group("vllm.config.scheduler", "one scheduler per width", "SchedulerConfig.async_scheduling",
            "SchedulerConfig.max_num_batched_tokens", "SchedulerConfig.max_num_seqs"),
    *_group("vllm.config.cache", "configs per layout", "CacheConfig.block_size", "CacheConfig.num_gpu_blocks",
            "CacheConfig.hash_block_size", "CacheConfig.cache_hit_alignment_tokens", "CacheConfig.kv_cache_layout",
            "CacheConfig.prefix_caching_hash_algo"),
    *_group("vllm.config.compilation", "configs per layout", "CompilationConfig.static_forward_context",
            "CompilationConfig.compile_ranges_endpoints", "CompilationConfig.inductor_compile_config"),
    Symbol("vllm.compilation.passes.inductor_pass", "InductorPass", "a pass over compiled graphs"),
    Symbol("vllm.compilation.passes.inductor_pass", "InductorPass.hash_source", "key of compiled graphs"),
    Symbol("vllm.config.kv_events", "KVEventsConfig.enable_kv_cache_events", "refused at start"),
    *_group("vllm.config.load", "load formats", "LoadConfig", "LoadConfig.load_format"),
    *_group("vllm.platforms.interface", "CPU or GPU", "Platform.is_cpu", "Platform.pass_key", "Platform.dist_backend", "Platform.device_name"),
    Symbol("vllm", "envs", "API key"),
    Symbol("vllm.envs", "VLLM_API_KEY", "API key"),
    Symbol("vllm.logger", "init_logger", "logging under vllm.", ("name",)),
    Symbol("vllm.platforms", "current_platform", "CPU or GPU"),
    Symbol("vllm.version", "__version__", "the supported window"),
    # Worker
    *_group("vllm.v1.worker.cpu_worker", "worker on CPU", "CPUWorker", "CPUWorker.init_device",
            "CPUWorker.determine_available_memory", "CPUWorker.compile_or_warm_up_model",
            "CPUWorker._should_warm_up_model"),
    *_group("vllm.v1.worker.gpu_worker", "worker", "Worker", "Worker.init_device", "Worker.load_model",
            "Worker.initialize_from_config(kv_cache_config)", "Worker.execute_model(scheduler_output)", "Worker.sample_tokens(grammar_output)",
            "Worker.compile_or_warm_up_model"),
    Symbol("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.warming_up_model", "warm-up of each layout"),
    *_group("vllm.v1.worker.gpu_model_runner", "Model Runner V1", "GPUModelRunner._kernel_block_sizes",
            "GPUModelRunner.attn_groups", "GPUModelRunner.kv_cache_config", "GPUModelRunner._dummy_run(num_tokens)",
            "GPUModelRunner.kv_caches", "GPUModelRunner.model", "GPUModelRunner.load_model",
            "GPUModelRunner.requests", "GPUModelRunner.num_prompt_logprobs", "GPUModelRunner.input_batch",
            "GPUModelRunner._on_request_state_removed(req_id, req_state)"),
    *_group("vllm.v1.worker.gpu_input_batch", "begun requests between workers", "CachedRequestState",
            "CachedRequestState.block_ids", "InputBatch.remove_request(req_id)"),
    Symbol("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.initialize_kv_cache", "one KV pool for all layouts",
           ("self", "kv_cache_config", "kv_cache_allocation_context")),
    *_group("vllm.v1.worker.gpu.model_runner", "Model Runner V2", "GPUModelRunner.kernel_block_sizes",
            "GPUModelRunner.attn_groups", "GPUModelRunner.kv_cache_config", "GPUModelRunner._dummy_run(num_tokens)",
            "GPUModelRunner.kv_caches", "GPUModelRunner.model", "GPUModelRunner.load_model",
            "GPUModelRunner._remove_request(req_id)"),
    Symbol("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.initialize_kv_cache", "one KV pool for all layouts",
           ("self", "kv_cache_config", "kv_cache_allocation_context")),
    Symbol("vllm.v1.worker.utils", "AttentionGroup.backend", "one kernel block size"),
    Symbol("vllm.v1.worker.utils", "allocate_kv_cache", "allocates by one torch.zeros of int8", ("kv_cache_config", "device")),
    Symbol("vllm.v1.attention.backend", "AttentionBackend.get_supported_kernel_block_sizes", "one kernel block size", ("kv_cache_spec",)),
    *_group("vllm.v1.kv_cache_interface", "page geometry", "KVCacheConfig", "KVCacheConfig.num_blocks",
            "KVCacheConfig.kv_cache_groups", "KVCacheConfig.kv_cache_tensors", "KVCacheTensor.size",
            "KVCacheConfig.hash_block_size",
            "KVCacheGroupSpec.kv_cache_spec", "KVCacheGroupSpec.layer_names", "KVCacheConfig.cache_hit_alignment_tokens", "FullAttentionSpec", "AttentionSpec.num_kv_heads",
            "KVCacheSpec.block_size", "KVCacheSpec.page_size_bytes"),
    *_group("vllm.v1.core.sched.output", "page numbers in a step", "SchedulerOutput.scheduled_new_reqs",
            "SchedulerOutput.scheduled_cached_reqs", "SchedulerOutput.new_block_ids_to_zero",
            "SchedulerOutput.kv_cache_block_copies", "NewRequestData.block_ids", "CachedRequestData.new_block_ids"),
    *_group("vllm.v1.core.sched.output", "whether a grammar follows a step", "SchedulerOutput.has_structured_output_requests"),
    *_group("vllm.v1.core.sched.output", "what a step costs", "SchedulerOutput.num_scheduled_tokens",
            "SchedulerOutput.total_num_scheduled_tokens"),
    *_group("vllm.distributed.parallel_state", "communicator pool", "_TP", "_PP", "_DP", "_EP", "_DCP", "_PCP", "_ETP",
            "_ENGRAM_DP", "_EPLB", "get_world_group", "GroupCoordinator", "GroupCoordinator.mq_broadcaster",
            "GroupCoordinator.rank_in_group", "GroupCoordinator.ranks", "GroupCoordinator.world_size",
            "GroupCoordinator.local_rank", "GroupCoordinator.unique_name", "GroupCoordinator.cpu_group",
            "GroupCoordinator.device_group", "GroupCoordinator.all_gather(input_, dim)"),
    Symbol("vllm.distributed", "parallel_state", "communicator pool"),
    Symbol("vllm.distributed.parallel_state", "get_tensor_model_parallel_rank", "position in a group"),
    Symbol("vllm.distributed.parallel_state", "init_distributed_environment", "one world of all workers",
           ("world_size", "rank", "distributed_init_method", "local_rank", "backend", "timeout")),
    Symbol("vllm.distributed.parallel_state", "initialize_model_parallel", "groups of one member",
           ("tensor_model_parallel_size", "backend")),
    Symbol("vllm.distributed.parallel_state", "init_model_parallel_group", "tensor-parallel groups",
           ("group_ranks", "local_rank", "backend", "use_message_queue_broadcaster", "group_name")),
    Symbol("vllm.distributed.device_communicators.shm_broadcast", "MessageQueue.enqueue", "relay", ("self", "obj")),
    Symbol("vllm.distributed.device_communicators.shm_broadcast", "MessageQueue.dequeue", "relay", ("self", "timeout")),
    Symbol("vllm.utils.torch_utils", "set_random_seed", "equal sampling state", ("seed",)),
    # Weights
    *_group("vllm.model_executor.model_loader", "load formats", "register_model_loader(load_format)", "get_model_loader(load_config)"),
    *_group("vllm.model_executor.model_loader.base_loader", "load formats", "BaseModelLoader",
            "BaseModelLoader.load_model(vllm_config, model_config, prefix)", "BaseModelLoader.load_weights(model, model_config)", "BaseModelLoader.download_model(model_config)"),
    Symbol("vllm.model_executor.model_loader.utils", "initialize_model", "models of wider layouts",
           ("vllm_config", "model_config", "prefix")),
    Symbol("vllm.model_executor.model_loader.weight_tying", "maybe_retie_word_embeddings", "tied output heads", ("model", "model_config")),
    Symbol("vllm.model_executor.layers.attention", "is_deferred_attention_layer", "attention scales", ("layer",)),
    *_group("vllm.model_executor.layers.linear", "layers that are cut", "LinearBase", "ColumnParallelLinear",
            "RowParallelLinear", "ReplicatedLinear", "LinearMethodBase", "UnquantizedLinearMethod",
            "ColumnParallelLinear.output_partition_sizes", "RowParallelLinear.input_size_per_partition",
            "LinearBase.disable_tp", "LinearBase.quant_method", "LinearBase.tp_rank", "LinearBase.tp_size",
            "LinearMethodBase.apply(layer, x, bias)"),
    *_group("vllm.model_executor.layers.quantization.base_config", "layers that are cut", "QuantizeMethodBase.apply",
            "QuantizeMethodBase.process_weights_after_loading(layer)"),
    *_group("vllm.model_executor.layers.vocab_parallel_embedding", "vocabulary layers", "VocabParallelEmbedding",
            "ParallelLMHead", "UnquantizedEmbeddingMethod", "VocabParallelEmbedding.num_embeddings_per_partition",
            "VocabParallelEmbedding.output_partition_sizes", "VocabParallelEmbedding.quant_method",
            "VocabParallelEmbedding.tp_size"),
    *_group("vllm.model_executor.layers.logits_processor", "whether logits are used as they are", "LogitsProcessor",
            "LogitsProcessor.scale", "LogitsProcessor.soft_cap"),
    Symbol("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", "packing of tiles",
           ("layer", "remove_weight")),
    Symbol("vllm._custom_ops", "weight_packed_linear_cpu", "tiles in blocks", ("x", "packed_weight", "n", "bias")),
    Symbol("vllm.utils.torch_utils", "direct_register_custom_op", "tiles in blocks",
           ("op_name", "op_func", "fake_impl", "target_lib", "dispatch_key")),
    Symbol("vllm.utils.torch_utils", "set_default_torch_dtype", "models of wider layouts", ("dtype",)),
    # Engine
    *_group("vllm.v1.executor.multiproc_executor", "control calls", "MultiprocExecutor",
            "MultiprocExecutor._init_executor", "MultiprocExecutor.shutdown", "MultiprocExecutor.is_failed",
            "MultiprocExecutor.shutting_down"),
    *_group("vllm.v1.executor.abstract", "pausing in a merged layout", "Executor.sleep(level)", "Executor.discard(tags)",
            "Executor.reset_mm_cache", "Executor.reset_encoder_cache"),
    Symbol("vllm.v1.worker.worker_base", "WorkerBase.synchronize_device", "pausing in a merged layout"),
    Symbol("vllm.v1.executor.multiproc_executor", "MultiprocExecutor.collective_rpc", "control calls",
           ("self", "method", "timeout", "args", "kwargs", "non_block")),
    *_group("vllm.v1.core.sched.interface", "the facade", "SchedulerInterface", "PauseState", "PauseState.UNPAUSED",
            *(f"SchedulerInterface.{name}" for name in (
                "schedule(throttle_prefills)", "get_grammar_bitmask(scheduler_output)", "update_from_output(scheduler_output, model_runner_output)", "update_draft_token_ids(draft_token_ids)",
                "update_draft_token_ids_in_output(draft_token_ids, scheduler_output)", "add_request(request)", "finish_requests(request_ids, finished_status)", "get_num_unfinished_requests",
                "has_unfinished_requests", "has_finished_requests", "has_requests", "pause_state", "set_pause_state(pause_state)",
                "reset_prefix_cache(reset_running_requests, reset_connector)", "reset_encoder_cache", "get_request_counts", "get_kv_cache_usage", "make_stats",
                "shutdown", "get_kv_event_publisher_config"))),
    *_group("vllm.v1.core.sched.scheduler", "one scheduler per width", "Scheduler", "Scheduler.requests",
            "Scheduler.running", "Scheduler.waiting", "Scheduler.deferred_waiting", "Scheduler.kv_cache_manager",
            "Scheduler.block_size", "Scheduler.finished_req_ids_dict", "Scheduler.kv_holding_waiting",
            "Scheduler._inflight_prefills", "Scheduler._enqueue_waiting_request(request)",
            "Scheduler.prev_step_scheduled_req_ids", "Scheduler.pause_state",
            "Scheduler.reset_preempted_req_ids", "Scheduler.use_v2_model_runner", "Scheduler.max_num_running_reqs"),
    Symbol("vllm.v1.core.sched.request_queue", "RequestQueue.remove_requests", "requests kept aside", ("requests",)),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler._preempt_request", "urgent requests find pages",
           ("self", "request", "timestamp", "drop_stale_output")),
    *_group("vllm.v1.core.kv_cache_manager", "begun requests find pages", "KVCacheManager.get_block_ids(request_id)",
            "KVCacheManager.get_blocks(request_id)", "KVCacheManager.get_computed_blocks(request)", "KVCacheManager.free(request)",
            "KVCacheManager.empty_kv_cache_blocks", "KVCacheManager.block_pool", "KVCacheManager.evict_blocks(block_ids)"),
    Symbol("vllm.v1.core.kv_cache_manager", "KVCacheManager.allocate_slots", "begun requests find pages",
           ("self", "request", "num_new_tokens", "num_new_computed_tokens", "new_computed_blocks",
            "has_scheduled_reqs")),
    *_group("vllm.v1.engine", "begun requests between engines", "EngineCoreEventType", "EngineCoreEvent.type"),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler.__init__", "one scheduler per width",
           ("vllm_config", "kv_cache_config", "structured_output_manager", "block_size", "hash_block_size")),
    Symbol("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "one scheduler per width"),
    *_group("vllm.v1.core.block_pool", "pages change hands", "BlockPool", "BlockPool.blocks",
            "BlockPool.free_block_queue", "BlockPool.num_gpu_blocks", "BlockPool.get_num_free_blocks",
            "BlockPool._maybe_evict_cached_block(block)", "BlockPool._reuse_watchers", "BlockPool.touch(blocks)",
            "BlockPool.free_blocks(ordered_blocks)", "BlockPool.evict_blocks(block_ids)", "BlockPool.null_block",
            "BlockPool.cache_full_blocks(request, blocks, num_cached_blocks, num_full_blocks, block_size, kv_cache_group_id)"),
    *_group("vllm.v1.core.sched.output", "hot prefixes", "NewRequestData.req_id", "NewRequestData.num_computed_tokens"),
    Symbol("vllm.v1.metrics.stats", "PrefillStats.num_cached_tokens", "hot prefixes"),
    *_group("vllm.v1.request", "hot prefixes", "Request.prefill_stats", "Request.cache_salt",
            "Request.prompt_token_ids", "Request.prompt_embeds", "Request.mm_features", "Request.lora_request",
            "Request.all_token_ids", "Request.skip_reading_prefix_cache"),
    Symbol("vllm.sampling_params", "SamplingParams", "hot prefixes"),
    *_group("vllm.v1.core.kv_cache_utils", "pages change hands", "FreeKVCacheBlockQueue.popleft_n(n)",
            "FreeKVCacheBlockQueue.append_n(blocks)", "FreeKVCacheBlockQueue.get_all_free_blocks",
            "FreeKVCacheBlockQueue.remove(block)", "KVCacheBlock", "KVCacheBlock.block_hash", "KVCacheBlock.block_id",
            "KVCacheBlock.ref_cnt"),
    Symbol("vllm.v1.core.kv_cache_utils", "resolve_kv_cache_block_sizes", "block sizes per width",
           ("kv_cache_config", "vllm_config")),
    Symbol("vllm.v1.core.kv_cache_utils", "get_request_block_hasher", "prefix hashes per width", ("hash_block_size", "caching_hash_fn")),
    Symbol("vllm.utils.hashing", "get_hash_fn_by_name", "prefix hashes per width", ("hash_fn_name",)),
    *_group("vllm.v1.request", "requests between engines", "Request", "Request._block_hasher", "Request.block_hashes",
            "Request.update_block_hashes", "Request.num_computed_tokens", "Request.structured_output_request",
            "RequestStatus", "Request.events", "Request.last_sched_seq", "Request.next_decode_eligible_step",
            "Request.num_output_tokens", "Request.num_preemptions",
            "Request.num_in_flight_tokens", "Request.arrival_time", "Request.max_tokens",
            "Request.request_id", "Request.status", "Request.is_finished", "Request.priority", "Request.num_tokens",
            "Request.num_prompt_tokens", "Request.sampling_params", "Request.output_token_ids",
            *(f"RequestStatus.{name}" for name in ("WAITING", "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", "RUNNING",
                                                   "PREEMPTED", "FINISHED_ABORTED")),
            "Request._output_token_ids", "Request._all_token_ids", "Request.append_output_token_ids(token_ids)"),
    Symbol("vllm.v1.structured_output", "StructuredOutputManager", "the facade"),
    Symbol("vllm.v1.structured_output", "StructuredOutputManager.grammar_init", "grammars between engines", ("request",)),
    *_group("vllm.v1.structured_output.request", "grammars between engines", "StructuredOutputRequest.is_grammar_ready",
            "StructuredOutputRequest.grammar", "StructuredOutputRequest.reasoning_ended",
            "StructuredOutputRequest.reasoning_parser_kwargs"),
    Symbol("vllm.v1.structured_output", "StructuredOutputManager.accept_tokens", "grammars between engines",
           ("request", "new_token_ids")),
    Symbol("vllm.v1.structured_output.request", "StructuredOutputRequest.from_sampling_params",
           "grammars between engines", ("sampling_params",)),
    Symbol("vllm.v1.structured_output.request", "StructuredOutputRequest", "grammars between engines"),
    Symbol("vllm.sampling_params", "SamplingParams.max_tokens", "how long a request may get"),
    Symbol("vllm.sampling_params", "SamplingParams.extra_args", "hints"),
    Symbol("vllm.sampling_params", "SamplingParams.prompt_logprobs", "begun requests between engines"),
    # Front end
    *_group("vllm.v1.engine.async_llm", "admission", "AsyncLLM", "AsyncLLM.engine_core", "AsyncLLM.vllm_config"),
    *_group("vllm.v1.engine.core_client", "routing", "DPLBAsyncMPClient", "DPLBAsyncMPClient.reqs_in_flight",
            "DPLBAsyncMPClient.engine_inflight", "DPLBAsyncMPClient.client_count", "DPLBAsyncMPClient._abort_requests(request_ids, engine)",
            "MPClient.core_engines", "MPClient.resources", "BackgroundResources.engine_dead", "AsyncMPClient._call_utility_async(method, engine)", "DPAsyncMPClient.lb_engines"),
    *_group("vllm.v1.engine", "routing", "EngineCoreRequest.prompt_token_ids", "EngineCoreRequest.sampling_params",
            "EngineCoreRequest.data_parallel_rank", "EngineCoreRequest.cache_salt", "EngineCoreRequest.resumable",
            "EngineCoreRequest.request_id", "EngineCoreRequest.priority"),
    Symbol("vllm.config.cache", "CacheConfig.enable_prefix_caching", "routing by prefix"),
    Symbol("vllm.exceptions", "VLLMValidationError", "refusals", ("message", "parameter", "value")),
    Symbol("vllm.entrypoints.serve.middleware.authenticate", "AuthenticationMiddleware.verify_token", "API key",
           ("self", "headers")),
    Symbol("vllm.entrypoints.serve.middleware.authenticate", "AuthenticationMiddleware", "API key"),
    Symbol("vllm.plugins.endpoint_plugins.interface", "EndpointPlugin", "HTTP routes"),
    Symbol("vllm.tracing.otel", "is_otel_available", "a span per switch"),
    Symbol("vllm.tracing", "init_tracer", "sets the tracer provider that spans go to",
           ("instrumenting_module_name", "otlp_traces_endpoint")),
]  # fmt: skip


def all_symbols() -> list[Symbol]:
    """Every symbol, patched or used."""
    return [patched.symbol for patched in PATCHED] + USED
