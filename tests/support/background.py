"""A completion that runs beside the test, and waiting for what the server says of its requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

from tests.support.server import Server

WAIT_S = 60.0


class Background:
    """A streamed completion in a thread."""

    def __init__(self, server: Server, prompt: list[int] | str, max_tokens: int, **options: Any) -> None:
        self.error: str | None = None
        self.text = ""
        self.finish_reason: str | None = None
        self.times: list[float] = []
        self._ids: list[int] = []
        self._begun = threading.Event()
        self._give_up = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(server, prompt, max_tokens, options))
        self._thread.start()

    def _run(self, server: Server, prompt: list[int] | str, max_tokens: int, options: dict[str, Any]) -> None:
        body = {
            "model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "stream": True, **options,
        }  # fmt: skip
        headers = body.pop("extra_headers", None)
        try:
            with server.client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                if response.status_code != 200:
                    self.error = f"HTTP {response.status_code}: {response.read().decode()[:500]}"
                    return
                for line in _lines(response):
                    if self._give_up.is_set():
                        return
                    if line.startswith(b"data: {"):
                        self._take(json.loads(line[6:]))
        except Exception as error:
            self.error = repr(error)
        finally:
            self._begun.set()

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = str(chunk["error"])
            return
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self._ids += choice.get("token_ids") or []
            self.times.append(time.monotonic())
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        self._begun.set()

    def wait_for_tokens(self) -> None:
        """Until the first tokens are here."""
        assert self._begun.wait(WAIT_S), "no token came"
        assert self.error is None, self.error

    def abort(self) -> None:
        """Close the connection when the next token comes."""
        self._give_up.set()

    @property
    def is_alive(self) -> bool:
        """Whether the stream goes on."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Until the stream is over, however it ends."""
        self._thread.join()

    def tokens(self) -> list[int]:
        """All tokens, once the stream is over without an error."""
        self._thread.join()
        assert self.error is None, self.error
        return self._ids


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Lines as server-sent events have them. httpx's own also end at U+2028 and others, which random text holds."""
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def wait_for_free_pages(server: Server, owned: int, limit_s: float) -> None:
    """Until every one of two engines owns `owned` pages by itself, all free, and none in a group."""
    wanted = [{"1": {"owned": owned, "used": 0}, "2": {"owned": 0, "used": 0}}] * 2
    deadline = time.monotonic() + limit_s
    while (pages := [engine["pages"] for engine in server.status()["engines"]]) != wanted:
        assert time.monotonic() < deadline, pages
        time.sleep(0.1)


def backed_pages(server: Server) -> list[int]:
    """Of each of two engines apart, how many pages of the group of both its worker still backs."""
    (first,), (second,) = server.client.get("/plugins/flying/memory").json()["workers"]
    return [worker["kv"]["2"]["backed_pages"] for worker in (first, second)]


def check_workers_back_nothing(server: Server) -> None:
    """Of two idle engines. A merge tells workers which pages there are: what requests that moved had is forgotten then."""
    server.switch([[0, 1]], method="drain")
    server.switch([[0], [1]], method="drain")
    assert backed_pages(server) == [0, 0]


def wait_for(server: Server, what: str, count: int) -> None:
    """Until the groups together report `count` requests `what` (running, waiting, paused)."""
    deadline = time.monotonic() + WAIT_S
    while sum(group[what] for group in server.status()["groups"]) != count:
        assert time.monotonic() < deadline, server.status()
        time.sleep(0.02)
