"""TensorBoard over real runs, as the README shows it: docs/tensorboard1.png, tensorboard2.png.

python -m vae_hyperband.beta_vae_tsb --betas 1 4 --epochs 5 --no-serve
python tests/screenshots.py logs docs
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


def main(logs: str, out: str) -> None:
    size = {"width": 1500, "height": 640}
    with tensorboard(Path(logs)) as url, browser() as chromium:
        watched = Watched(chromium, viewport=size, color_scheme="light")
        curves = "?smoothing=0&tagFilter=(bound|KL_divergence|recon_loss)%2Fvalidation#timeseries"
        shot(watched, url + curves, "scalar-card", Path(out) / "tensorboard1.png")
        pictures = "?tagFilter=random_samples#timeseries"
        watched.page.set_viewport_size({"width": 1100, "height": 520})
        shot(watched, url + pictures, "image-card img", Path(out) / "tensorboard2.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
