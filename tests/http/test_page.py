"""The page at /plugins/flying/ in a real browser.

The routes and their guard are the plugin's own, but behind them are recorded answers instead of engines: the test is
about the page, not about vLLM. That the routes answer so over real engines is what tests/engine shows.
"""

from __future__ import annotations

import asyncio
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from tests.support.application import serving
from tests.support.browser import Page, installed_browser, open_page
from vllm_flying.core.topology import Layout
from vllm_flying.frontend.audit import sentence
from vllm_flying.frontend.board import BoardGroup, BoardState, SwitchPendingError
from vllm_flying.frontend.control_loop import DECISIONS_FILE
from vllm_flying.frontend.record import PHASES
from vllm_flying.http.routes import build_router

BROWSER = installed_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on PATH; install one: apt-get install -y chromium (Debian), then run this again"
)
KEY = "a secret"
START = [[0, 1], [2], [3]]
LOAD = {0: (3, 1, 0), 2: (1, 0, 2), 3: (0, 0, 0)}
DECISIONS = [
    {"time": 1.7e9, "from": [[0], [1], [2], [3]], "to": START, "rule": "long_context", "reason": "a request needs 9000 tokens",
     "verdict": "switch", "predicted_gain_s": 1.5, "outcome": "committed", "seconds": 0.0123},
    {"time": 1.7e9 + 60, "from": START, "to": [[0, 1, 2, 3]], "rule": "load", "reason": "it is <i>quiet</i>",
     "verdict": "within the cooldown of 5 s", "predicted_gain_s": 0.1, "outcome": None, "seconds": None},
    {"time": 1.7e9 + 70, "from": [[0], [1], [2], [3]], "to": START, "rule": "load", "predicted_gain_s": 1.5, "realised": {
        "gain_s": 0.5, "staying_s": 2.0, "measured_s": 1.5, "requests": 9, "window_s": 10.0, "unknown": None}},
]  # fmt: skip


def record(source: list[list[int]], target: list[list[int]], epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch, "from": source, "to": target, "reason": "operator", "method": "migrate", "outcome": "committed",
        "error": None, "requests": {"paused": 2, "moved": 5}, "kv": {"bytes": 1 << 20, "seconds": 0.001, "bytes_per_s": 1 << 30},
        "precopied": {"requests": 0, "bytes": 0, "seconds": 0.0},
        "waves": 1, "seconds": {**dict.fromkeys(PHASES, 0.001), "total": 0.0084}, "proof": [],
    }  # fmt: skip


