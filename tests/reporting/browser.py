"""A headless Chromium, driven by chromedriver's HTTP interface."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ENTER, DOWN, UP = "\ue007", "\ue015", "\ue013"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """One page in a Chromium of its own; closed by `close`."""

    def __init__(self, profile: Path) -> None:
        driver = shutil.which("chromedriver")
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        if driver is None or chromium is None:
            pytest.skip("needs a Chromium and its driver: apt-get install chromium chromium-driver")
        self._log = (profile / "driver.log").open("w+")
        self._process = subprocess.Popen(
            [driver, "--port=0"], stdout=self._log, stderr=subprocess.STDOUT, text=True
        )
        self._url = f"http://127.0.0.1:{self._port()}/session"
        options = {
            "binary": chromium,
            "args": [*_FLAGS, f"--user-data-dir={profile}"],
            "perfLoggingPrefs": {"enableNetwork": True},
        }
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        try:
            session = self._post("", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._process.kill()
            raise
        self._url += f"/{session['sessionId']}"

    def _port(self) -> int:
        for _ in range(300):
            self._log.seek(0)
            # Its first line names the port that was asked for, 0.
            if listens := re.search(r"started successfully on port (\d+)", self._log.read()):
                return int(listens[1])
            time.sleep(0.1)
        raise TimeoutError("chromedriver does not say on which port it listens")

    def _post(self, path: str, body: dict[str, Any], method: str = "POST") -> Any:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path, fragment: str = "") -> None:
        """Go to a file."""
        self._post("/url", {"url": page.resolve().as_uri() + fragment})

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def show_as(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window and the colours that its user prefers."""
        mobile = width < 600
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str) -> Any:
        """What the expression `script` is in the page."""
        return self._post("/execute/sync", {"script": f"return {script}", "args": []})

    def type(self, selector: str, keys: str) -> None:
        """Keys into an element, as from a keyboard."""
        found = self._post("/element", {"using": "css selector", "value": selector})
        self._post(f"/element/{next(iter(found.values()))}/value", {"text": keys})

    def console(self) -> list[str]:
        """What has been written to the console since the last call, violated policies among it."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses that have been asked for since the last call."""
        events = [json.loads(e["message"])["message"] for e in self._post("/se/log", {"type": "performance"})]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shot = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            self._post("", {}, method="DELETE")
        finally:
            self._process.terminate()
            self._process.wait(30)
            self._log.close()
