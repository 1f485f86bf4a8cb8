"""FID and its kin against closed forms, slow loops and simulation."""

import math
import statistics

import numpy as np
import pytest
import scipy.linalg
import torch

from vae_hyperband.common.randomness import generator
from vae_hyperband.evaluation import image_quality
from vae_hyperband.evaluation.image_quality import (
    Moments,
    copying,
    frechet,
    frechet_distance,
    kernel_distance,
    manifold_measures,
    moments,
    nearest,
)
from vae_hyperband.evaluation.results import Estimate, mean_and_error


def normal(num, dim, seed, shift=0.0, scale=1.0):
    return torch.randn(num, dim, generator=generator(seed, "test")) * scale + shift


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    """|m1 - m2|^2 + sum (s1 - s2)^2: Dowson & Landau 1982."""
    one = Moments(torch.tensor([0.0, 1, 2]).double(), torch.tensor([1.0, 4, 9]).double().diag())
    other = Moments(torch.tensor([1.0, 1, 0]).double(), torch.tensor([4.0, 4, 1]).double().diag())
    assert frechet(one, other) == pytest.approx((1 + 0 + 4) + (1 + 0 + 4), rel=1e-12)
    assert frechet(other, one) == pytest.approx(frechet(one, other), rel=1e-12)
    assert frechet(one, one) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_agrees_with_the_general_matrix_root():
    one, other = moments(normal(300, 6, 1) @ normal(6, 6, 2)), moments(normal(200, 6, 3, 0.5, 2))
    for covariance in (one.covariance_FF, other.covariance_FF):
        assert covariance.dtype == torch.float64
    root = scipy.linalg.sqrtm((one.covariance_FF @ other.covariance_FF).numpy()).real
    difference = (one.mean_F - other.mean_F).numpy()
    traces = np.trace(one.covariance_FF.numpy() + other.covariance_FF.numpy() - 2 * root)
    assert frechet(one, other) == pytest.approx(difference @ difference + traces, rel=1e-9)


def test_moments_are_numpy_s():
    x = normal(50, 4, 1)
    assert np.allclose(moments(x).mean_F, x.double().numpy().mean(axis=0))
    assert np.allclose(moments(x).covariance_FF, np.cov(x.double().numpy(), rowvar=False))


def test_frechet_distance_of_singular_covariances_is_finite():
    flat = torch.cat((normal(40, 2, 1), torch.zeros(40, 3)), dim=1)
    assert frechet(moments(flat), moments(flat)) == pytest.approx(0, abs=1e-9)


def test_the_bootstrap_error_is_the_spread_over_independent_draws():
    def draw(seed):
        return frechet_distance(normal(400, 5, 2 * seed), normal(400, 5, 2 * seed + 1, 0.5), seed)

    found = [draw(seed) for seed in range(60)]
    spread = statistics.stdev(value.mean for value in found)
    said = statistics.fmean(value.standard_error for value in found)
    assert 0.7 < said / spread < 1.4


def test_nearest_is_what_a_loop_finds():
    one, other = normal(7, 3, 1), normal(2100, 3, 2)
    distances, indices = nearest(one, other, 3)
    for row, point in enumerate(one):
        by_hand = [((point - other_point) ** 2).sum().sqrt().item() for other_point in other]
        order = sorted(range(len(other)), key=by_hand.__getitem__)[:3]
        assert indices[row].tolist() == order
        assert distances[row].tolist() == pytest.approx([by_hand[i] for i in order], rel=1e-3)
    assert nearest(one, other[:2], 5)[0].shape == (7, 2)


