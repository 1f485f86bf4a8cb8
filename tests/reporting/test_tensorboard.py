"""TensorBoard over a real run, looked at in a real browser."""

import dataclasses
import json
import urllib.request

import pytest
from chromium import Watched, until
from screenshots import tensorboard

from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.reporting.summaries import print_training_summary
from vae_hyperband.training.loop import fit

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory, small_data):
    folder = tmp_path_factory.mktemp("tensorboard")
    one = TrainConfig(dataset="custom", latent_dim=4, batch_size=32, epochs=2, seed=3)
    for name, config in {"one": one, "two": dataclasses.replace(one, beta=4.0)}.items():
        where = RunOptions(
            run=name, device="cpu", num_threads=1, data_dir=small_data, log_interval=4,
            checkpoints_dir=folder / "checkpoints", logs_dir=folder / "logs",
        )  # fmt: skip
        print_training_summary(fit(config, where, quiet=True), where)
    with tensorboard(folder / "logs") as url:
        yield url


@pytest.fixture
def page(address, chromium):
    watched = Watched(chromium, viewport={"width": 1400, "height": 1400})
    yield watched.page
    assert all(url.startswith((address, "data:", "blob:")) for url in watched.requests)
    watched.context.close()


def asked(url):
    return json.load(urllib.request.urlopen(url, timeout=10))


def test_the_promised_scalars_of_both_runs_are_shown(address, page):
    page.goto(f"{address}?tagFilter=validation#timeseries")
    for tag in ("recon_loss", "KL_divergence", "total_loss", "bound"):
        page.get_by_text(f"{tag}/validation", exact=True).first.wait_for(timeout=60_000)
    for run in ("one", "two"):
        page.get_by_text(run, exact=True).first.wait_for()


def test_inputs_reconstructions_and_samples_are_shown(address, page):
    page.goto(f"{address}?tagFilter=images#timeseries")
    until(page, "document.querySelectorAll('image-card img').length >= 6")
    images = "[...document.querySelectorAll('image-card img')]"
    until(page, f"{images}.every(image => image.naturalWidth === 82)")
    for kind in ("input", "reconstruction", "random_samples"):
        page.get_by_text(f"images/{kind}", exact=True).first.wait_for()


def test_text_histograms_and_projector_have_what_the_run_wrote(address, page):
    plugins = asked(f"{address}data/plugins_listing")
    assert all(plugins[name]["enabled"] for name in ("text", "histograms", "projector", "hparams"))
    assert asked(f"{address}data/plugin/projector/runs") == ["one", "two"]
    info = asked(f"{address}data/plugin/projector/info?run=one")
    assert info["embeddings"][0]["tensorShape"] == [60, 4]
    name = info["embeddings"][0]["tensorName"].replace(" ", "%20")
    sprite = f"{address}data/plugin/projector/sprite_image?run=one&name={name}"
    assert urllib.request.urlopen(sprite, timeout=10).read().startswith(b"\x89PNG")
    tags = asked(f"{address}data/plugin/histograms/tags")
    assert "KL_per_dimension" in tags["one"]
    text = urllib.request.urlopen(
        f"{address}data/plugin/text/text?run=two&tag=configuration%2Ftext_summary", timeout=10
    ).read()
    assert b"--beta 4.0" in text


def test_the_table_of_hyperparameters_has_both_runs_and_their_bounds(address, page):
    page.goto(f"{address}#hparams")
    page.get_by_text("best_bound").first.wait_for(timeout=60_000)
