"""p(z): the standard normal, and the VampPrior, which is learned with the model. Nats.

Shape suffixes: B images, N samples, K pseudo-inputs, C channels, H height, W width, Z latents.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # images -> mu, logvar


def reparameterize(mu_BZ: Tensor, logvar_BZ: Tensor, noise_BZ: Tensor) -> Tensor:
    """z = mu + sigma * noise, differentiable in both. Kingma & Welling 2014, section 2.4."""
    return mu_BZ + torch.exp(0.5 * logvar_BZ) * noise_BZ


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, exp(logvar)) in nats, summed over the last dimension."""
    squares = (z - mu).square() * torch.exp(-logvar)
    return -0.5 * (squares + logvar + math.log(2 * math.pi)).sum(dim=-1)


def standard_normal_log_density(z_BZ: Tensor) -> Tensor:
    """log N(z; 0, I) in nats, shape (B,)."""
    return log_normal(z_BZ, torch.zeros_like(z_BZ), torch.zeros_like(z_BZ))


class VampPrior(nn.Module):
    """Pseudo-inputs u that are learned; p(z) is the mean of their posteriors q(z|u).

    Tomczak & Welling 2018, equation 9. The posteriors are the model's own, so its encoder is an
    argument here: were it a part of this module, its weights would be saved twice.
    """

    def __init__(self, num_inputs: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        # zeros for now: initialization.py samples them from the run's own seed
        self.logits_KCHW = nn.Parameter(torch.zeros(num_inputs, *image_shape))

    @property
    def images_KCHW(self) -> Tensor:
        # the sigmoid keeps them images, whatever the optimizer does to the logits
        return torch.sigmoid(self.logits_KCHW)

    def log_density(self, z_BZ: Tensor, encode: Encode) -> Tensor:
        """log p(z) in nats, shape (B,)."""
        mu_KZ, logvar_KZ = encode(self.images_KCHW)
        # every pseudo-input is encoded in each step, since the encoder has changed
        log_BK = log_normal(z_BZ[:, None], mu_KZ, logvar_KZ)
        return log_BK.logsumexp(dim=1) - math.log(len(mu_KZ))

    def sample(
        self, noise_NZ: Tensor, encode: Encode, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples of p(z) made from the given standard normal noise, shape (N, Z)."""
        # sampled where the noise is: the same generator gives the same z on any device
        device = noise_NZ.device
        mu_KZ, logvar_KZ = (x.to(device) for x in encode(self.images_KCHW))
        shape = (len(noise_NZ),)
        chosen_N = torch.randint(len(mu_KZ), shape, generator=generator, device=device)
        return reparameterize(mu_KZ[chosen_N], logvar_KZ[chosen_N], noise_NZ)
