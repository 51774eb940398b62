"""Which scheduler and which executor belong together: vLLM makes both from one config, in one process.

Pure: no torch, no vllm.
"""

from __future__ import annotations

from typing import Any

_facades: dict[int, Any] = {}
_agents: dict[int, Any] = {}


def register(vllm_config: Any, facade: Any) -> None:
    """The scheduler facade of the engine that `vllm_config` made."""
    _facades[id(vllm_config)] = facade


def register_agent(vllm_config: Any, agent: Any) -> None:
    """The agent of the engine that `vllm_config` made."""
    _agents[id(vllm_config)] = agent


def facade_of(vllm_config: Any) -> Any:
    """The scheduler facade; RuntimeError if the engine runs another scheduler class."""
    try:
        return _facades[id(vllm_config)]
    except KeyError:
        raise RuntimeError(
            "this engine does not run the scheduler of vllm-flying; leave --scheduler-cls unset, the plugin sets it"
        ) from None


def after_step(vllm_config: Any) -> None:
    """Tell the agent that a step's results are in."""
    agent = _agents.get(id(vllm_config))
    if agent is not None:
        agent.after_step()
