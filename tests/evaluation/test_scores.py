import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.evaluation.scores import above_entropy, auroc, nearest_codes, pixel_entropy


def test_the_area_is_the_share_of_pairs_in_order_ties_counted_half():
    random = torch.Generator().manual_seed(0)
    one = torch.randint(0, 12, (40,), generator=random).double() + 2
    other = torch.randint(0, 12, (70,), generator=random).double()
    pairs = (one[:, None] > other).double() + 0.5 * (one[:, None] == other).double()
    found = auroc(one, other)
    assert found.value == pytest.approx(pairs.mean().item(), abs=1e-12)
    labels = np.r_[np.ones(40), np.zeros(70)]
    assert found.value == pytest.approx(roc_auc_score(labels, torch.cat((one, other))), abs=1e-12)
    assert found.low < found.value < found.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Normal scores one standard deviation apart: the area is Phi(1 / sqrt(2)) = 0.7602."""
    covered = 0
    for seed in range(400):
        random = torch.Generator().manual_seed(seed)
        one, other = (torch.randn(num, generator=random) for num in (40, 60))
        found = auroc(one + 1, other)
        covered += found.low <= 0.76025 <= found.high
    # 95% of 400 is 380, with a standard deviation of 4.4
    assert 380 - 5 * 4.4 < covered < 380 + 4 * 4.4


def test_sets_that_are_told_apart_without_an_error_still_have_an_interval():
    found = auroc(torch.arange(30.0, 90.0), torch.arange(30.0))
    assert found.value == 1
    assert found.high == pytest.approx(1)
    assert found.low == pytest.approx(30 / (30 + 1.959964**2))  # Wilson's, 30 of 30
    assert auroc(torch.zeros(30), torch.ones(30)).low == 0
    low, high = auroc(torch.zeros(5), torch.zeros(5))[1:]
    assert low < 0.2
    assert high > 0.8


@pytest.mark.parametrize("num", [1, 2, 5, 10])
def test_the_interval_of_few_images_is_wide_enough(num):
    """Normal scores one standard deviation apart, against 200 ordinary ones."""
    covered = 0
    for seed in range(300):
        random = torch.Generator().manual_seed(seed)
        found = auroc(torch.randn(num, generator=random) + 1, torch.randn(200, generator=random))
        covered += found.low <= 0.76025 <= found.high
    assert covered >= 0.93 * 300


def test_the_nearest_codes_come_in_their_order():
    codes = torch.tensor([[5.0, 0], [0, 1], [0, 0], [3, 4]])
    distances, numbers = nearest_codes(torch.zeros(2), codes, 3)
    assert numbers[:2].tolist() == [2, 1]
    assert distances.tolist() == [0, 1, 5]


def test_the_entropy_of_grey_pixels_is_no_part_of_a_score():
    """Of the pixels' own means, the cross-entropy is the entropy: the score is 0 then."""
    x_BCHW = torch.rand(4, 1, 3, 3, dtype=torch.float64)
    x_BCHW[0] = x_BCHW[0].round()  # black and white: no entropy
    own = torch.nn.functional.binary_cross_entropy(x_BCHW, x_BCHW, reduction="none")
    assert torch.allclose(pixel_entropy(x_BCHW), own.flatten(1).sum(1), atol=1e-9)
    assert pixel_entropy(x_BCHW)[0] == 0
    assert above_entropy(TrainConfig())
    assert not above_entropy(TrainConfig(likelihood="laplace"))
    assert not above_entropy(TrainConfig(binarize="dynamic"))
