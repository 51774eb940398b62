"""What a parked engine's executor leaves to its leader, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_flying.executor.executor import FlyingExecutor


@pytest.fixture
def parked() -> FlyingExecutor:
    executor = FlyingExecutor.__new__(FlyingExecutor)
    executor.agent = SimpleNamespace(engine=1, group=(0, 1), workers_follow=True)  # type: ignore[assignment]
    return executor


def test_a_pause_is_completed(parked: FlyingExecutor) -> None:
    parked.collective_rpc("synchronize_device")
    parked.reset_mm_cache()
    parked.reset_encoder_cache()


def test_other_calls_are_refused(parked: FlyingExecutor) -> None:
    with pytest.raises(RuntimeError, match="parked in group"):
        parked.collective_rpc("save_sharded_state")


def test_nobody_sleeps(parked: FlyingExecutor) -> None:
    with pytest.raises(RuntimeError, match="sleep level 2 would free"):
        parked.sleep(level=2)
    with pytest.raises(RuntimeError, match="kv_cache can't be discarded"):
        parked.discard(("kv_cache",))
