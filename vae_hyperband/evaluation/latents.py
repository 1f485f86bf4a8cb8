"""Measures of the latent space: dimensions in use, information, probes, disentanglement.

Shape suffixes: B images of a batch, N images of a split, Z latent dimensions, P training images,
F features.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vae_hyperband.common.randomness import generator
from vae_hyperband.evaluation.image_quality import nearest
from vae_hyperband.evaluation.results import Estimate, mean_and_error
from vae_hyperband.model.objective import kl_per_dimension
from vae_hyperband.model.priors import reparameterize
from vae_hyperband.model.vae import VAE

#: A dimension is active if its posterior mean has a variance over images above this
#: (Burda, Grosse & Salakhutdinov 2016, section 5.1).
ACTIVE_VARIANCE = 0.01

RIDGES = (0.01, 1.0)  # of the linear probe: scikit-learn's C, the stronger one first
RIDGE_IMAGES = 20_000  # that the ridge is chosen with, at most
ROUNDS, UNSCALED_ROUNDS = 50, 200  # of L-BFGS, at most
SCALING_IMAGES = 10_000  # for the coordinates of L-BFGS
MOST_SCALED = 1024  # features that get such coordinates
NEIGHBOURS = 10  # of the kNN probe
FEW = 100  # images at a time of :func:`encode_images`
CHUNK = 500  # rows of an N x N matrix at a time


class Posteriors(NamedTuple):
    """q(z|x) of every image of a split: means and log variances, on the CPU."""

    mu_NZ: Tensor
    logvar_NZ: Tensor

    def draw(self, seed: int, position: int = 0) -> Tensor:
        """One z per image, shape (N, Z); each position gives other samples."""
        noise_NZ = torch.randn(self.mu_NZ.shape, generator=generator(seed, "posterior", position))
        return reparameterize(self.mu_NZ, self.logvar_NZ, noise_NZ)


@torch.no_grad()
def encode_split(model: VAE, loader: Iterable[tuple[Tensor, Any]]) -> Posteriors:
    """The posteriors of a split, in the loader's order."""
    device = next(model.parameters()).device
    parts = [model.encode(x_BCHW.to(device)) for x_BCHW, _ in loader]
    mu_NZ, logvar_NZ = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Posteriors(mu_NZ, logvar_NZ)


def encode_images(model: VAE, images_NCHW: Tensor) -> Posteriors:
    """The posteriors of images in [0, 1], a few at a time: large ones take much memory."""
    return encode_split(model, ((x_BCHW, None) for x_BCHW in images_NCHW.split(FEW)))


def active_units(posteriors: Posteriors) -> int:
    """Number of dimensions whose mean depends on the image: variance of mu above 0.01."""
    return int((posteriors.mu_NZ.double().var(dim=0) > ACTIVE_VARIANCE).sum())


def information_per_dimension(model: VAE, posteriors: Posteriors) -> Tensor:
    """Nats about the image that each dimension carries, mean over images, shape (Z,).

    Under the standard normal prior, the dimension's KL. A VampPrior's KL is not a sum over
    dimensions: there it is the KL to the Gaussian that has the mean and the variance of all images'
    z together, which is 0 for a dimension whose posterior is the same for every image.
    """
    mu_NZ, logvar_NZ = posteriors
    if model.vamp is None:
        return kl_per_dimension(mu_NZ, logvar_NZ).mean(dim=0)
    _, variance_Z = aggregate(posteriors)
    return 0.5 * (variance_Z.log() - logvar_NZ.mean(dim=0))


def aggregate(posteriors: Posteriors) -> tuple[Tensor, Tensor]:
    """Mean and variance of z over all images' posteriors together, shape (Z,) each."""
    mu_NZ, logvar_NZ = posteriors
    return mu_NZ.mean(dim=0), logvar_NZ.exp().mean(dim=0) + mu_NZ.var(dim=0, correction=0)


def mutual_information(posteriors: Posteriors, z_NZ: Tensor) -> Estimate:
    """Mutual information of z and the image's index: mean log q(z|x) - log (1/N sum_i q(z|x_i)).

    Index-code mutual information (Hoffman & Johnson 2016), in nats. It cannot exceed log N, 9.21
    nats for 10,000 images; at that limit z identifies every image.
    """
    mu_NZ, logvar_NZ, z_NZ = (x.double() for x in (*posteriors, z_NZ))
    precision_NZ = (-logvar_NZ).exp()
    # the quadratic form of z and posterior i, as matrix products; log(2 pi) cancels
    weighted_NZ = mu_NZ * precision_NZ
    constant_N = (mu_NZ * weighted_NZ + logvar_NZ).sum(dim=1)
    about_N = []
    for start in range(0, len(z_NZ), CHUNK):
        z_BZ = z_NZ[start : start + CHUNK]
        square_BN = z_BZ.square() @ precision_NZ.T - 2 * z_BZ @ weighted_NZ.T + constant_N
        own_B = square_BN.diagonal(offset=start)
        log_mixture_B = (-0.5 * square_BN).logsumexp(dim=1) - math.log(len(z_NZ))
        about_N.append(-0.5 * own_B - log_mixture_B)
    return mean_and_error(torch.cat(about_N))


