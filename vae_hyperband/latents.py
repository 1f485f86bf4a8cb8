"""What the latent space holds: which dimensions are used, how much they say, what can be read off.

Shape suffixes: B images of a batch, N images of a split, Z latent dimensions, P training images,
F features.
"""

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vae_hyperband.distances import Measured, mean_and_error, nearest
from vae_hyperband.model import VAE, reparameterize
from vae_hyperband.objective import kl_per_dimension
from vae_hyperband.randomness import generator

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

#: A dimension is active if its posterior mean has a variance over images above this
#: (Burda, Grosse & Salakhutdinov 2016, section 5.1).
ACTIVE_VARIANCE = 0.01

RIDGES = (0.01, 1.0)  # of the linear probe: scikit-learn's C, the stronger one first
NEIGHBOURS = 10  # of the kNN probe
FEW = 100  # images at a time, where there are not many
CHUNK = 500  # rows of an N x N matrix at a time


class Posteriors(NamedTuple):
    """q(z|x) of every image of a split: means and log variances, on the CPU."""

    mu_NZ: Tensor
    logvar_NZ: Tensor

    def draw(self, seed: int, position: int = 0) -> Tensor:
        """One z per image, shape (N, Z); each position is another draw."""
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


def kl_by_dimension(posteriors: Posteriors) -> list[Measured]:
    """Mean KL to the standard normal in nats, one per dimension, each with its standard error."""
    kl_NZ = kl_per_dimension(posteriors.mu_NZ.double(), posteriors.logvar_NZ.double())
    return [mean_and_error(kl_N) for kl_N in kl_NZ.unbind(dim=1)]


def mutual_information(posteriors: Posteriors, z_NZ: Tensor) -> Measured:
    """Nats that z says about which image it is of: mean log q(z|x) - log (1/N sum_i q(z|x_i)).

    Hoffman & Johnson 2016's index-code mutual information. It cannot exceed log N, 9.21 nats for
    10,000 images: there it says only that every image has a place of its own.
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
) -> Measured:
    """Accuracy of a logistic regression on standardised features, trained on the training split.

    200 rounds of L-BFGS. How strong its ridge is (scikit-learn's C, 0.01 or 1) is chosen on a
    random tenth of the training images, for each kind of features by itself: raw pixels need more
    of it than latents, and a baseline should be as good as it can be. The training images have to
    be of two classes at least.
    """
    mean_F, std_F = train_PF.mean(dim=0), train_PF.std(dim=0).clamp(min=1e-6)
    train_PF, held_out_NF = (train_PF - mean_F) / std_F, (held_out_NF - mean_F) / std_F
    probe = _fitted(train_PF, labels_P, _best_ridge(train_PF, labels_P))
    return mean_and_error(torch.from_numpy(probe.predict(held_out_NF.numpy())) == labels_N)


def _best_ridge(features_PF: Tensor, labels_P: Tensor) -> float:
    order_P = torch.randperm(len(labels_P), generator=generator(0, "probe"))
    chosen, rest = order_P.tensor_split([max(1, len(order_P) // 10)])
    if len(labels_P[rest].unique()) == 1:
        return RIDGES[0]
    scores = {
        ridge: _fitted(features_PF[rest], labels_P[rest], ridge).score(
            features_PF[chosen].numpy(), labels_P[chosen].numpy()
        )
        for ridge in RIDGES
    }
    return max(scores, key=lambda ridge: scores[ridge])


def _fitted(features_PF: Tensor, labels_P: Tensor, ridge: float) -> "LogisticRegression":
    # scikit-learn takes a second to import, and every worker of a search imports this
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():  # the number of rounds is part of the protocol
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=ridge, max_iter=200).fit(features_PF.numpy(), labels_P.numpy())


def knn_probe(
    train_PF: Tensor, labels_P: Tensor, held_out_NF: Tensor, labels_N: Tensor
) -> Measured:
    """Accuracy of the most frequent label of the ten nearest training images (Euclidean)."""
    found_N = labels_P[nearest(held_out_NF, train_PF, NEIGHBOURS)[1]].mode(dim=1).values
    return mean_and_error(found_N == labels_N)
