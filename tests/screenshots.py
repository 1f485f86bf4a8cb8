"""What the README shows of TensorBoard and the explorer: docs/tensorboard1.png, tensorboard2.png,
explorer.png.

python -m vae_hyperband.beta_vae_tsb --betas 1 4 --epochs 5 --no-serve
vae-hyperband export checkpoints/betas-beta-1/best.pt --format web --sampler mixture --out explorer
python tests/screenshots.py logs explorer/index.html docs
"""

import contextlib
import io
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from chromium import Watched, browser
from PIL import Image
from playwright.sync_api import Browser, Page


@contextlib.contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """A TensorBoard over the logs, on loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host"]
    command += ["127.0.0.1", "--port", str(port), "--samples_per_plugin", "images=100"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}/"
        try:
            for _ in range(240):
                with contextlib.suppress(OSError):
                    if urllib.request.urlopen(url + "data/runs", timeout=5).read() != b"[]\n":
                        break
                time.sleep(0.25)
            yield url
        finally:
            process.terminate()


def show(page: Page, url: str, ready: str) -> None:
    """A page of TensorBoard, when what it shows has been drawn, without the pane of settings."""
    page.goto(url)
    page.wait_for_selector(ready, timeout=60_000)
    close = page.get_by_role("button", name="Close side pane")
    if close.count():
        page.get_by_label("Ignore outliers in chart scaling").uncheck()  # else it cuts curves off
        close.first.click()
    page.wait_for_timeout(4000)  # curves are drawn after their cards are there


def over_epochs(page: Page, run: str, path: Path, shown: tuple[int, ...]) -> None:
    """A run's card of pictures with its slider at some of the steps, side by side."""
    card = page.locator("image-card", has_text=run)
    slider = card.locator("input[type=range]")
    slider.press("Home")
    cards, at = [], 0
    for position in shown:
        for _ in range(position - at):
            slider.press("ArrowRight")
        at = position
        slider.blur()  # without the halo of what is being moved
        page.wait_for_timeout(1000)  # the next picture is asked for
        cards.append(Image.open(io.BytesIO(card.screenshot())))
    row = Image.new("RGB", (sum(card.width for card in cards), cards[0].height), "white")
    for number, one in enumerate(cards):
        row.paste(one, (number * one.width, 0))
    row.save(path)


#: A pair of trousers in one stroke, as shares of the drawing area.
TROUSERS = ((0.38, 0.08), (0.62, 0.08), (0.62, 0.16), (0.38, 0.16), (0.38, 0.24), (0.62, 0.24),
            (0.62, 0.95), (0.57, 0.30), (0.43, 0.30), (0.38, 0.95), (0.36, 0.10))  # fmt: skip


def explorer(chromium: Browser, html: Path, path: Path) -> None:
    """The explorer with a drawing in it, and the pointer over its map."""
    size = {"width": 1200, "height": 1310}
    watched = Watched(chromium, viewport=size, color_scheme="light", device_scale_factor=1.25)
    page = watched.page
    page.goto(html.resolve().as_uri())
    page.wait_for_selector("main:not([aria-busy])", timeout=60_000)

    def corner(name: str, right: float, down: float) -> None:
        box = page.locator(name).bounding_box()
        assert box
        page.mouse.move(box["x"] + right * box["width"], box["y"] + down * box["height"], steps=5)

    corner("#draw", *TROUSERS[0])
    page.mouse.down()
    for place in TROUSERS:
        corner("#draw", *place)
    page.mouse.up()
    corner("#map", 0.45, 0.75)
    page.wait_for_timeout(1000)
    page.screenshot(path=path)
    assert watched.troubles == []


def main(logs: str, html: str, out: str) -> None:
    size = {"width": 1500, "height": 640}
    with tensorboard(Path(logs)) as url, browser() as chromium:
        explorer(chromium, Path(html), Path(out) / "explorer.png")
        page = Watched(chromium, viewport=size, color_scheme="light", device_scale_factor=1.5).page
        curves = "?smoothing=0&tagFilter=(bound|KL_divergence|recon_loss)%2Fvalidation#timeseries"
        show(page, url + curves, "scalar-card")
        page.screenshot(path=Path(out) / "tensorboard1.png")
        show(page, url + "?tagFilter=random_samples#timeseries", "image-card img")
        over_epochs(page, "betas-beta-1", Path(out) / "tensorboard2.png", shown=(0, 2, 4))


if __name__ == "__main__":
    main(*sys.argv[1:])
