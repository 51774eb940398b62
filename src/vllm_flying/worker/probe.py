"""How long forward passes take in a layout, measured at start: what the controller knows before any request.

May import torch. Runs vLLM's own dummy passes; in a wide layout all workers run them together.
"""

from __future__ import annotations

import time
from typing import Any

import torch

# Few enough that a start is hardly longer: the fit needs a small and a large one.
PROBE_TOKENS = (1, 32, 128)
REPEATS = 2


def probe_runner(runner: Any, max_tokens: int) -> list[tuple[int, float]]:
    """(tokens, seconds) of the fastest of some dummy passes of each size."""
    results = []
    for tokens in PROBE_TOKENS:
        if tokens > max_tokens:
            break
        best = float("inf")
        for _ in range(REPEATS):
            started = time.perf_counter()
            with torch.inference_mode():
                runner._dummy_run(tokens)
            if runner.device.type != "cpu":
                torch.accelerator.synchronize()
            best = min(best, time.perf_counter() - started)
        results.append((tokens, best))
    return results
