"""Drawn garments and the measures that need their factors."""

import math

import pytest
import torch

from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import load_split, synthetic_split
from vae_hyperband.data.synthetic import FACTORS, NUM_SYNTHETIC, render_garments, sample_factors
from vae_hyperband.evaluation.latents import (
    dci_disentanglement,
    factor_vae_score,
    mutual_information_gap,
    mutual_informations,
)


def test_drawn_splits_are_always_the_same_and_never_share_an_order():
    splits = [load_split(name, dataset="drawn") for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == list(NUM_SYNTHETIC.values())
    for split in splits:
        assert split.image_shape == (1, 28, 28)
        assert split.images_NCHW.dtype == torch.uint8
        assert split.labels_N.unique().tolist() == [0, 1, 2]
    assert len({split.digest for split in splits}) == 3
    # bytes that a later version must still draw
    assert splits[2].digest.startswith("696c707f16587593")


def test_any_number_of_garments_begins_with_the_same_ones():
    few, many = synthetic_split("train", 700), synthetic_split("train", 1200)
    assert len(many) == 1200
    assert torch.equal(many.images_NCHW[:700], few.images_NCHW)
    assert torch.equal(sample_factors("train", 10), sample_factors("train", 20)[:10])
    assert torch.equal(sample_factors("test", 3600)[3500:], sample_factors("test", 100))


def test_no_held_out_garment_is_a_training_garment():
    images = {
        name: {image.numpy().tobytes() for image in synthetic_split(name).images_NCHW}
        for name in NUM_SYNTHETIC
    }
    assert [len(found) for found in images.values()] == list(NUM_SYNTHETIC.values())
    assert not images["train"] & images["validation"]
    assert not images["train"] & images["test"]
    assert not images["validation"] & images["test"]


def test_factors_are_even_and_independent():
    levels_NF = sample_factors("train", 10_000)
    for factor, level_N in zip(FACTORS, levels_NF.T, strict=True):
        shares = level_N.bincount() / 10_000
        assert len(shares) == factor.levels
        assert (shares * factor.levels).tolist() == pytest.approx([1] * factor.levels, abs=0.1)
    correlations = levels_NF.double().T.corrcoef() - torch.eye(len(FACTORS))
    assert correlations.abs().max() < 0.05


def measure(levels):
    """Width of the waist, last row, width of the sleeves' row, brightest pixel, centre of mass."""
    image = render_garments(torch.tensor([levels]))[0, 0].double()
    columns = (image > 20).sum(dim=1)
    rows = (columns > 0).nonzero()[:, 0]
    weights = image.sum(dim=0)
    centre = (weights * torch.arange(28)).sum() / weights.sum()
    return {
        "width": columns[13].item(),
        "length": rows.max().item(),
        "sleeve": columns[6:12].max().item(),
        "shade": image.max().item(),
        "position": centre.item(),
    }


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("name", ["width", "length", "sleeve", "shade", "position"])
def test_each_factor_changes_what_it_is_named_after(kind, name):
    at = [factor.name for factor in FACTORS].index(name)
    base = [kind, 2, 4, 0, 4, 2]
    found = []
    for level in range(FACTORS[at].levels):
        levels = list(base)
        levels[at] = level
        found.append(measure(levels)[name])
    assert found == sorted(found)
    assert found[-1] > found[0] + 0.5


def test_kinds_are_told_apart_and_nothing_leaves_the_picture():
    top, dress, coat = (render_garments(torch.tensor([[k, 3, 3, 3, 5, 2]]))[0, 0] for k in range(3))
    assert (dress > 20).sum() > (top > 20).sum()  # flared
    assert coat[14, 12:16].min() < 0.5 * top[14, 12:16].min()  # open in front
    edge = render_garments(sample_factors("train", 3000)).float()
    border = torch.cat((edge[..., 0, :], edge[..., -1, :]), dim=-1)
    assert border.max() == 0  # above and below


def separate(num=4000):
    """Each factor in a dimension of its own, and one dimension of nothing."""
    levels_NF = sample_factors("test", num)
    noise_N1 = torch.randn(num, 1, generator=generator(0, "test"))
    return torch.cat((levels_NF.float(), noise_N1 * 0.01), dim=1), levels_NF


def mixed(num=4000):
    """Every dimension a rotation of all factors."""
    levels_NF = sample_factors("test", num)
    spread = levels_NF.float() / levels_NF.float().std(dim=0)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator(0, "test"))).Q
    return spread @ rotation, levels_NF


def test_mutual_information_of_a_copy_is_the_entropy():
    mu_NZ, levels_NF = separate()
    information_ZF, entropy_F = mutual_informations(mu_NZ, levels_NF)
    assert entropy_F.tolist() == pytest.approx([math.log(f.levels) for f in FACTORS], abs=0.01)
    assert information_ZF[:6].diagonal().tolist() == pytest.approx(entropy_F.tolist(), rel=1e-6)
    others = information_ZF - torch.cat((information_ZF[:6].diagonal().diag(), torch.zeros(1, 6)))
    assert others.abs().max() < 0.03


@pytest.mark.parametrize(
    ("measure_of", "at_most"),
    [
        (mutual_information_gap, 0.2),
        (factor_vae_score, 0.9),  # it forgives a rotation: one dimension still varies least
        (lambda *at: dci_disentanglement(*at)["disentanglement"], 0.5),
        (lambda *at: dci_disentanglement(*at)["completeness"], 0.5),
    ],
)
def test_measures_are_high_where_factors_are_apart_and_low_where_they_are_mixed(
    measure_of, at_most
):
    apart, together = measure_of(*separate()), measure_of(*mixed())
    assert apart > 0.95
    assert together < at_most
    assert measure_of(*separate()) == apart  # no hidden randomness
    nothing = torch.zeros(4000, 6), separate()[1]
    assert measure_of(*nothing) < 0.25


def test_the_factor_vae_score_does_not_depend_on_scales_nor_on_its_own_votes():
    apart_NZ, levels_NF = separate()
    mu_NZ = apart_NZ + 0.3 * torch.randn(apart_NZ.shape, generator=generator(3, "test"))
    scales = torch.tensor([1.0, 100.0, 0.5, 20.0, 3.0, 7.0, 1.0])
    assert factor_vae_score(mu_NZ * scales, levels_NF) > 0.95
    noise_NZ = torch.randn(4000, 80, generator=generator(1, "test"))  # ten votes a dimension
    assert factor_vae_score(noise_NZ, levels_NF) < 0.22  # 1/6; on its own votes about 0.35


def test_a_factor_in_two_dimensions_is_incomplete_not_entangled():
    mu_NZ, levels_NF = separate()
    stream = generator(2, "test")
    half_N = torch.rand(len(mu_NZ), generator=stream) < 0.5  # each says it half of the time
    width_N = mu_NZ[:, 1]
    two_N2 = torch.stack((torch.where(half_N, width_N, -1), torch.where(half_N, -1, width_N)), 1)
    found = dci_disentanglement(torch.cat((mu_NZ[:, [0, 2, 3, 4, 5]], two_N2), dim=1), levels_NF)
    assert found["disentanglement"] > 0.95
    assert found["completeness"] < 0.95


def test_informativeness_does_not_mind_a_rotation_as_much():
    assert dci_disentanglement(*separate())["informativeness"] > 0.99
    assert dci_disentanglement(*mixed())["informativeness"] > 0.4
    one = torch.randn(400, 1, generator=generator(0, "test")), sample_factors("test", 400)
    assert mutual_information_gap(*one) < 0.2  # a single dimension
