"""What the README shows of TensorBoard and the explorer: docs/tensorboard1.png, tensorboard2.png,
explorer.png.

python -m vae_hyperband.beta_vae_tsb --betas 1 4 --epochs 5 --no-serve
vae-hyperband export checkpoints/betas-beta-1/best.pt --format web --sampler mixture --out explorer
python tests/screenshots.py logs explorer/index.html docs
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from chromium import Watched, browser
from playwright.sync_api import Browser


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


def shot(watched: Watched, url: str, ready: str, path: Path) -> None:
    """One page of TensorBoard, when what it shows has been drawn."""
    watched.page.goto(url)
    watched.page.wait_for_selector(ready, timeout=60_000)
    close = watched.page.get_by_role("button", name="Close side pane")
    if close.count():
        close.first.click()
    watched.page.wait_for_timeout(4000)  # curves are drawn after their cards are there
    watched.page.screenshot(path=path)


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
        watched = Watched(chromium, viewport=size, color_scheme="light")
        curves = "?smoothing=0&tagFilter=(bound|KL_divergence|recon_loss)%2Fvalidation#timeseries"
        shot(watched, url + curves, "scalar-card", Path(out) / "tensorboard1.png")
        pictures = "?tagFilter=random_samples#timeseries"
        watched.page.set_viewport_size({"width": 1100, "height": 520})
        shot(watched, url + pictures, "image-card img", Path(out) / "tensorboard2.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
