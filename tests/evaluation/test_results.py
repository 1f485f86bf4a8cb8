"""The type of an evaluation, and its file."""

import json
from pathlib import Path

import pytest

from vae_hyperband.common.errors import ConfigError
from vae_hyperband.evaluation.results import Estimate, Evaluation

#: Written by version 0.1, with all parts.
WRITTEN = (Path(__file__).parents[1] / "golden/evaluation.json").read_text()


def test_a_file_of_version_0_1_is_read_and_written_as_it_was():
    found = Evaluation.from_dict(json.loads(WRITTEN), "evaluation.json")
    assert found.likelihood.iwae.num_images == 20
    assert found.latents.raw_pixels.linear_probe == Estimate(1.0, 0.0)
    assert list(found.images.kinds) == ["real", "reconstructions", "prior", "mixture", "flow"]
    assert found.images.kinds["real"].closer_than_held_out is None
    assert found.to_json() == WRITTEN
    assert found["bound"]["mean"] == found.likelihood.bound.mean


def broken(*keys, value):
    content = json.loads(WRITTEN)
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return content


@pytest.mark.parametrize(
    "content",
    [
        {},
        broken("epoch", value=None),
        broken("recon_loss", value=None),
        broken("bound", "mean", value="240"),
        broken("latents", value=[]),
        broken("images", "flow", "fid", value=None),
        broken("images", "flow", value=3),
    ],
)
def test_anything_else_is_no_evaluation(content):
    with pytest.raises(ConfigError, match=r"e\.json is not an evaluation of this version"):
        Evaluation.from_dict(content, "e.json")


def test_an_estimate_is_formatted_with_its_error():
    assert f"{Estimate(240.514, 0.876):.2f}" == "240.51 +- 0.88"
