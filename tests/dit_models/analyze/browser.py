"""A headless Chromium by the WebDriver protocol: real keys, real mouse, nothing but the standard
library. Needs the programs ``chromium`` and ``chromedriver`` (Debian: chromium, chromium-driver).
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # W3C WebDriver's name of an element's id
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "tab": "\ue004"}
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def _program() -> str | None:
    return next(filter(None, map(shutil.which, _PROGRAMS)), None)


def why_no_browser() -> str | None:
    """What is missing for a browser test, if anything."""
    if shutil.which("chromedriver") is None:
        return "chromedriver is not installed (Debian: apt-get install chromium chromium-driver)"
    return None if _program() else f"none of {', '.join(_PROGRAMS)} is installed"


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, path: Path) -> None:
        """Load a file and wait until it is there."""
        self._post("url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a piece of JavaScript returns."""
        return self._post("execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """What an element shows."""
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def press(self, *names: str) -> None:
        """Press keys one after the other, as a user does, wherever the focus is."""
        strokes = []
        for name in names:
            key = KEYS[name]
            strokes += [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._act({"type": "key", "id": "keyboard", "actions": strokes})

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Click at a place of an element, given as shares of its width and height."""
        down = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._point(selector, x, y, down)

    def hover(self, selector: str, x: float, y: float) -> None:
        """Move the mouse to a place of an element."""
        self._point(selector, x, y, [])

    def screenshot(self, path: Path) -> None:
        """Write what the window shows."""
        path.write_bytes(base64.b64decode(self._get("screenshot")))

    def resize(self, width: int, height: int) -> None:
        """Make the page ``width`` CSS pixels wide, also narrower than a window can be."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", size)

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        """Chromium's own commands."""
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def errors(self) -> list[str]:
        """Errors since the last call, blocked content among them."""
        entries = self._post("se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def _point(self, selector: str, x: float, y: float, then: list[dict[str, Any]]) -> None:
        found = self._post("element", {"using": "css selector", "value": selector})
        box = self.run(
            "const e = document.querySelector(arguments[0]);"
            "e.scrollIntoView({block: 'center'});"
            "const b = e.getBoundingClientRect(); return [b.width, b.height]",
            selector,
        )
        # Offsets of an element's origin are counted from its middle.
        offset = [round((share - 0.5) * side) for share, side in zip((x, y), box, strict=True)]
        origin = {_ELEMENT: found[_ELEMENT]}
        move = {"type": "pointerMove", "origin": origin, "x": offset[0], "y": offset[1]}
        mouse = {"pointerType": "mouse"}
        self._act({"type": "pointer", "id": "mouse", "parameters": mouse, "actions": [move, *then]})

    def _act(self, source: dict[str, Any]) -> None:
        self._post("actions", {"actions": [source]})

    def _post(self, command: str, body: dict[str, Any]) -> Any:
        return _request("POST", f"{self._session}/{command}", body)

    def _get(self, command: str) -> Any:
        return _request("GET", f"{self._session}/{command}")


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless window without access to the network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    program = _program()
    flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # whatever it asks for is not found
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags.append(f"--user-data-dir={profile}")
        wanted = {
            "alwaysMatch": {
                "goog:chromeOptions": {"binary": program, "args": flags},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
        }
        driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for(f"{address}/status", driver)
            opened = _request("POST", f"{address}/session", {"capabilities": wanted})
            session = f"{address}/session/{opened['sessionId']}"
            try:
                yield Browser(session)
            finally:
                _request("DELETE", session)
        finally:
            driver.terminate()
            driver.wait(timeout=20)


def _wait_for(address: str, driver: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert driver.poll() is None, "chromedriver has ended"
        try:
            _request("GET", address)
            return
        except urllib.error.URLError:
            time.sleep(0.05)
    raise TimeoutError("chromedriver does not answer")


def _request(method: str, address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        address, data, {"Content-Type": "application/json"}, method=method
    )
    # The machine's proxy is not for a program on this very machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{method} {address}: {error.read().decode()[:500]}") from error
