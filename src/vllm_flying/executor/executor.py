"""vLLM's multiprocess executor with a control call.

May import vllm. The front end reaches an engine through vLLM's `collective_rpc` utility, which runs on the engine's
main thread between steps; calls of the name `CONTROL` are for the engine itself and end here, all others go to the
workers as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_flying.executor import CONTROL
from vllm_flying.patches.apply import apply_patches
from vllm_flying.patches.kv_check import kv_check_patches
from vllm_flying.scheduler.agent import EngineAgent
from vllm_flying.settings import settings_from_vllm_config

logger = init_logger("vllm.flying.executor")

LEFT_TO_THE_LEADER = ("synchronize_device", "reset_mm_cache", "reset_encoder_cache")
"""What vLLM calls when a pause is complete. Followers wait for their leader's next step, and it has none any more; the
two caches are those of models that are refused at start."""


class FlyingExecutor(MultiprocExecutor):
    """One engine's workers and its agent."""

    def _init_executor(self) -> None:
        settings = settings_from_vllm_config(self.vllm_config)
        apply_patches(kv_check_patches(max(settings.built_widths(), default=1)))
        super()._init_executor()
        self.agent = EngineAgent(self.vllm_config, settings, self._call_workers)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """As vLLM's; refused while the workers follow another engine, since they would answer after the split only."""
        if method == CONTROL:
            operation, arguments = args
            return self.agent.handle(operation, arguments)
        agent: EngineAgent | None = getattr(self, "agent", None)
        if agent is not None and agent.workers_follow:
            if method in LEFT_TO_THE_LEADER:
                return []
            raise RuntimeError(
                f"engine {agent.engine} is parked in group {list(agent.group)}: its workers follow engine "
                f"{agent.group[0]}. Split the group first, or call {method!r} on a server without merged groups."
            )
        return super().collective_rpc(method, timeout, args, kwargs, **options)

    def sleep(self, level: int = 1) -> None:
        """Refused, as `--enable-sleep-mode` is at start. vLLM has paused the engine by now."""
        raise RuntimeError(
            f"sleep level {level} would free the weights and the KV pool that all layouts share. The server is paused "
            "now, as by POST /pause (and sleep level 0), which it can be; POST /resume lets it go on."
        )

    def discard(self, tags: tuple[str, ...]) -> None:
        """Refused likewise."""
        raise RuntimeError(f"{', '.join(tags)} can't be discarded: all layouts share it. The server stays paused.")

    def _call_workers(self, method: str, args: tuple[Any, ...] = (), non_block: bool = False) -> Any:
        return super().collective_rpc(method, None, args, None, non_block=non_block)

    def shutdown(self) -> None:
        """Let followers go first: they wait on the group's queue, not on this executor's."""
        agent: EngineAgent | None = getattr(self, "agent", None)
        if agent is not None and not getattr(self, "shutting_down", False) and not self.is_failed:
            agent.let_followers_go()
        super().shutdown()
