"""A real browser for tests: Chromium, spoken to by the W3C's WebDriver protocol."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromedriver")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_PATIENCE = 60.0


def missing_programs() -> list[str]:
    """Return the programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Browser:
    """An open window."""

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, page: Path, *, width: int, scheme: str, media: str = "screen") -> None:
        """Show a file as a window of this width would, by day (`light`) or night (`dark`)."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self.command("Emulation.setScrollbarsHidden", {"hidden": True})
        self._post("url", {"url": "about:blank"})
        for kind in ("browser", "performance"):
            self.logs(kind)  # of what was shown before
        self._post("url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """Return what a script returns."""
        return self._post("execute/sync", {"script": script, "args": []})

    def logs(self, kind: str) -> list[dict[str, Any]]:
        """Return and forget what the browser logged: `browser` (the console) or `performance`."""
        entries: list[dict[str, Any]] = self._post("se/log", {"type": kind})
        return entries

    def requests(self) -> list[str]:
        """Return and forget the addresses that were asked for."""
        messages = (json.loads(entry["message"])["message"] for entry in self.logs("performance"))
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def command(self, name: str, parameters: dict[str, Any]) -> Any:
        """Send a command of Chromium's own protocol."""
        return self._post("goog/cdp/execute", {"cmd": name, "params": parameters})

    def close(self) -> None:
        """Close the window."""
        _ask(self._url, "DELETE")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return _ask(f"{self._url}/{path}", "POST", body)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start the programs, and end them however the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["chromedriver", f"--port={port}"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        window = _open_window(f"http://127.0.0.1:{port}", profile)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait()


def _open_window(url: str, profile: Path) -> Browser:
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": shutil.which("chromium"), "args": arguments},
        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    }
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            body = {"capabilities": {"alwaysMatch": wanted}}
            session = _ask(f"{url}/session", "POST", body)
            return Browser(f"{url}/session/{session['sessionId']}")
        except urllib.error.URLError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _ask(url: str, method: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with _OPENER.open(request, timeout=_PATIENCE) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(error.read().decode()) from error
