"""A real, headless Chromium for tests, driven through its DevTools pipe with the standard library alone.

As a program it takes a picture of a page after a click: python tests/chromium.py PAGE.html SELECTOR PICTURE.png
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

NAMES = (
    "chromium", "chromium-browser", "chromium-headless-shell", "chrome-headless-shell", "google-chrome",
    "google-chrome-stable",
)  # fmt: skip
PATIENCE = 120
"""Seconds that a loaded machine may take for one answer."""


def find_chromium() -> str:
    """Return the browser's program; skip the test where there is none, fail where the one that was named is missing."""
    named = os.environ.get("S2D3D_CHROMIUM")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)
    if named and not found:
        pytest.fail(f"S2D3D_CHROMIUM={named}: no such program")
    if not found:
        pytest.skip("no Chromium here: apt-get install chromium-headless-shell, or name one by S2D3D_CHROMIUM")
    return found


class Chromium:
    """One page. `requests` are the addresses that it asked for, `errors` what it complained of."""

    def __init__(self, profile: Path) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._buffer, self._number, self._session, self._loaded = b"", 0, None, False
        command = [
            find_chromium(), "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
            "--disable-extensions", "--disable-background-networking", "--disable-component-update",
            "--enable-unsafe-swiftshader", "--disable-dev-shm-usage", "--window-size=1100,740",
            "--no-sandbox",  # containers have none, and what is opened here is our own
        ]  # fmt: skip
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()

        def place() -> None:  # it reads commands from descriptor 3 and answers on 4
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            command, pass_fds=(3, 4), preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._send(f"{domain}.enable")

    def open(self, page: Path | str) -> None:
        """Load a file of the disk, without a network, or an address; wait until it is there."""
        offline = isinstance(page, Path)
        self._send(
            "Network.emulateNetworkConditions", offline=offline, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        self._loaded = False
        self._send("Page.navigate", url=page.resolve().as_uri() if isinstance(page, Path) else page)
        while not self._loaded:
            self._note(self._receive())

    def evaluate(self, expression: str):
        """Return the value of a JavaScript expression."""
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never came true: {expression}"
            time.sleep(0.02)

    def place_of(self, selector: str) -> tuple[float, float]:
        """Scroll to the only element that fits a selector; return its middle."""
        quoted = json.dumps(selector)
        assert self.evaluate(f"document.querySelectorAll({quoted}).length") == 1, selector
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({quoted}); e.scrollIntoView({{block: 'center'}});"
            " const {x, y, width, height} = e.getBoundingClientRect(); return [x + width / 2, y + height / 2]; })()"
        )
        return box[0], box[1]

    def click(self, selector: str) -> None:
        """Click with the mouse."""
        x, y = self.place_of(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to the input that fits a selector, as the user's choice."""
        root = self._send("DOM.getDocument")["root"]["nodeId"]
        node = self._send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._send("DOM.setFileInputFiles", files=[str(path.resolve())], nodeId=node)

    def drag(self, selector: str, dx: float, dy: float) -> None:
        """Press the mouse in the middle of an element, move it and let it go."""
        x, y = self.place_of(selector)
        self._send("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", clickCount=1)
        self._send("Input.dispatchMouseEvent", type="mouseMoved", x=x + dx, y=y + dy, button="left", buttons=1)
        self._send("Input.dispatchMouseEvent", type="mouseReleased", x=x + dx, y=y + dy, button="left", clickCount=1)

    def screenshot(self) -> bytes:
        """Return what is seen as a PNG."""
        return base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._out)
        os.close(self._in)

    def _send(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], PATIENCE)
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, "Chromium does not answer" if not ready else "Chromium has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict) -> None:
        method, content = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            # Pictures inside of the page have long ones.
            self.requests.append(content["request"]["url"][:100])
        elif method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(content["exceptionDetails"]))
        elif method == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.errors.append(content["entry"]["text"])


def main(page: str, selector: str, picture: str) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Chromium(Path(profile))
        browser.open(Path(page))
        browser.click(selector)
        Path(picture).write_bytes(browser.screenshot())
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
