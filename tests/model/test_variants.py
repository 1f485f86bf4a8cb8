"""Each objective, prior and likelihood goes the whole way: train, stop, go on, evaluate, sample."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from conftest import rewrite_ckpt
from torch import nn

from vae_hyperband.common.errors import ConfigError, ResumeError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Split
from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate
from vae_hyperband.evaluation.results import Evaluation
from vae_hyperband.evaluation.samplers import SamplerConfig
from vae_hyperband.model.checkpoint import load_ckpt, load_model
from vae_hyperband.model.vae import VAE
from vae_hyperband.reporting.tables import evaluation_text
from vae_hyperband.training.loop import fit

VARIANTS = {
    "free bits": {"objective": "free-bits", "free_bits": 0.5},
    "capacity": {"objective": "capacity", "capacity": 3.0, "beta": 10.0},
    "beta-TC": {"objective": "beta-tc", "beta": 4.0},
    "IWAE": {"objective": "iwae", "train_samples": 3},
    "cycles": {"kl_cycles": 2},
    "VampPrior": {"prior": "vamp", "pseudo_inputs": 7},
    "IWAE with VampPrior": {"objective": "iwae", "prior": "vamp", "pseudo_inputs": 7},
    "capacity with VampPrior": {"objective": "capacity", "prior": "vamp", "pseudo_inputs": 7},
    "continuous Bernoulli": {"likelihood": "continuous-bernoulli"},
    "discretised logistic": {"likelihood": "discretized-logistic"},
    "Gaussian": {"likelihood": "gaussian", "sigma": 0.3},
    "learned Gaussian": {"likelihood": "learned-gaussian"},
    "Laplace": {"likelihood": "laplace"},
    "bits": {"binarize": "dynamic"},
}
QUICK = SamplerConfig(components=1, flow_epochs=1, flow_width=8, flow_depth=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_goes_the_whole_way(name, small_config, options, small_data):
    config = dataclasses.replace(small_config, epochs=2, **VARIANTS[name])
    straight = fit(config, options(run="straight"), quiet=True)
    steps = itertools.count(1)
    assert not fit(
        config, options(run="stopped"), should_stop=lambda: next(steps) >= 5, quiet=True
    ).finished
    stopped = fit(config, options(run="stopped"), quiet=True)
    ours, theirs = (run.state.model.state_dict() for run in (straight, stopped))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    plain = fit(dataclasses.replace(small_config, epochs=2), options(run="plain"), quiet=True)
    weight = "decoder.conv_t2.weight"
    assert not torch.equal(ours[weight], plain.state.model.state_dict()[weight])
    for key in ours:  # everything that is learned has moved
        if "log_scale" in key or "vamp" in key:
            first = load_first(config, key)
            assert not torch.equal(ours[key], first)

    asked = EvaluateOptions(iwae_samples=3, sampler=QUICK)
    report = evaluate(straight.best, "validation", small_data, "cpu", asked)
    assert math.isfinite(report["bound"]["mean"])
    assert report["iwae"]["mean"] < report["bound"]["mean"] + 1
    assert report["bound"]["mean"] == pytest.approx(straight.state.best["bound"], rel=1e-6)
    grey_bernoulli = config.likelihood == "bernoulli"
    assert ("entropy_floor" in report.to_dict()) == grey_bernoulli
    in_bits = not grey_bernoulli or config.binarize != "none"
    assert ("bits_per_dimension" in report.to_dict()) == in_bits
    assert ("bits per dimension" in report["protocol"]) == in_bits
    assert ("bits per dimension" in evaluation_text(report)) == in_bits
    assert Evaluation.from_dict(json.loads(report.to_json()), "evaluation.json") == report
    assert config.likelihood in report["protocol"]
    images = load_model(straight.best).sample(5, generator(0, "test"))
    assert ((images >= 0) & (images <= 1)).all()
    assert load_ckpt(straight.best).config == config
    with pytest.raises(ResumeError, match="was trained with other settings"):
        fit(dataclasses.replace(small_config, epochs=2), options(run="straight"), quiet=True)


def load_first(config, key):
    from vae_hyperband.training.state import new_state

    return new_state(config, (1, 8, 8), 300).model.state_dict()[key]


def test_a_checkpoint_from_before_the_variants_is_still_read(small_config, options):
    trained = fit(small_config, options(), quiet=True)
    names = ("objective", "prior", "likelihood", "sigma", "pseudo_inputs", "kl_cycles", "binarize")
    rewrite_ckpt(trained.latest, lambda content: [content["config"].pop(name) for name in names])
    assert load_model(trained.latest).likelihood == "bernoulli"
    assert fit(small_config, options(), quiet=True).finished


#: How many levels the noise of each channel of :func:`colour_splits` covers.
SPREADS = torch.tensor([200.0, 50.0, 12.0])


def colour_splits():
    """Noise around grey, which no model can predict, with a spread of its own in each channel."""
    noise_NCHW = torch.rand(600, 3, 8, 8, generator=generator(0, "colour")) - 0.5
    x_NCHW = (128 + noise_NCHW * SPREADS[:, None, None]).byte()
    split = Split(x_NCHW, torch.zeros(600, dtype=torch.int64), "colour")
    return split, split.subset(torch.arange(20))


def test_each_channel_learns_its_own_scale(small_config, options):
    config = dataclasses.replace(
        small_config,
        epochs=20,
        val_interval=20,
        learning_rate=0.03,
        likelihood="discretized-logistic",
    )
    trained = fit(config, options(), splits=colour_splits(), quiet=True)
    found = load_model(trained.best).log_scale.exp().flatten()
    # a logistic distribution of that standard deviation; the noise is uniform, so only roughly
    expected = SPREADS / 255 / math.sqrt(12) * math.sqrt(3) / math.pi
    torch.testing.assert_close(found, expected, rtol=0.3, atol=0)


def test_a_model_of_colours_with_one_scale_is_still_read_and_goes_on(
    small_config, options, monkeypatch
):
    """As the first versions had it: one scale for all channels."""
    config = dataclasses.replace(small_config, epochs=2, likelihood="discretized-logistic")
    with monkeypatch.context() as patch:
        one = nn.Parameter
        patch.setattr(
            "vae_hyperband.model.vae.learned_log_scale",
            lambda likelihood, channels: one(torch.zeros(())),
        )
        whole = fit(config, options(run="whole"), splits=colour_splits(), quiet=True)
        steps = itertools.count(1)
        fit(
            config,
            options(),
            splits=colour_splits(),
            should_stop=lambda: next(steps) >= 3,
            quiet=True,
        )
    gone_on = fit(config, options(), splits=colour_splits(), quiet=True)
    assert load_model(gone_on.latest).log_scale.shape == ()
    assert gone_on.weights == whole.weights


@pytest.mark.parametrize("likelihood", ["learned-gaussian", "laplace"])
def test_images_that_are_reproduced_exactly_do_not_make_a_learned_scale_diverge(
    likelihood, small_config, options
):
    black = Split(torch.zeros(300, 1, 8, 8).byte(), torch.zeros(300, dtype=torch.int64), "black")
    config = dataclasses.replace(
        small_config, epochs=30, val_interval=30, learning_rate=0.1, likelihood=likelihood
    )
    trained = fit(config, options(), splits=(black, black), quiet=True)
    nats_per_pixel = trained.state.best["bound"] / 64
    # without a least scale, Laplace's were -12.7 here and still fell
    assert math.log(2 / (255 * math.sqrt(12))) < nats_per_pixel < -4


@pytest.mark.parametrize("sigma", [0.0, -0.1, 1e-4, 11.0, math.nan])
def test_a_sigma_that_no_pixel_has_is_refused(sigma, small_config):
    with pytest.raises(ConfigError, match="--sigma is"):
        dataclasses.replace(small_config, likelihood="gaussian", sigma=sigma)
    if not sigma > 0:
        with pytest.raises(ConfigError, match=r"sigma is .*greater than 0"):
            VAE(likelihood="gaussian", sigma=sigma)
