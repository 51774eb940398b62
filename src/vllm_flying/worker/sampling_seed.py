"""One state of the process's random generators on all members of a group.

May import torch. Unseeded sampling draws from them, and all members must draw alike. What vLLM's `set_random_seed`
does, but for `torch.manual_seed`, which visits every backend torch knows: a millisecond of each merge.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_sampling(device: torch.device, seed: int) -> None:
    """Set Python's, numpy's, torch's and this device's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
