"""How cleanly latent dimensions separate the factors that pictures were drawn from.

All three take posterior means and the factors' levels, and give 1 where each factor has a dimension
of its own, 0 where nothing of it can be read from single dimensions. Definitions as in
Locatello et al. 2019, where they are compared.

Shape suffixes: N images, Z latent dimensions, F factors.
"""

import torch
from torch import Tensor

from vae_hyperband.randomness import generator

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
        # every split sees all dimensions: else a useless one is chosen where no other was offered
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
