"""A headless Chromium for tests of pages, driven over a pipe with the DevTools protocol.

    with Browser() as browser:
        seen = browser.look(file, width=390, dark=True)     what a reader would see, and what the page logged
        browser.evaluate("document.title"); browser.screenshot(file)

It takes the machine's Chromium or Chrome, or playwright's, and else unpacks Debian's headless one into .venv.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import debian

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
PACKAGES = ("chromium-headless-shell", "fonts-dejavu-core", "fontconfig-config")
OVERFLOWS = """
(() => {
  const wide = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > wide) found.push('the page is ' + document.documentElement.scrollWidth + ' px wide');
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (!box.width || box.right <= wide + 1 && box.left >= -1) continue;
    let scrolls = false;
    for (let p = e.parentElement; p; p = p.parentElement)
      scrolls ||= ['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX) && p !== document.body;
    if (!scrolls) found.push(e.tagName + '.' + e.className + ' ends at ' + Math.round(box.right) + ' px');
  }
  return found.slice(0, 5);
})()
"""
"""JavaScript: what is cut off or wider than the page. What is inside a box that scrolls may be wider."""


class NoBrowser(Exception):
    """This machine has no browser, and none can be fetched."""


@dataclass
class Seen:
    """What a page at one width and theme overflows with, and the errors and warnings that it logged."""

    overflows: list[str]
    errors: list[str] = field(default_factory=list)


def program() -> tuple[str, dict[str, str]]:
    """The browser and variables of its environment. Raises NoBrowser."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found, {}
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache/ms-playwright")
    if playwright := [
        *cache.glob("chromium*/chrome-linux*/headless_shell"),
        *cache.glob("chromium*/chrome-linux*/chrome"),
    ]:
        return str(playwright[0]), {}
    try:
        root = debian.unpacked("chromium", PACKAGES, depends=True)
    except (debian.NotDebian, RuntimeError) as error:
        raise NoBrowser(str(error)) from None
    libraries = [
        str(p) for p in (*root.glob("usr/lib/*-linux-gnu"), *root.glob("usr/lib/*-linux-gnu/*/")) if p.is_dir()
    ]
    fonts = root / "fonts.conf"
    fonts.write_text(
        f"<fontconfig><dir>{root}/usr/share/fonts</dir><cachedir>{root}/fonts-cache</cachedir></fontconfig>"
    )
    variables = {"LD_LIBRARY_PATH": ":".join(libraries), "FONTCONFIG_FILE": str(fonts)}
    return str(root / "usr/lib/chromium/chromium-headless-shell"), variables


class Browser:
    """One process for all pages. A page is loaded from its file, as a reader would open it."""

    def __enter__(self) -> Browser:
        self._stack = contextlib.ExitStack()
        command, variables = program()
        profile = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True))
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = ["--headless", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}"]  # fmt: skip
        words = ["bash", "-c", f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"', "bash", command, *flags]
        self._process = subprocess.Popen(words, env={**os.environ, **variables}, pass_fds=(to_browser, from_browser),
                                         stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._buffer, self._events, self._session = itertools.count(1), b"", [], ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._stack.close()

    def look(self, page: Path, *, width: int, dark: bool = False, touch: bool = False) -> Seen:
        """Loads a page at this width and theme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self._events):
            self._events.append(self._read())
        self.evaluate("window.ready")  # a promise of pages that draw after they are loaded
        return Seen(self.evaluate(OVERFLOWS), self.logged())

    def logged(self) -> list[str]:
        """What the page logged as an error or a warning, and its requests for anything else than itself."""
        found = []
        for event in self._events:
            about = event.get("params", {})
            match event["method"]:
                case "Runtime.exceptionThrown":
                    found.append(json.dumps(about["exceptionDetails"])[:600])
                case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                    found.append(json.dumps(about["args"])[:600])
                case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                    found.append(f"{about['entry']['text'][:600]} {about['entry'].get('url', '')[-80:]}")
                case "Network.requestWillBeSent" if not about["request"]["url"].startswith(("file:", "data:", "blob:")):
                    found.append(f"asks for {about['request']['url'][:200]}")
        return found

    def evaluate(self, script: str) -> Any:
        """The value of an expression; that of a promise once it has one."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise AssertionError(json.dumps(done["exceptionDetails"])[:1000])
        return done["result"].get("value")

    def touch(self, path: Sequence[tuple[float, float]]) -> None:
        """A finger goes along these points of the page."""
        for i, (x, y) in enumerate(path):
            self.call(
                "Input.dispatchTouchEvent", type="touchMove" if i else "touchStart", touchPoints=[{"x": x, "y": y}]
            )
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.evaluate("new Promise(done => setTimeout(done, 100))")  # what the page does after its own timers

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser ended with status {self._process.wait()}")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


def main(arguments: Sequence[str]) -> None:
    """python tests/browser.py FOLDER PAGE…: a picture of each page at both widths and in both themes."""
    folder = Path(arguments[0])
    with Browser() as browser:
        for page, width, dark in itertools.product(arguments[1:], (390, 1280), (False, True)):
            print(page, width, "dark" if dark else "light", browser.look(Path(page), width=width, dark=dark))
            browser.screenshot(folder / f"{Path(page).stem}-{width}-{'dark' if dark else 'light'}.png")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
