"""Debian's Chromium, driven by Playwright."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright


def trouble() -> str:
    """Why there is no browser here, or nothing. Root may install Debian's package."""
    # one process at a time: the processes of the tests begin together, and apt refuses the second
    with open(Path(tempfile.gettempdir()) / "vae-hyperband-chromium.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _program() and os.geteuid() == 0 and shutil.which("apt-get"):
            _install()
    return "" if _program() else "no Chromium found: apt-get install chromium"


def _install() -> None:
    subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False)
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends"]
    subprocess.run([*install, "chromium", "fonts-liberation"], capture_output=True, check=False)


def _program() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        # root has no sandbox; the pages are our own
        chromium = play.chromium.launch(executable_path=_program(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Watched:
    """A page and what it said and asked for that it should not have."""

    def __init__(self, browser: Browser, **context: object) -> None:
        self.context = browser.new_context(**context)
        self.page: Page = self.context.new_page()
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on(
            "console",
            lambda said: said.type in ("error", "warning") and self.troubles.append(said.text),
        )
        self.page.on("request", lambda request: self.requests.append(request.url))


def barriers(page: Page) -> list[str]:
    """What axe-core finds that keeps people out: WCAG's rules and its own best practices."""
    found = Axe().run(page).response["violations"]
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found for node in rule["nodes"]]


def until(page: Page, expression: str, arg: object = None, seconds: float = 30) -> None:
    """Wait until the page says yes.

    Playwright's own wait_for_function evaluates text in the page, which a strict
    Content-Security-Policy forbids now and then; what comes over the debugging protocol is allowed.
    """
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline, f"never came true: {expression}"
        time.sleep(0.05)
