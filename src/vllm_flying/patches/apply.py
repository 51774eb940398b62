"""Wrap functions of vLLM, all of a set or none, once per process.

Imports neither torch nor vllm by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Patch:
    """`owner.name` is replaced by `wrapper(original)`."""

    owner: Any
    name: str
    wrapper: Wrapper

    @property
    def symbol(self) -> str:
        """Full name of the wrapped function, as in the manifest."""
        owner = self.owner.__name__ if isinstance(self.owner, type) else ""
        module = self.owner.__module__ if isinstance(self.owner, type) else self.owner.__name__
        return ".".join(part for part in (module, owner, self.name) if part)


_applied: set[str] = set()


def apply_patches(patches: list[Patch]) -> None:
    """Apply every patch that this process doesn't have yet. All originals are looked up before the first is replaced."""
    wanted = [patch for patch in patches if patch.symbol not in _applied]
    replacements = [(patch, patch.wrapper(getattr(patch.owner, patch.name))) for patch in wanted]
    for patch, replacement in replacements:
        setattr(patch.owner, patch.name, replacement)
        _applied.add(patch.symbol)


def applied_patches() -> frozenset[str]:
    """Full names of the functions that are wrapped in this process."""
    return frozenset(_applied)
