"""What the pages show of TensorBoard, the explorer and a search's report: docs/tensorboard1.png,
tensorboard2.png, explorer.png, search_report.png.

python -m vae_hyperband.beta_vae_tsb --betas 1 4 --epochs 5 --no-serve
vae-hyperband export checkpoints/betas-beta-1/best.pt --format web --sampler mixture --out explorer
python tests/screenshots.py logs explorer/index.html docs
"""

import contextlib
import functools
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from chromium import Watched, browser
from PIL import Image
from playwright.sync_api import Browser, Page

from vae_hyperband.common.config import Places
from vae_hyperband.reporting.report import write_report
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.decisions import Board, Journal
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.suggest import importance, suggest
from vae_hyperband.search.trials import DECISIONS, SearchResult, write_result

ROOT = Path(__file__).parent.parent


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


def searched(folder: Path) -> Path:
    """The report of a search over the measured learning curves of benchmarks/learning_curves.json.

    It takes a grid's 36 configurations, and the scheduler stops them as in any search.
    """
    content = json.loads((ROOT / "benchmarks/learning_curves.json").read_text())
    curves = {Hyperparameters(**row["drawn"]): row for row in content["curves"]}
    config = SearchConfig(algorithm="grid", grid_points=4, max_epochs=content["epochs"])
    place = Places(run="sweep", checkpoints_dir=folder / "checkpoints", logs_dir=folder / "logs")
    place.ckpt_folder.mkdir(parents=True)
    with Journal(place.ckpt_folder / DECISIONS) as journal:
        board = Board(config, journal, functools.partial(suggest, config))
        while not board.finished:
            while len(board.runnable()) < 2 and board.suggest_next():
                pass
            trial = board.trials[board.runnable()[0]]
            curve, epoch = curves[trial.hyperparameters], trial.num_epochs
            bound, nats = curve["bounds"][epoch], curve["kls"][epoch]
            board.reported(
                trial.number,
                {
                    "step": epoch + 1, "epoch": epoch + 1, "recon_loss": bound - nats,
                    "KL_divergence": nats, "total_loss": bound, "bound": bound,
                },
            )  # fmt: skip
    trials = board.trials
    write_result(SearchResult(config, trials, place.ckpt_folder, importance(config, trials)))
    return write_report(place)


def search_report(chromium: Browser, html: Path, path: Path) -> None:
    """The charts, filtered to the best scores, with the pointer at a trial."""
    size = {"width": 1040, "height": 1700}
    watched = Watched(chromium, viewport=size, color_scheme="light", device_scale_factor=1.25)
    page = watched.page
    page.goto(html.as_uri())
    box = page.locator("#parallel .brush .overlay").last.bounding_box()
    assert box
    across, down = box["x"] + box["width"] / 2, box["y"]
    page.mouse.move(across, down + 0.72 * box["height"])
    page.mouse.down()
    page.mouse.move(across, down + 1.1 * box["height"], steps=5)
    page.mouse.up()
    mark = page.locator("#curves .all circle").nth(2).bounding_box()
    assert mark
    page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    page.wait_for_timeout(300)
    charts = page.locator("#charts").bounding_box()
    assert charts
    clip = {"x": 0, "y": charts["y"] - 40, "width": 1040, "height": charts["height"] + 50}
    page.screenshot(path=path, clip=clip)
    assert watched.troubles == []


def main(logs: str, html: str, out: str) -> None:
    size = {"width": 1500, "height": 640}
    with tensorboard(Path(logs)) as url, browser() as chromium:
        explorer(chromium, Path(html), Path(out) / "explorer.png")
        with tempfile.TemporaryDirectory() as folder:
            search_report(chromium, searched(Path(folder)), Path(out) / "search_report.png")
        page = Watched(chromium, viewport=size, color_scheme="light", device_scale_factor=1.5).page
        curves = "?smoothing=0&tagFilter=(bound|KL_divergence|recon_loss)%2Fvalidation#timeseries"
        show(page, url + curves, "scalar-card")
        page.screenshot(path=Path(out) / "tensorboard1.png")
        show(page, url + "?tagFilter=random_samples#timeseries", "image-card img")
        over_epochs(page, "betas-beta-1", Path(out) / "tensorboard2.png", shown=(0, 2, 4))


if __name__ == "__main__":
    main(*sys.argv[1:])
