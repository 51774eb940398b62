"""Requests that keep arriving while a test does something else."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tests.support.server import Server


def random_prompts(seed: int, lengths: Sequence[int], vocabulary: int = 250) -> list[list[int]]:
    """Prompts of random token ids."""
    source = random.Random(seed)
    return [[source.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


class Load:
    """Clients that send requests out of a list, one after the other, until the context ends; compares every answer."""

    def __init__(
        self,
        server: Server,
        requests: Sequence[tuple[list[int], dict[str, Any]]],
        expected: Sequence[list[int]],
        clients: int = 4,
        seed: int = 0,
    ) -> None:
        self._server = server
        self._requests = requests
        self._expected = expected
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(seed + index,)) for index in range(clients)]
        self.finished = 0
        self.layouts: dict[str, int] = {}
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more; wait for what is under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def finish_sending(self) -> None:
        """Send no more; don't wait."""
        self._stop.set()

    @property
    def is_done(self) -> bool:
        """Whether every request has its answer."""
        return not any(thread.is_alive() for thread in self._threads)

    def _client(self, seed: int) -> None:
        source = random.Random(seed)
        while not self._stop.is_set():
            index = source.randrange(len(self._requests))
            prompt, options = self._requests[index]
            try:
                response = self._server.complete(prompt, **options)
            except Exception as error:
                self._note(f"request {index}: {error!r}")
                return
            if response.status_code != 200:
                self._note(f"request {index}: HTTP {response.status_code} {response.text[:300]}")
                return
            tokens = response.json()["choices"][0]["token_ids"]
            with self._lock:
                self.finished += 1
                layout = response.headers.get("x-flying-layout", "unnamed")
                self.layouts[layout] = self.layouts.get(layout, 0) + 1
            if tokens != self._expected[index]:
                self._note(f"request {index} ({layout}): {tokens} instead of {self._expected[index]}")

    def _note(self, problem: str) -> None:
        with self._lock:
            self.problems.append(problem)
