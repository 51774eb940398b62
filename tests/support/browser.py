"""A headless Chromium under a test's control, over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--remote-debugging-port=0", "--window-size=1100,1300", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # fmt: skip
START_S = 60.0


def installed_browser() -> str | None:
    """Path of a Chromium, if there is one."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


class Page:
    """One tab: what it shows, what it asked the network for, and its errors."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self.requested: list[str] = []
        self.errors: list[str] = []
        for domain in ("Runtime", "Network", "Page", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command, note what happened meanwhile, return the answer."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=START_S))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]  # type: ignore[no-any-return]
            self._note(message["method"], message["params"])

    def _note(self, event: str, details: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requested.append(details["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(details["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and details["type"] in ("error", "assert"):
            self.errors.append(json.dumps(details["args"]))
        # An answer such as 409 is in the log too, as source "network"; the page shows that one as text.
        elif event == "Log.entryAdded" and details["entry"]["level"] == "error" and details["entry"]["source"] != "network":
            self.errors.append(json.dumps(details["entry"]))

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives on the page."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, wanted: Callable[[Any], bool] = bool, seconds: float = 20.0) -> Any:
        """Wait until an expression's value is as wanted; AssertionError with the last value if it never is."""
        deadline = time.monotonic() + seconds
        while not wanted(found := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression} is {found!r}; errors on the page: {self.errors}"
            time.sleep(0.05)
        return found

    def press(self, selector: str) -> None:
        """A real press of the mouse in the middle of an element."""
        query = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{query}.scrollIntoView({{block: 'center'}})")
        box = self.value(f"(({{x, y, width, height}}) => ({{x: x + width / 2, y: y + height / 2}}))({query}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **box)

    def write(self, selector: str, text: str) -> None:
        """Type into a field and leave it."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self.command("Input.insertText", text=text)
        self.value("document.activeElement.blur()")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def open_page(browser: str, url: str, profile: Path) -> Iterator[Page]:
    """A browser of its own with one tab at `url`. It reaches 127.0.0.1 and no host by name."""
    # The debugging port is bound by Chromium itself and written to its profile: no race for a free one.
    process = subprocess.Popen(
        [browser, *OPTIONS, f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with connect(_tab(process, profile), max_size=None) as connection:
            page = Page(connection)
            went = page.command("Page.navigate", url=url)
            assert "errorText" not in went, went
            page.wait_for("document.readyState === 'complete' && location.href", lambda place: place == url)
            yield page
    finally:
        process.terminate()
        process.wait(timeout=START_S)


def _tab(process: subprocess.Popen[bytes], profile: Path) -> str:
    file, deadline = profile / "DevToolsActivePort", time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        if file.exists() and len(lines := file.read_text().split()) == 2:
            for tab in httpx.get(f"http://127.0.0.1:{lines[0]}/json/list").json():
                if tab["type"] == "page":
                    return str(tab["webSocketDebuggerUrl"])
        time.sleep(0.05)
    raise AssertionError(f"Chromium offered no tab within {START_S:g} s")
