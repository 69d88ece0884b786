"""A headless Chromium for tests: opens a file, runs scripts, takes pictures, and tells of errors and requests.

:class:`Browser` speaks the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) over a pipe, which
needs no port and no package; :func:`dump_dom` uses the command line.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
)
_AT_3_AND_4 = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
TIMEOUT = 60.0  # seconds for one answer


def chromium() -> str | None:
    """Path of the browser, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def dump_dom(page: Path) -> str:
    """The document as HTML after its scripts ran."""
    path = chromium()
    assert path is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [path, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.resolve().as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    return result.stdout


class Browser:
    """One page in one browser; a context manager.

    Attributes:
        errors: what the console and the page complained about.
        requests: addresses that the page asked for, the page's own and ``data:`` ones left out.
    """

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self._size = width, height
        self._events: list[dict[str, Any]] = []
        self._buffer = b""
        self._next = 0
        self.errors: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> Browser:
        path = chromium()
        assert path is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Out of the way of 3 and 4, which the protocol reads from and writes to.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, from_browser)]
        flags = [*FLAGS, f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe"]
        command = [path, *flags, f"--window-size={self._size[0]},{self._size[1]}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _AT_3_AND_4, *map(str, ends), *command],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._session = None
            self._send("Browser.close")
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._write)
            os.close(self._read)
            self._profile.cleanup()

    def open(self, page: Path) -> None:
        """Load a file and wait until it and its pictures are there."""
        self.errors.clear()
        self.requests.clear()
        self._own = page.resolve().as_uri()
        self.call("Page.navigate", url=self._own)
        self._until("Page.loadEventFired")
        self.run("Promise.all([...document.images].map((image) => image.decode().catch(() => null)))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise AssertionError(result["exceptionDetails"])
        return result["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        """Make the window this large, in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, whole: bool = False) -> Image.Image:
        """A picture of the window, or of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    # -- protocol -----------------------------------------------------------------------------------------------------

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = self._send(method, **parameters)
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def _send(self, method: str, **parameters: Any) -> int:
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._next

    def _until(self, event: str) -> None:
        while not any(message["method"] == event for message in self._events):
            self._receive()
        self._events.clear()

    def _receive(self) -> dict[str, Any]:
        """The next message; events are kept and looked at."""
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the browser did not answer within {TIMEOUT} s")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise ConnectionError("the browser ended")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._events.append(message)
            self._look(message["method"], message["params"])
        return message

    def _look(self, event: str, parameters: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(str(parameters["args"]))
        elif event == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if url != self._own and not url.startswith("data:"):
                self.requests.append(url)
