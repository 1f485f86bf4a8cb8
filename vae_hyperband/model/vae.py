"""The variational autoencoder of Kingma & Welling 2014, with two convolutions each way.

    x -> Conv 1->32 -> ReLU -> Conv 32->64 -> ReLU -> flatten -> FC -> mu, log sigma^2
    z -> FC -> reshape -> ConvT 64->32 -> ReLU -> ConvT 32->1 -> sigmoid

All (transposed) convolutions are 3x3 with stride 2, so 28x28 becomes 14x14, then 7x7, and back.
That is ``widths=(32, 64)``: one stage for each number of channels. An image whose sides the stages
cannot halve exactly is padded with zeros, and the padding is cut off what is decoded. The sigmoid
is not in this file: the decoder returns logits, from which the loss and the images are computed
where they stay finite (likelihoods.py).

Shape suffixes: B images, C channels, H height, W width, Z latent dimensions.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, relu_
from torch.nn import functional as F

from vae_hyperband.common.config import NETWORKS, Likelihood, Widths
from vae_hyperband.common.errors import ConfigError

# torch.nn's layers, computed faster on a CPU; "from torch import nn" trains the same model
from vae_hyperband.model import fast_layers as nn
from vae_hyperband.model.likelihoods import LIKELIHOODS, learned_log_scale, pixel_means
from vae_hyperband.model.networks import ImageShape, own_network
from vae_hyperband.model.priors import VampPrior, reparameterize, standard_normal_log_density
from vae_hyperband.model.residual import ResidualDecoder, ResidualEncoder

#: log sigma^2 is kept within +-20 (sigma between 4.5e-5 and 2.2e4), so that exp() stays finite.
LOGVAR_LIMIT = 20.0


class Encoder(nn.Module):
    """q(z|x): the mean and log variance of a diagonal Gaussian per image."""

    def __init__(self, latent_dim: int, image_shape: ImageShape, widths: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = image_shape
        # conv1, conv2 ...: the names that checkpoints have had since version 0.1
        self.convs = [f"conv{stage}" for stage, _ in enumerate(widths, start=1)]
        for name, (before, after) in zip(self.convs, pairwise((channels, *widths)), strict=True):
            self.add_module(name, nn.Conv2d(before, after, 3, stride=2, padding=1))
        # each stage halves both sides: 64 * 7 * 7 for 28x28
        num_features = widths[-1] * (height >> len(widths)) * (width >> len(widths))
        self.flatten = nn.Flatten()
        self.fc_mu = nn.Linear(num_features, latent_dim)
        self.fc_logvar = nn.Linear(num_features, latent_dim)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        h = x_BCHW
        for name in self.convs:  # (B, 32, H/2, W/2), (B, 64, H/4, W/4)
            # relu_: in place, since a convolution's gradients do not need its output
            h = relu_(getattr(self, name)(h))
        h = self.flatten(h)  # (B, 64 * H/4 * W/4)
        return self.fc_mu(h), self.fc_logvar(h)  # (B, Z) each


class Decoder(nn.Module):
    """p(x|z): one logit per pixel."""

    def __init__(self, latent_dim: int, image_shape: ImageShape, widths: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.small = (widths[-1], height >> len(widths), width >> len(widths))
        self.fc = nn.Linear(latent_dim, self.small[0] * self.small[1] * self.small[2])
        self.convs = [f"conv_t{stage}" for stage, _ in enumerate(widths, start=1)]
        reverse = (*reversed(widths), channels)  # 64, 32, 1: the encoder's, backwards
        for name, (before, after) in zip(self.convs, pairwise(reverse), strict=True):
            layer = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1)
            self.add_module(name, layer)

    def forward(self, z_BZ: Tensor) -> Tensor:
        h: Tensor = self.fc(z_BZ).unflatten(1, self.small)  # (B, 64, H/4, W/4)
        for name in self.convs[:-1]:
            h = relu_(getattr(self, name)(h))  # (B, 32, H/2, W/2)
        # the last one without a ReLU: a logit may be negative
        logits_BCHW: Tensor = getattr(self, self.convs[-1])(h)
        return logits_BCHW


def stage_widths(widths: Widths, image_shape: ImageShape) -> tuple[int, ...]:
    """``auto``: stages of 32, 64, 128, 256, 256 ... channels until the shorter side is at most 8.

    Raises :class:`ConfigError` for widths that no network can have.
    """
    _, *sides = image_shape
    if widths == "auto":
        # one stage even for a tiny image: the encoder needs a convolution
        num = 1
        while min(sides) > 8 << num:
            num += 1
        return tuple(32 << min(stage, 3) for stage in range(num))
    stages = tuple(widths)
    if not stages or min(stages) < 1:
        raise ConfigError(f"The widths are {stages}, but must be one or more numbers of channels.")
    if 1 << len(stages) > 4 * max(sides):  # nearly all of the padded image would be padding
        raise ConfigError(
            f"{len(stages)} widths halve an image {len(stages)} times, but images of "
            f"{sides[0]}x{sides[1]} are too small for that: give fewer --widths, or auto."
        )
    return stages


def _network(
    network: str, latent_dim: int, image_shape: ImageShape, widths: tuple[int, ...]
) -> tuple[nn.Module, nn.Module]:
    """The encoder and the decoder of a family."""
    given = (latent_dim, image_shape, widths)
    if network == "conv":
        return Encoder(*given), Decoder(*given)
    if network == "residual":
        return ResidualEncoder(*given), ResidualDecoder(*given)
    return own_network(network, latent_dim, image_shape)


class VAE(nn.Module):
    """Encoder, decoder and prior. Images may have any height and width (``image_size`` is both, or
    a pair of them). ``pseudo_inputs`` is how many a VampPrior has; with 0 the prior p(z) is
    standard normal. ``sigma`` is the standard deviation of a pixel with the likelihood "gaussian".
    ``network`` is ``conv`` (this file), ``residual`` (residual.py) or a function
    of the user's own (networks.py), which takes no ``widths``.

    Raises :class:`ConfigError` for sizes that cannot be built.
    """

    def __init__(
        self,
        latent_dim: int = 32,
        image_size: int | tuple[int, int] = 28,
        channels: int = 1,
        likelihood: Likelihood = "bernoulli",
        pseudo_inputs: int = 0,
        widths: Widths = (32, 64),
        network: str = "conv",
        sigma: float = 0.1,
    ) -> None:
        super().__init__()
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        if min(latent_dim, channels, height, width) < 1 or pseudo_inputs < 0:
            raise ConfigError(
                f"A VAE with latent_dim {latent_dim}, image_size {image_size}, channels {channels} "
                f"and {pseudo_inputs} pseudo-inputs cannot be built: none may be negative, and all "
                "but the pseudo-inputs must be at least 1."
            )
        if likelihood not in LIKELIHOODS:
            raise ConfigError(f"A VAE's likelihood is one of {', '.join(LIKELIHOODS)}.")
        if not 0 < sigma < math.inf:
            raise ConfigError(f"A VAE's sigma is {sigma!r}, but must be greater than 0.")
        self.latent_dim, self.channels = latent_dim, channels
        self.image_size = height if height == width else (height, width)
        self.image_shape: ImageShape = (channels, height, width)
        self.likelihood, self.sigma, self.network = likelihood, sigma, network
        # a network of the user's own has its own stages, and takes the image as it is
        self.widths = stage_widths(widths, self.image_shape) if network in NETWORKS else ()
        # how many pixels are missing to the next multiple of 2^stages; 0 for 28x28 and two stages
        more = [-side % (1 << len(self.widths)) for side in (height, width)]
        #: Pixels around the image on the left, right, top and bottom; half on either side.
        self.padding = (more[1] // 2, -(-more[1] // 2), more[0] // 2, -(-more[0] // 2))
        padded = (channels, height + more[0], width + more[1])
        self.encoder, self.decoder = _network(network, latent_dim, padded, self.widths)
        self.vamp = VampPrior(pseudo_inputs, self.image_shape) if pseudo_inputs else None
        self.log_scale = learned_log_scale(likelihood, channels)

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] -> ``(mu_BZ, logvar_BZ)`` of q(z|x)."""
        if any(self.padding):
            x_BCHW = F.pad(x_BCHW, self.padding)
        mu_BZ, logvar_BZ = self.encoder(x_BCHW)
        # here and not in the encoder, so that it holds for networks of the user's own, too
        return mu_BZ, logvar_BZ.clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)

    def decode(self, z_BZ: Tensor) -> Tensor:
        """Latents -> logits, shape (B, C, H, W)."""
        logits_BCHW: Tensor = self.decoder(z_BZ)
        if any(self.padding):  # the loss sees the image only
            (_, height, width), (left, _, top, _) = self.image_shape, self.padding
            logits_BCHW = logits_BCHW[:, :, top : top + height, left : left + width]
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
        return self.decode_images(z_NZ.to(next(self.parameters()).device))

    @torch.no_grad()
    def reconstruct(self, x_BCHW: Tensor) -> Tensor:
        """Decode the posterior means of the images: images in [0, 1], shape (B, C, H, W)."""
        mu_BZ, _ = self.encode(x_BCHW)
        return self.decode_images(mu_BZ)
