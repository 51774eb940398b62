"""Puts the first full garbage collection off until vLLM asks for one, which it does at the end of its start.

Importing vLLM takes each of a server's processes 15 s of a core. A third of that is full collections: nine, and each looks
through all that was imported so far and frees nothing. Young objects are collected as ever. Imports neither torch nor vllm.
"""

from __future__ import annotations

import gc
from typing import Any

FAR_OFF = 1000
"""Collections of the middle generation before a full one, instead of 10: more than a start has."""


def put_full_collections_off() -> None:
    """From now until the first full collection; from then on collections are as they were."""
    usual = gc.get_threshold()
    if usual[2] >= FAR_OFF:
        return

    def restore(phase: str, information: dict[str, Any]) -> None:
        if information["generation"] == 2 and phase == "stop":
            gc.set_threshold(*usual)
            gc.callbacks.remove(restore)

    gc.callbacks.append(restore)
    gc.set_threshold(*usual[:2], FAR_OFF)
