"""`--worker-extension-cls vllm_flying.WorkerExtension` stands for the flags that the plugin needs.

May import vllm. Wraps EngineArgs.create_engine_config: the flags are set on the arguments, as if the user had given
them, before vLLM reads them; without the extension the call goes through untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger

from vllm_flying.frontend.runtime import ensure_runtime_directory
from vllm_flying.patches.apply import Patch
from vllm_flying.patches.supported import NotSupportedError, check_arguments, check_config
from vllm_flying.seams.runtime_check import check_installed
from vllm_flying.settings import Settings
from vllm_flying.worker.batch_limits import LIMITS

logger = init_logger("vllm.flying")

EXTENSIONS = ("vllm_flying.WorkerExtension", "vllm_flying.worker.extension.WorkerExtension")
FLAGS = {
    "worker_cls": "vllm_flying.worker.worker.FlyingWorker",
    "scheduler_cls": "vllm_flying.scheduler.facade.FlyingScheduler",
    "distributed_executor_backend": "vllm_flying.executor.executor.FlyingExecutor",
    "load_format": "flying",
}
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "worker_cls": ("auto",),
    "scheduler_cls": (None,),
    "distributed_executor_backend": (None, "mp"),
}


def is_enabled(arguments: Any) -> bool:
    """Whether these engine arguments ask for the plugin."""
    return getattr(arguments, "worker_extension_cls", None) in EXTENSIONS


def _wrap(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create_engine_config)
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_enabled(self) or not _prepare(self):
            return create_engine_config(self, *args, **kwargs)
        config = create_engine_config(self, *args, **kwargs)
        check_config(config)
        return config

    return create


def _prepare(arguments: Any) -> bool:
    """Set the plugin's flags; False if there is nothing to merge and vLLM should run as if alone."""
    given = dict((arguments.additional_config or {}).get("flying", {}))
    settings = Settings.from_mapping(given)
    if not settings.enabled or arguments.data_parallel_size == 1:
        why = "its setting `enabled` is false" if not settings.enabled else "--data-parallel-size is 1: nothing to merge"
        logger.warning("vllm-flying stays out of this server: %s.", why)
        arguments.worker_extension_cls = ""
        return False
    check_installed()
    check_arguments(arguments)
    for name, value in FLAGS.items():
        present = getattr(arguments, name)
        if name in DEFAULTS and present not in (*DEFAULTS[name], value):
            raise NotSupportedError(
                f"--{name.replace('_', '-')} {present} can't be combined with vllm-flying, which brings its own; "
                "leave the flag out"
            )
    if arguments.load_format != FLAGS["load_format"]:
        given["load_format"] = str(arguments.load_format)
    given["num_engines"] = arguments.data_parallel_size
    given["engine_tp"] = arguments.tensor_parallel_size
    for limit in LIMITS:  # asked again, the arguments have vLLM's defaults for them
        given.setdefault(f"{limit}_given", getattr(arguments, limit) is not None)
    Settings.from_mapping(given)  # refuses widths that this number of engines can't have
    arguments.additional_config = {**(arguments.additional_config or {}), "flying": given}
    for name, value in FLAGS.items():
        setattr(arguments, name, value)
    ensure_runtime_directory()
    from vllm_flying.patches.apply import apply_patches
    from vllm_flying.patches.frontend import frontend_patches

    apply_patches(frontend_patches())
    return True


def engine_args_patches() -> list[Patch]:
    """What every process with the plugin installed applies."""
    return [Patch(EngineArgs, "create_engine_config", _wrap)]