def linear_probe(
    train_PF: Tensor, labels_P: Tensor, held_out_NF: Tensor, labels_N: Tensor
) -> Estimate:
    """Accuracy of a logistic regression on standardised features, trained on the training split.

    The ridge (scikit-learn's C, 0.01 or 1) is chosen on a random tenth of the training images by
    fits to 20,000 others at most, separately for each kind of features: raw pixels need a stronger
    one than latents, and the baseline should be as good as possible. The chosen fit is where the
    fit to all training images starts. Needs two classes at least.
    """
    mean_F, std_F = train_PF.mean(dim=0), train_PF.std(dim=0).clamp(min=1e-6)
    # the last feature is 1, whose weight is the bias
    train_PF, held_out_NF = (
        F.pad((x_NF - mean_F) / std_F, (0, 1), value=1) for x_NF in (train_PF, held_out_NF)
    )
    classes_K, class_P = labels_P.unique(return_inverse=True)
    order_P = torch.randperm(len(labels_P), generator=generator(0, "probe"))
    chosen, rest = order_P.tensor_split([max(1, len(order_P) // 10)])
    rest = rest[:RIDGE_IMAGES]
    nothing_FK = torch.zeros(train_PF.shape[1], len(classes_K))

    def tried(ridge: float) -> tuple[float, Tensor]:
        found_FK = _fitted(train_PF[rest], class_P[rest], nothing_FK, penalty(ridge))
        right = (train_PF[chosen] @ found_FK).argmax(dim=1) == class_P[chosen]
        return right.double().mean().item(), found_FK

    def penalty(ridge: float) -> float:
        # of the mean loss; scikit-learn penalises one vector of two classes, here there are two
        return (2 if len(classes_K) == 2 else 1) / (ridge * len(labels_P))

    ridge, start_FK = RIDGES[0], nothing_FK
    if len(class_P[rest].unique()) > 1:
        scores = {ridge: tried(ridge) for ridge in RIDGES}
        ridge = max(scores, key=lambda ridge: scores[ridge][0])
        start_FK = scores[ridge][1]
    weight_FK = _fitted(train_PF, class_P, start_FK, penalty(ridge))
    return mean_and_error(classes_K[(held_out_NF @ weight_FK).argmax(dim=1)] == labels_N)


@torch.enable_grad()
def _fitted(x_PF: Tensor, class_P: Tensor, start_FK: Tensor, penalty: float) -> Tensor:
    """The weights, (F, K), of a logistic regression by L-BFGS from given ones; the last of the F
    features is 1, whose weights have no penalty.

    Its coordinates are those in which the features are uncorrelated (a bound of the Hessian,
    Boehning 1992): pixels then need half as many rounds. Many features stay as they are: the
    matrix of those of a 64x64 RGB image would take minutes, and gigabytes.
    """
    root_FF, turned_FK, rounds = None, start_FK.clone(), UNSCALED_ROUNDS
    if len(start_FK) <= MOST_SCALED:
        some_PF = x_PF[:SCALING_IMAGES].double()
        hessian_FF = some_PF.T @ some_PF / (len(some_PF) * start_FK.shape[1])
        hessian_FF.diagonal()[:-1] += penalty
        hessian_FF.diagonal().add_(1e-9)
        upper_FF = torch.linalg.cholesky(hessian_FF, upper=True)
        one_FF = torch.eye(len(upper_FF), dtype=upper_FF.dtype)
        root_FF = torch.linalg.solve_triangular(upper_FF, one_FF, upper=True).float()
        turned_FK, rounds = (upper_FF @ start_FK.double()).float(), ROUNDS
    turned_FK.requires_grad_()

    def weights() -> Tensor:
        return turned_FK if root_FF is None else root_FF @ turned_FK

    solver = torch.optim.LBFGS(
        [turned_FK], max_iter=rounds, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        weight_FK = weights()
        total = F.cross_entropy(x_PF @ weight_FK, class_P)
        total = total + penalty / 2 * weight_FK[:-1].square().sum()
        total.backward()
        return total

    solver.step(loss)
    return weights().detach()


def knn_probe(
    train_PF: Tensor, labels_P: Tensor, held_out_NF: Tensor, labels_N: Tensor
) -> Estimate:
    """Accuracy of the most frequent label of the ten nearest training images (Euclidean)."""
    found_N = labels_P[nearest(held_out_NF, train_PF, NEIGHBOURS)[1]].mode(dim=1).values
    return mean_and_error(found_N == labels_N)


# ---- How cleanly latent dimensions separate the known factors of synthetic garments.

NUM_BINS = 20  # of a latent dimension's values, for mutual information
VOTES, IMAGES_PER_VOTE = 800, 64  # of the FactorVAE score


def mutual_informations(mu_NZ: Tensor, levels_NF: Tensor) -> tuple[Tensor, Tensor]:
    """I(z_j; v_k) from histograms, and the factors' entropies: nats, shapes (Z, F) and (F,)."""
    informations, entropies = [], []
    for level_N in levels_NF.unbind(dim=1):
        p_V = level_N.bincount().double() / len(level_N)
        entropies.append(-torch.xlogy(p_V, p_V).sum())
        informations.append(torch.stack([_information(mu_N, level_N) for mu_N in mu_NZ.T]))
    return torch.stack(informations, dim=1), torch.stack(entropies)


def _information(mu_N: Tensor, level_N: Tensor) -> Tensor:
    low, high = mu_N.min(), mu_N.max()
    bin_N = ((mu_N - low) / (high - low).clamp(min=1e-12) * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    num_levels = int(level_N.max()) + 1
    joint = (bin_N * num_levels + level_N).bincount(minlength=NUM_BINS * num_levels)
    p = joint.view(NUM_BINS, num_levels).double() / len(mu_N)
    independent = p.sum(dim=1, keepdim=True) * p.sum(dim=0)
    return (torch.xlogy(p, p) - torch.xlogy(p, independent)).sum()


def mutual_information_gap(mu_NZ: Tensor, levels_NF: Tensor) -> float:
    """MIG, Chen et al. 2018, equation 6.

    For each factor the gap between the dimension that tells most about it and the next, as a share
    of its entropy; mean over factors.
    """
    information_ZF, entropy_F = mutual_informations(mu_NZ, levels_NF)
    if len(information_ZF) == 1:
        information_ZF = torch.cat((information_ZF, torch.zeros_like(information_ZF)))
    best, next_best = information_ZF.topk(2, dim=0).values
    return ((best - next_best) / entropy_F).mean().item()


def factor_vae_score(mu_NZ: Tensor, levels_NF: Tensor, seed: int = 0) -> float:
    """Kim & Mnih 2018, section 4: which dimension varies least where one factor is held fixed?

    Accuracy of the majority vote from that dimension to the factor, on 800 votes after 800 more
    that decided the majority; dimensions that carry nothing do not vote.
    """
    std_Z = mu_NZ.std(dim=0)
    used = std_Z > 0.05
    if not used.any():
        return 0.0
    z_NZ = (mu_NZ / std_Z)[:, used]
    stream = generator(seed, "factor votes")
    counts = torch.zeros(2, z_NZ.shape[1], levels_NF.shape[1])
    for vote in range(2 * VOTES):
        factor = int(torch.randint(levels_NF.shape[1], (), generator=stream))
        like = int(torch.randint(len(z_NZ), (), generator=stream))
        same = (levels_NF[:, factor] == levels_NF[like, factor]).nonzero()[:, 0]
        chosen = same[torch.randint(len(same), (IMAGES_PER_VOTE,), generator=stream)]
        counts[vote % 2, z_NZ[chosen].var(dim=0).argmin(), factor] += 1
    majority_Z = counts[0].argmax(dim=1)
    return (counts[1].gather(1, majority_Z[:, None]).sum() / counts[1].sum()).item()


def dci_disentanglement(mu_NZ: Tensor, levels_NF: Tensor, seed: int = 0) -> dict[str, float]:
    """Eastwood & Williams 2018: disentanglement, completeness and informativeness.

    Importances of the dimensions for each factor are those of a random forest (60 trees, half of
    the images). Disentanglement: does a dimension serve one factor only? Completeness: is a factor
    in one dimension only? Informativeness: accuracy of the forests on the other half.
    """
    # scikit-learn takes a second to import, and every worker of a search imports this
    from sklearn.ensemble import RandomForestClassifier

    half = len(mu_NZ) // 2
    importances, accuracies = [], []
    for level_N in levels_NF.unbind(dim=1):
        # every split considers all dimensions: a random subset may hold only useless ones
        forest = RandomForestClassifier(
            60, max_features=None, min_samples_leaf=5, random_state=seed & 0xFFFFFFFF
        )
        forest.fit(mu_NZ[:half].numpy(), level_N[:half].numpy())
        importances.append(torch.from_numpy(forest.feature_importances_))
        accuracies.append(forest.score(mu_NZ[half:].numpy(), level_N[half:].numpy()))
    importance_ZF = torch.stack(importances, dim=1)
    by_dimension_Z, by_factor_F = importance_ZF.sum(dim=1), importance_ZF.sum(dim=0)
    return {
        "disentanglement": _purity(importance_ZF, by_dimension_Z),
        "completeness": _purity(importance_ZF.T, by_factor_F),
        "informativeness": sum(accuracies) / len(accuracies),
    }


def _purity(importance: Tensor, weights: Tensor) -> float:
    """1 minus the rows' entropy, relative to that of an even row; weighted mean over rows."""
    if importance.shape[1] == 1:
        return 1.0
    p = importance / importance.sum(dim=1, keepdim=True).clamp(min=1e-12)
    evenness = -torch.xlogy(p, p).sum(dim=1) / torch.tensor(float(importance.shape[1])).log()
    return ((1 - evenness) * weights).sum().item() / max(weights.sum().item(), 1e-12)