class Recorded:
    """What the routes need of a router, from a record: a layout that switches without any engine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings = SimpleNamespace(policy="auto", switch_method="auto", switch_timeout_s=5.0)
        self.engines = self.switcher = self
        self.groups = START
        self.last = record([[0], [1], [2], [3]], START, 7)
        self.asked: list[tuple[list[list[int]], str]] = []
        self.refuse = False
        (directory / DECISIONS_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in DECISIONS))

    async def ready(self) -> BoardState:
        groups = tuple(BoardGroup(tuple(group), 1000) for group in self.groups)
        return BoardState(self.last["epoch"], 1, groups, self.last)

    async def call_all(self, operation: str) -> list[dict[str, Any]]:
        assert operation == "status"
        return [self._engine(engine, group) for group in self.groups for engine in group]

    def _engine(self, engine: int, group: list[int]) -> dict[str, Any]:
        running, waiting, paused = LOAD.get(engine, (0, 0, 0))
        state = "serving" if len(group) == 1 else "leading" if engine == group[0] else "parked"
        return {
            "engine": engine, "state": state, "group": group, "pages": {}, "scheduled_tokens": 0, "costs": {}, "running": running,
            "pace": 1.0, "waiting": waiting, "paused": paused, "kv_tokens_capacity": 1000 * len(group), "kv_tokens_used": 250,
        }  # fmt: skip

    def check(self, groups: list[list[int]], method: str) -> Layout:
        return Layout.of(groups, 4)

    async def switch(self, target: Layout, method: str, timeout_s: float) -> dict[str, Any]:
        self.asked.append((target.to_lists(), method))
        await asyncio.sleep(0.3)
        if self.refuse:
            raise SwitchPendingError("another switch is under way; ask again when it is over")
        self.last = record(self.groups, target.to_lists(), self.last["epoch"] + 1)
        self.groups = target.to_lists()
        return self.last


@contextmanager
def shown(tmp_path: Path, key: str | None = None) -> Iterator[tuple[Page, Recorded, list[dict[str, Any]]]]:
    """The page over recorded answers, and all bodies that were posted; at the end it has made no mistake."""
    app, flying, posted = FastAPI(), Recorded(tmp_path), list[dict[str, Any]]()
    app.state.args, app.state.flying_router = Namespace(api_key=[key] if key else None), flying
    app.include_router(build_router(app))

    @app.middleware("http")
    async def note(request: Any, answer: Any) -> Any:
        if request.method == "POST":
            authorization = request.headers.get("authorization")
            posted.append({"path": request.url.path, "body": json.loads(await request.body()), "bearer": authorization})
        return await answer(request)

    assert BROWSER is not None
    with serving(app) as url, open_page(BROWSER, f"{url}/plugins/flying/", tmp_path / "profile") as page:
        yield page, flying, posted
        page.wait_for("document.readyState === 'complete'")
        assert page.errors == []
        elsewhere = [asked for asked in page.requested if not asked.startswith((f"{url}/plugins/flying/", "data:"))]
        assert page.requested and elsewhere == [], "the page needs nothing but its own server"


def cards(page: Page) -> dict[str, str]:
    listed = page.value("[...document.querySelectorAll('.group')].map(card => [card.dataset.engines, card.innerText])")
    return dict(listed)


def texts(page: Page, selector: str) -> list[str]:
    return list(page.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(found => found.textContent)"))


def test_it_shows_groups_timeline_and_decisions(tmp_path: Path) -> None:
    with shown(tmp_path) as (page, _, _):
        page.wait_for("document.getElementById('connection').textContent", lambda text: text == "live")
        found = cards(page)
        assert list(found) == ["0,1", "2", "3"]
        assert "TP 2" in found["0,1"] and "3 running, 1 waiting" in found["0,1"] and "250 of 2,000" in found["0,1"]
        assert "TP 1" in found["2"] and "1 running, 0 waiting, 2 paused" in found["2"]
        assert texts(page, ".engine.leading") == ["0"] and texts(page, ".engine.parked") == ["1"]
        assert texts(page, ".engine.serving") == ["2", "3"] and texts(page, "#epoch") == ["7"]
        assert texts(page, "#decisions li") == [sentence(entry) for entry in reversed(DECISIONS)]
        assert texts(page, "#decisions li.done") == [sentence(DECISIONS[0])]
        assert "0+1, 2, 3: committed in 8.4 ms" in texts(page, "#last")[0] and "5 requests moved" in texts(page, "#last")[0]
        # Two samples make areas: 4 requests run and 1 waits on top of them.
        page.wait_for("new Set(document.querySelector('.waiting').getAttribute('points').split(' ')).size", lambda points: points >= 4)
        drawn = page.value("[...document.querySelectorAll('.stretch')].map(part => part.dataset.engines)")
        assert drawn == ["0,1", "2", "3"]
        heights = page.value("['.running', '.waiting'].map(kind => document.querySelector(kind).getBBox().height)")
        assert heights[1] > 0 and heights[0] == pytest.approx(4 * heights[1], rel=0.01)
        _look(page, "page.png")


def test_a_button_switches(tmp_path: Path) -> None:
    with shown(tmp_path) as (page, flying, posted):
        page.wait_for("document.querySelectorAll('#uniform button').length", lambda count: count == 3)
        assert texts(page, "#uniform button") == ["all alone", "groups of 2", "all merged"]
        assert texts(page, "#steps button") == ["merge 0+1+2+3", "split 0+1", "merge 2+3"]
        page.press("#steps button:last-child")
        page.wait_for("document.querySelector('button').disabled")
        page.wait_for("document.getElementById('epoch').textContent", lambda epoch: epoch == "8")
        assert list(cards(page)) == ["0,1", "2,3"]
        page.value("document.getElementById('method').value = 'drain'")
        page.press("#uniform button:last-child")
        page.wait_for("document.getElementById('epoch').textContent", lambda epoch: epoch == "9")
        assert list(cards(page)) == ["0,1,2,3"]
        switch = {"path": "/plugins/flying/switch", "bearer": None}
        assert posted == [
            {**switch, "body": {"groups": [[0, 1], [2, 3]]}},
            {**switch, "body": {"groups": [[0, 1, 2, 3]], "method": "drain"}},
        ]
        assert flying.asked == [([[0, 1], [2, 3]], "auto"), ([[0, 1, 2, 3]], "drain")]
        page.wait_for("[...document.querySelectorAll('.stretch')].map(part => part.dataset.engines).join(' ')",
                      lambda drawn: drawn.split()[:3] == ["0,1", "2", "3"] and drawn.split()[-1] == "0,1,2,3")  # fmt: skip
        _look(page, "switched.png")


def test_a_refusal_is_shown_and_stays(tmp_path: Path) -> None:
    with shown(tmp_path) as (page, flying, _):
        flying.refuse = True
        page.wait_for("document.querySelectorAll('#uniform button').length")
        page.press("#uniform button")
        page.wait_for("document.getElementById('error').innerText", lambda text: "409: another switch is under way" in text)
        looks = len(page.requested)
        page.wait_for("document.getElementById('connection').textContent", lambda _: len(page.requested) >= looks + 4)
        assert "409: another switch is under way" in texts(page, "#error")[0], "the next look must not wipe it away"
        assert list(cards(page)) == ["0,1", "2", "3"] and not page.value("document.querySelector('button').disabled")
        _look(page, "refused.png")


def test_the_key_goes_along_as_bearer(tmp_path: Path) -> None:
    with shown(tmp_path, KEY) as (page, _, posted):
        page.wait_for("document.getElementById('unreachable').innerText", lambda text: "401" in text and "API key" in text)
        assert cards(page) == {} and posted == []
        page.write("#key", KEY)
        page.wait_for("document.getElementById('connection').textContent", lambda text: text == "live")
        assert texts(page, "#unreachable") == [""]
        page.press("#uniform button")
        page.wait_for("document.getElementById('epoch').textContent", lambda epoch: epoch == "8")
        assert posted == [
            {"path": "/plugins/flying/switch", "body": {"groups": [[0], [1], [2], [3]]}, "bearer": f"Bearer {KEY}"}
        ]


def _look(page: Page, name: str) -> None:
    """Keep a picture where PAGE_PICTURES asks for it: how the page looks is for eyes to judge."""
    if "PAGE_PICTURES" in os.environ:
        page.screenshot(Path(os.environ["PAGE_PICTURES"]) / name)