def test_manifold_measures_are_what_loops_find():
    """Kynkaanniemi et al. 2019, equations 1 to 3; Naeem et al. 2020, equations 2 to 5."""
    real, fake = normal(40, 2, 1).numpy(), normal(30, 2, 2, 0.7, 0.6).numpy()

    def distance(a, b):
        return math.dist(a, b)

    def radius(points, at):
        return sorted(distance(points[at], other) for i, other in enumerate(points) if i != at)[4]

    real_radius = [radius(real, i) for i in range(len(real))]
    fake_radius = [radius(fake, i) for i in range(len(fake))]
    inside = np.array(
        [[distance(f, r) < d for r, d in zip(real, real_radius, strict=True)] for f in fake]
    )
    covers = np.array(
        [[distance(f, r) < d for f, d in zip(fake, fake_radius, strict=True)] for r in real]
    )
    expected = {
        "precision": inside.any(axis=1).mean(),
        "recall": covers.any(axis=1).mean(),
        "density": inside.sum(axis=1).mean() / 5,
        "coverage": inside.any(axis=0).mean(),
    }
    found = manifold_measures(torch.from_numpy(real), torch.from_numpy(fake))
    assert {name: value.mean for name, value in found.items()} == pytest.approx(expected)
    assert 0 < expected["recall"] < expected["precision"] < 1  # so that they are told apart
    p = expected["precision"]
    assert found["precision"].standard_error == pytest.approx(math.sqrt(p * (1 - p) / 29))


