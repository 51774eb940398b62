"""Which layouts served the HTTP request at hand.

Pure: no torch, no vllm. The middleware opens a record for each HTTP request; the router, which runs in the same
context, adds the group of every engine request made for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm_flying.core.topology import Group


@dataclass
class ServedLayouts:
    """Groups that took the requests of one HTTP call, without repetition, in order."""

    layouts: list[tuple[Group, int]] = field(default_factory=list)
    """(engines, tensor-parallel degree)"""
    on_add: Callable[[], None] | None = None
    """Called after every change."""

    def add(self, engines: Group, degree: int) -> None:
        """Note a group."""
        if (engines, degree) not in self.layouts:
            self.layouts.append((engines, degree))
            if self.on_add is not None:
                self.on_add()

    def header(self) -> str:
        """Value of `x-flying-layout`, such as `tp2; engines=0,1`."""
        return " | ".join(f"tp{degree}; engines={','.join(map(str, engines))}" for engines, degree in self.layouts)


served_layouts: ContextVar[ServedLayouts | None] = ContextVar("served_layouts", default=None)
