"""How long steps take in a layout, measured at start: what the controller knows before any request.

May import torch. Runs vLLM's own dummy passes and the logits of those tokens that need some, which is no small part of a
step where the vocabulary is large; in a wide layout all workers run them together. Scheduling and sampling aren't seen.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from vllm_flying.controller.cost_model import PROBE_STEPS

REPEATS = 2


def probe_runner(runner: Any, max_tokens: int) -> list[tuple[int, int, float]]:
    """(prompt tokens, decoding requests, seconds) of the fastest of some steps of each kind."""
    results = []
    for prompt_tokens, decodes in PROBE_STEPS:
        if prompt_tokens + decodes > max_tokens:
            continue
        best = float("inf")
        for _ in range(REPEATS):
            started = time.perf_counter()
            with torch.inference_mode():
                hidden_states, _ = runner._dummy_run(prompt_tokens + decodes)
                runner.model.compute_logits(hidden_states[:decodes])
            if runner.device.type != "cpu":
                torch.accelerator.synchronize()
            best = min(best, time.perf_counter() - started)
        results.append((prompt_tokens, decodes, best))
    return results
