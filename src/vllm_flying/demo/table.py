"""The demo's table: layout, TTFT, TPOT and tokens per second, phase by phase.

Uses rich where the output is a terminal; prints plain lines else.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table

from vllm_flying.demo.chats import Chat

COLUMNS = ("phase", "layouts", "done", "TTFT ms", "TPOT ms", "longest gap ms", "tokens/s")


def rows(chats: Sequence[Chat], seconds: dict[str, float]) -> list[tuple[str, ...]]:
    """One row per phase, in order of appearance."""
    phases = list(dict.fromkeys(chat.phase for chat in chats))
    return [_row(phase, [chat for chat in chats if chat.phase == phase], seconds.get(phase)) for phase in phases]


def table(chats: Sequence[Chat], seconds: dict[str, float]) -> Table:
    """The same for a terminal."""
    shown = Table(*COLUMNS, title="vllm-flying demo: two engines, one model, no restart")
    for row in rows(chats, seconds):
        shown.add_row(*row)
    return shown


def _row(phase: str, chats: Sequence[Chat], seconds: float | None) -> tuple[str, ...]:
    layouts = ", ".join(sorted({chat.layout.replace("engines=", "") for chat in chats if chat.layout}))
    done = f"{sum(chat.finished for chat in chats)}/{len(chats)}"
    tokens = sum(len(chat.token_times) for chat in chats)
    return (
        phase,
        layouts or "...",
        done,
        _milliseconds([chat.ttft_s for chat in chats]),
        _milliseconds([chat.tpot_s for chat in chats]),
        _milliseconds([max((chat.longest_gap_s for chat in chats), default=0.0)]),
        f"{tokens / seconds:.1f}" if seconds else "...",
    )


def _milliseconds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{1e3 * median(known):.0f}" if known else "..."
