"""The layout as every API server sees it: a small file in the server's runtime directory, replaced as a whole.

Pure: no torch, no vllm. Only the switcher, who holds the lock, writes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_flying.core.topology import Group

BOARD_FILE = "layout.json"
LOCK_FILE = "switch.lock"


class SwitchPendingError(RuntimeError):
    """Another switch is under way."""


@dataclass(frozen=True)
class BoardGroup:
    """A group that serves, and the KV tokens that it can hold."""

    engines: Group
    kv_tokens: int


@dataclass(frozen=True)
class BoardState:
    """The announced layout."""

    epoch: int
    engine_tp: int
    groups: tuple[BoardGroup, ...]
    last_switch: dict[str, Any] | None = None
    has_switched: bool = False
    """Whether a switch was ever begun: requests may be with another engine than the one they were sent to."""
    since: float = 0.0
    """When these groups were formed, in seconds since 1970."""

    def to_json(self) -> str:
        """For the file."""
        groups = [{"engines": list(group.engines), "kv_tokens": group.kv_tokens} for group in self.groups]
        fields = {name: getattr(self, name) for name in ("epoch", "engine_tp", "last_switch", "has_switched", "since")}
        return json.dumps({**fields, "groups": groups})

    @classmethod
    def from_json(cls, text: str) -> BoardState:
        """From the file."""
        raw = json.loads(text)
        groups = tuple(BoardGroup(tuple(group["engines"]), group["kv_tokens"]) for group in raw["groups"])
        return cls(**{**raw, "groups": groups})


class LayoutBoard:
    """Reads the file when it has changed, which costs one `stat` otherwise."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / BOARD_FILE
        self._stamp: tuple[int, int] | None = None
        self._state: BoardState | None = None

    @property
    def exists(self) -> bool:
        """Whether a layout was announced yet."""
        return self._path.exists()

    def read(self) -> BoardState:
        """The announced layout; FileNotFoundError before the first announcement."""
        status = self._path.stat()
        stamp = (status.st_ino, status.st_mtime_ns)
        if self._state is None or stamp != self._stamp:
            self._state = BoardState.from_json(self._path.read_text())
            self._stamp = stamp
        return self._state

    def publish(self, state: BoardState) -> None:
        """Announce a layout: readers see the old one or the new one, never a part."""
        scratch = self._path.with_name(f"{BOARD_FILE}.{os.getpid()}")
        scratch.write_text(state.to_json())
        scratch.replace(self._path)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock file; BlockingIOError at once if anyone else does. Freed when its process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextmanager
def switch_lock(directory: Path) -> Iterator[None]:
    """Hold the server's switch lock; SwitchPendingError at once if anyone else does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(directory / LOCK_FILE))
        except BlockingIOError:
            raise SwitchPendingError("another switch is under way; ask again when it is over") from None
        yield
