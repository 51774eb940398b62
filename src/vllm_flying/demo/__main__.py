"""The demo: chats before, during and after merges and splits.

Ends by itself in a few minutes, stops its server and removes its files. Exit status 0 only if every chat was answered
and every switch committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live

from vllm_flying.demo.chats import Chat, stream_chat
from vllm_flying.demo.checkpoint import make_checkpoint
from vllm_flying.demo.server import DemoServer, ServerStartError
from vllm_flying.demo.table import COLUMNS, rows, table

DP, TP = [[0], [1]], [[0, 1]]
QUESTIONS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Name three uses of a paper clip.",
    "Write a short poem about the sea.",
]
MAX_TOKENS = 48
# For chats to finish on a machine that has much else to do.
SWITCH_LIMIT_S = 100.0
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-flying-demo"


class Demo:
    """Runs the phases against one server."""

    def __init__(self, server: DemoServer, console: Console) -> None:
        self._server = server
        self._console = console
        self._client = httpx.AsyncClient(base_url=server.url, timeout=120.0, trust_env=False)
        self.chats: list[Chat] = []
        self.seconds: dict[str, float] = {}
        self.records: list[dict[str, Any]] = []

    async def run(self) -> None:
        """All phases, one after the other."""
        live = Live(get_renderable=lambda: table(self.chats, self.seconds), console=self._console, refresh_per_second=4)
        with live if self._console.is_terminal else contextlib.nullcontext():
            await self._phase("engines apart (DP)", count=4)
            await self._switch(TP)
            await self._phase("merged (TP), busy", count=4)
            await self._phase("merged (TP), alone", count=1)
            await self._switch(DP)
            await self._phase("switching under load", count=4, switches=(TP, DP, TP, DP))
            await self._phase("engines apart again", count=4)
        await self._client.aclose()

    async def _phase(self, name: str, count: int, switches: tuple[list[list[int]], ...] = ()) -> None:
        chats = [Chat(QUESTIONS[index % len(QUESTIONS)], name) for index in range(count)]
        self.chats += chats
        started = time.monotonic()
        answers = [
            asyncio.ensure_future(stream_chat(self._client, self._server.model, chat, MAX_TOKENS)) for chat in chats
        ]
        for groups in switches:
            await asyncio.sleep(0.5)
            await self._switch(groups, "pause" if groups == TP else "drain")
        await asyncio.gather(*answers)
        self.seconds[name] = time.monotonic() - started
        if not self._console.is_terminal:
            print("  ".join(f"{title} {value}" for title, value in zip(COLUMNS, rows(chats, self.seconds)[0])), flush=True)

    async def _switch(self, groups: list[list[int]], method: str = "auto") -> None:
        try:
            body = {"groups": groups, "method": method, "timeout_s": SWITCH_LIMIT_S}
            response = await self._client.post("/plugins/flying/switch", json=body)
            failure = None if response.status_code == 200 else f"HTTP {response.status_code}: {response.text[:300]}"
        except httpx.HTTPError as error:
            failure = repr(error)
        self.records.append({"outcome": "failed", "error": failure} if failure else response.json())
        if not self._console.is_terminal:
            print(_sentence(self.records[-1]), flush=True)


def _sentence(record: dict[str, Any]) -> str:
    if record["outcome"] != "committed":
        return f"switch failed: {record['error']}"
    proof = ", ".join(f"worker {p['worker']} is rank {p['tp_rank']} of {p['tp_size']}" for p in record["proof"])
    total = 1e3 * record["seconds"]["total"]
    return f"switch {record['epoch']}: {record['from']} -> {record['to']} ({record['method']}) in {total:.1f} ms; {proof}"


def main() -> int:
    """Run the demo; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    try:
        return _run()
    except (ServerStartError, FileNotFoundError) as error:
        print(f"\nThe demo could not run: {error}", file=sys.stderr)
        return 1


def _run() -> int:
    console = Console()
    model = make_checkpoint(CACHE / "smollm2-135m-padded")
    with (
        tempfile.TemporaryDirectory(prefix="vllm-flying-demo-") as scratch,
        DemoServer(model, Path(scratch) / "server.log") as server,
    ):
        demo = Demo(server, console)
        asyncio.run(demo.run())
        print("Stopping the server ...", flush=True)
    print("\nAnswers:")
    for chat in demo.chats[:4] + demo.chats[-8:-4]:
        print(f"- [{chat.phase}] {chat.question}\n    {' '.join(chat.answer.split())}")
    print("\nSwitches:")
    for record in demo.records:
        print(f"- {_sentence(record)}")
    unanswered = [chat for chat in demo.chats if not chat.finished]
    failed = [record for record in demo.records if record["outcome"] != "committed"]
    for chat in unanswered:
        print(f"NOT ANSWERED: [{chat.phase}] {chat.question}: {chat.error}")
    same = {chat.question: chat.answer for chat in demo.chats[:4]}
    changed = [chat for chat in demo.chats if chat.answer != same[chat.question]]
    print(f"\n{len(demo.chats)} chats, {len(demo.records)} switches; answers that differ from the first phase's: "
          f"{len(changed)} (float32: 0 expected).")  # fmt: skip
    return 1 if unanswered or failed else 0


if __name__ == "__main__":
    sys.exit(main())
