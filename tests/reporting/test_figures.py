"""Figures and animations of images that are not square."""

import pytest
import torch
from PIL import Image

from vae_hyperband.evaluation.latents import encode_images
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.reporting import figures
from vae_hyperband.reporting.animations import LARGEST_SIDE, Walk, latent_walk


@pytest.mark.parametrize("size", [(8, 8), (32, 12), (12, 32)])
def test_the_rows_of_a_traversal_are_beside_their_labels(size, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figure)
    model = initialized_vae(latent_dim=5, image_size=size, channels=3, seed=0, widths=(2,))
    figure = figures.traversal(model, torch.rand(6, 3, *size), tmp_path / "x.png")
    [axes] = figure.axes
    [shown] = axes.images
    row = (shown.get_array().shape[0] - 2) / 5  # an image and a margin; one more margin at the end
    for number, label in enumerate(axes.texts):
        assert number * row < label.get_position()[1] < (number + 1) * row
    assert len(axes.texts) == 5


@pytest.mark.parametrize(("size", "scale"), [((28, 28), 3), ((20, 220), 2), ((300, 100), 1)])
def test_an_animation_fits_a_screen(size, scale, tmp_path):
    model = initialized_vae(latent_dim=2, image_size=size, channels=1, seed=0, widths=(1,))
    posteriors = encode_images(model, torch.rand(8, 1, *size))
    walk = Walk(walkers=4, num_stops=2, frames_per_leg=1)
    with Image.open(latent_walk(model, posteriors, tmp_path / "x.gif", walk=walk)) as picture:
        width, height = picture.size
    assert (height, width) == tuple(scale * (2 * (side + 2) + 2) for side in size)
    assert max(width, height) <= LARGEST_SIDE
