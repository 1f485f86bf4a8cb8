"""The variational autoencoder of Kingma & Welling 2014, with two convolutions each way.

    x -> Conv 1->32 -> ReLU -> Conv 32->64 -> ReLU -> flatten -> FC -> mu, log sigma^2
    z -> FC -> reshape -> ConvT 64->32 -> ReLU -> ConvT 32->1 -> sigmoid

All (transposed) convolutions are 3x3 with stride 2, so 28x28 becomes 14x14, then 7x7, and back.
The sigmoid is not in this file: the decoder returns logits, from which the loss and the images are
computed where they stay finite (likelihoods.py).

Shape suffixes: B images, C channels, H height, W width, Z latent dimensions.
"""

import math

import torch
from torch import Tensor, relu_

from vae_hyperband.common.errors import ConfigError

# torch.nn's layers, computed faster on a CPU; "from torch import nn" trains the same model
from vae_hyperband.model import fast_layers as nn
from vae_hyperband.model.likelihoods import LIKELIHOODS, Likelihood, learned_log_scale, pixel_means
from vae_hyperband.model.priors import VampPrior, reparameterize, standard_normal_log_density

#: log sigma^2 is kept within +-20 (sigma between 4.5e-5 and 2.2e4), so that exp() stays finite.
LOGVAR_LIMIT = 20.0


class Encoder(nn.Module):
    """q(z|x): the mean and log variance of a diagonal Gaussian per image."""

    def __init__(self, latent_dim: int, image_size: int, channels: int) -> None:
        super().__init__()
        num_features = 64 * (image_size // 4) ** 2
        self.conv1 = nn.Conv2d(channels, 32, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.flatten = nn.Flatten()
        self.fc_mu = nn.Linear(num_features, latent_dim)
        self.fc_logvar = nn.Linear(num_features, latent_dim)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        # relu_: in place, since a convolution's gradients do not need its output
        h = relu_(self.conv1(x_BCHW))  # (B, 32, H/2, W/2)
        h = relu_(self.conv2(h))  # (B, 64, H/4, W/4)
        h = self.flatten(h)
        return self.fc_mu(h), self.fc_logvar(h).clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)


class Decoder(nn.Module):
    """p(x|z): one logit per pixel."""

    def __init__(self, latent_dim: int, image_size: int, channels: int) -> None:
        super().__init__()
        self.small = image_size // 4
        self.fc = nn.Linear(latent_dim, 64 * self.small**2)
        self.conv_t1 = nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1)
        self.conv_t2 = nn.ConvTranspose2d(32, channels, 3, stride=2, padding=1, output_padding=1)

    def forward(self, z_BZ: Tensor) -> Tensor:
        h = self.fc(z_BZ).unflatten(1, (64, self.small, self.small))  # (B, 64, H/4, W/4)
        h = relu_(self.conv_t1(h))  # (B, 32, H/2, W/2)
        logits_BCHW: Tensor = self.conv_t2(h)
        return logits_BCHW


class VAE(nn.Module):
    """Encoder, decoder and prior. ``pseudo_inputs`` is how many a VampPrior has; with 0 the prior
    p(z) is standard normal. ``sigma`` is the standard deviation of a pixel with the likelihood
    "gaussian". Images are square; their side is a multiple of 4.

    Raises :class:`ConfigError` for sizes that cannot be built.
    """

    def __init__(
        self,
        latent_dim: int = 32,
        image_size: int = 28,
        channels: int = 1,
        likelihood: Likelihood = "bernoulli",
        pseudo_inputs: int = 0,
        sigma: float = 0.1,
    ) -> None:
        super().__init__()
        if latent_dim < 1 or channels < 1 or image_size < 4 or image_size % 4 or pseudo_inputs < 0:
            raise ConfigError(
                f"A VAE with latent_dim {latent_dim}, image_size {image_size}, channels {channels} "
                f"and {pseudo_inputs} pseudo-inputs cannot be built: none may be negative, and the "
                "image size must be a multiple of 4."
            )
        if likelihood not in LIKELIHOODS:
            raise ConfigError(f"A VAE's likelihood is one of {', '.join(LIKELIHOODS)}.")
        if not 0 < sigma < math.inf:
            raise ConfigError(f"A VAE's sigma is {sigma!r}, but must be greater than 0.")
        self.latent_dim, self.image_size, self.channels = latent_dim, image_size, channels
        self.likelihood, self.sigma = likelihood, sigma
        self.encoder = Encoder(latent_dim, image_size, channels)
        self.decoder = Decoder(latent_dim, image_size, channels)
        self.vamp = VampPrior(pseudo_inputs, channels, image_size) if pseudo_inputs else None
        self.log_scale = learned_log_scale(likelihood, channels)

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] -> ``(mu_BZ, logvar_BZ)`` of q(z|x)."""
        posterior: tuple[Tensor, Tensor] = self.encoder(x_BCHW)
        return posterior

    def decode(self, z_BZ: Tensor) -> Tensor:
        """Latents -> logits, shape (B, C, H, W)."""
        logits_BCHW: Tensor = self.decoder(z_BZ)
        return logits_BCHW

    def decode_images(self, z_BZ: Tensor) -> Tensor:
        """Latents -> the mean of each pixel: images in [0, 1], shape (B, C, H, W)."""
        return pixel_means(self.decode(z_BZ), self.likelihood)

    def forward(self, x_BCHW: Tensor, noise_BZ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode, sample z with the given standard normal noise, decode.

        Returns ``(logits_BCHW, mu_BZ, logvar_BZ, z_BZ)``.
        """
        # the noise is an argument: a hidden generator would make a step depend on what ran before
        mu_BZ, logvar_BZ = self.encode(x_BCHW)
        z_BZ = reparameterize(mu_BZ, logvar_BZ, noise_BZ)
        return self.decode(z_BZ), mu_BZ, logvar_BZ, z_BZ

    def log_prior(self, z_BZ: Tensor) -> Tensor:
        """log p(z) in nats, shape (B,)."""
        if self.vamp is None:
            return standard_normal_log_density(z_BZ)
        return self.vamp.log_density(z_BZ, self.encode)

    @torch.no_grad()
    def sample_prior(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples of p(z), shape (N, Z), on the generator's device."""
        device = generator.device if generator is not None else torch.device("cpu")
        noise_NZ = torch.randn(num, self.latent_dim, generator=generator, device=device)
        if self.vamp is None:
            return noise_NZ
        return self.vamp.sample(noise_NZ, self.encode, generator)

    @torch.no_grad()
    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Decode samples of the prior: images in [0, 1], shape (N, C, H, W).

        The same generator state gives the same images, whatever the device of the model.
        """
        z_NZ = self.sample_prior(num_samples, generator)
        return self.decode_images(z_NZ.to(self.decoder.fc.weight.device))

    @torch.no_grad()
    def reconstruct(self, x_BCHW: Tensor) -> Tensor:
        """Decode the posterior means of the images: images in [0, 1], shape (B, C, H, W)."""
        mu_BZ, _ = self.encode(x_BCHW)
        return self.decode_images(mu_BZ)