def with_copies(num, dim, seed):
    """Two sets far from 0, where |x|^2 + |y|^2 - 2xy cancels, with equal vectors in and between."""
    real = normal(num, dim, seed, shift=3.0)
    real[num // 2 : num // 2 + num // 4] = real[: num // 4]
    real[-64:] = real[-8:].repeat(8, 1)  # balls of radius 0
    fake = torch.cat((real[num // 4 : num // 2 + 20], normal(num // 2, dim, seed + 1, shift=3.0)))
    fake = torch.cat((fake, real[-40:]))
    fake[-50] = torch.nextafter(torch.tensor(8.0), torch.tensor(0.0))  # rounds up to a power of 2
    return real, fake


@pytest.mark.parametrize("dim", [1, 3, 64, 128, 2048])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_equal_vectors_are_exactly_0_apart(dim, scale):
    real = scale * with_copies(240, dim, 1)[0]
    order = torch.randperm(len(real), generator=generator(3, "test"))
    assert nearest(real, real[order], 1)[0].eq(0).all()
    assert nearest(real[:56], real, 2)[0].eq(0).all()  # twice in the set
    if dim > 1:
        assert nearest(real[60:120], real, 2)[0][:, 1].gt(0).all()
    doubled = real.double() + 1e-9
    before = doubled.clone()
    nearest(doubled, doubled, 1)
    assert torch.equal(doubled, before)


@pytest.mark.parametrize("dim", [4, 128, 2048])
def test_equal_distances_are_equal_wherever_they_stand(dim):
    """A copy of a real image lies on the ball that it spans, not in it: no ties are broken.

    The oracle takes differences in float64, in which equal vectors have equal distances. The
    library prdc 0.2 agrees with it.
    """
    real, fake = with_copies(240, dim, 1)
    found = manifold_measures(real, fake)

    def distances(one, other):
        mode = "donot_use_mm_for_euclid_dist"
        return torch.cdist(one.double(), other.double(), compute_mode=mode)

    radius_N, radius_M = (distances(x, x).sort(dim=1).values[:, 5] for x in (real, fake))
    apart_MN = distances(fake, real)
    inside_MN = apart_MN < radius_N
    expected = {
        "precision": inside_MN.any(dim=1),
        "recall": (apart_MN < radius_M[:, None]).any(dim=0),
        "density": inside_MN.sum(dim=1) / 5,
        "coverage": inside_MN.any(dim=0),
    }
    assert radius_N.eq(0).sum() == 64
    assert (apart_MN == radius_N).sum() > 200  # ties
    assert {name: value.mean for name, value in found.items()} == pytest.approx(
        {name: value.double().mean().item() for name, value in expected.items()}, rel=1e-7
    )


def closer(generated_MF, held_out_NF, train_PF):
    """Whether generated vectors are nearer to the training set than held-out ones."""
    sets = (nearest(x, train_PF, 1)[0][:, 0] for x in (generated_MF, held_out_NF))
    return copying(*sets)["closer_than_held_out"]


def test_copies_are_told_from_new_images():
    train, held_out = normal(2000, 4, 1), normal(500, 4, 2)
    copied = closer(train[:500] + 1e-3, held_out, train)
    assert copied.mean > 0.95
    new = closer(normal(500, 4, 3), held_out, train)
    assert abs(new.mean - 0.5) < 4 * new.standard_error
    far = closer(normal(500, 4, 3, scale=3), held_out, train)
    assert far.mean < 0.3


def test_the_error_of_copying_is_the_spread_over_independent_draws():
    train = normal(500, 3, 0)
    found = [
        closer(normal(100, 3, 2 * seed + 1), normal(150, 3, 2 * seed + 2), train)
        for seed in range(80)
    ]
    spread = statistics.stdev(value.mean for value in found)
    said = statistics.fmean(value.standard_error for value in found)
    assert 0.75 < said / spread < 1.33


def test_mean_and_error_of_one_value_has_no_error():
    assert mean_and_error(torch.tensor([1.0, 3.0])) == Estimate(2.0, 1.0)
    assert math.isnan(mean_and_error(torch.tensor([1.0])).standard_error)


def kernel_distance_by_loops(real, fake):
    """Binkowski et al. 2018, equation 4: every pair of different vectors."""

    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    def within(points):
        num = len(points)
        pairs = [(i, j) for i in range(num) for j in range(num) if i != j]
        return sum(kernel(points[i], points[j]) for i, j in pairs) / (num * (num - 1))

    between = sum(kernel(x, y) for x in real for y in fake) / (len(real) * len(fake))
    return within(real) + within(fake) - 2 * between


def test_kid_and_its_error_are_what_loops_find():
    real, fake = normal(43, 3, 1).double(), normal(65, 3, 2, 0.5).double()
    found = kernel_distance(real, fake)
    assert found.mean == pytest.approx(kernel_distance_by_loops(real, fake), rel=1e-9)
    again = []
    for block in range(20):
        sets = (x[torch.arange(len(x)) % 20 != block] for x in (real, fake))
        again.append(kernel_distance_by_loops(*sets))
    expected = math.sqrt(19 * statistics.pvariance(again))
    assert found.standard_error == pytest.approx(expected, rel=1e-6)
    assert kernel_distance(real, fake[:3]) is None


def test_kid_is_unbiased_and_its_error_is_the_spread_over_independent_draws():
    """Of equal distributions its mean is 0, from 30 vectors as from 3,000; the FID's is not."""

    def draw(seed, shift):
        return kernel_distance(normal(30, 4, 2 * seed), normal(40, 4, 2 * seed + 1, shift))

    same = [draw(seed, 0) for seed in range(200)]
    spread = statistics.stdev(value.mean for value in same)
    assert abs(statistics.fmean(value.mean for value in same)) < 3 * spread / math.sqrt(200)
    assert min(value.mean for value in same) < 0
    said = statistics.fmean(value.standard_error for value in same)
    assert 0.9 < said / spread < 1.8  # conservative where the kernels are degenerate
    fids = [
        frechet(moments(normal(30, 4, 2 * seed)), moments(normal(40, 4, 2 * seed + 1)))
        for seed in range(20)
    ]
    assert statistics.fmean(fids) > 5 * statistics.stdev(fids) / math.sqrt(20)
    apart = [draw(seed, 1.0) for seed in range(200)]
    spread = statistics.stdev(value.mean for value in apart)
    said = statistics.fmean(value.standard_error for value in apart)
    assert 0.75 < said / spread < 1.35
    truth = kernel_distance(normal(4000, 4, 1), normal(4000, 4, 2, 1.0))
    error = math.hypot(spread / math.sqrt(200), truth.standard_error)
    assert abs(statistics.fmean(value.mean for value in apart) - truth.mean) < 4 * error


def test_blocks_of_rows_do_not_change_kid(monkeypatch):
    real, fake = normal(300, 5, 1), normal(200, 5, 2, 0.3)
    whole = kernel_distance(real, fake)
    monkeypatch.setattr(image_quality, "KERNEL_ROWS", 7)
    parts = kernel_distance(real, fake)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-9)
    assert parts.standard_error == pytest.approx(whole.standard_error, rel=1e-9)
