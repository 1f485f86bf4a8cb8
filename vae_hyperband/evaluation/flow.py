"""Flow matching on latents: a learned path from noise to the z that the decoder was trained on.

    z_t = (1 - t) noise + t z,  t in [0, 1]         a straight line for each pair
    loss = |v(z_t, t) - (z - noise)|^2              v learns the mean direction of the lines
    dz = v(z, t) dt from noise at t = 0             draws a new z

Lipman et al. 2023 (arXiv 2210.02747), with the straight paths of Liu, Gong & Liu 2023
(arXiv 2209.03003). The z are standardised; the class is an input, so that one network serves all
classes.

Shape suffixes: B rows of a batch, Z latent dimensions, H hidden units, L labels.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae_hyperband.common.randomness import generator
from vae_hyperband.model.initialization import initialize
from vae_hyperband.model.schedules import learning_rate_at

TIME_FEATURES = 32
BATCH_SIZE = 512
PEAK = 2e-3
NUM_STEPS = 50  # from noise to z
AVERAGED = 0.999  # decay of the weights' moving average, which is what is kept


class Block(nn.Module):
    """h + MLP(norm(h))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h_BH: Tensor, given_BH: Tensor) -> Tensor:
        return h_BH + self.down(F.silu(self.up(self.norm(h_BH)) + given_BH))


class VelocityNet(nn.Module):
    """v(z_t, t, label): where to go from z_t at time t, shape (B, Z)."""

    def __init__(self, latent_dim: int, num_labels: int, width: int, depth: int) -> None:
        super().__init__()
        self.label = nn.Embedding(num_labels, TIME_FEATURES)
        self.given = nn.Linear(2 * TIME_FEATURES, width)
        self.enter = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, latent_dim))

    def forward(self, z_BZ: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        waves = t_B[:, None] * math.pi * torch.arange(1, TIME_FEATURES // 2 + 1, device=t_B.device)
        given = torch.cat((waves.sin(), waves.cos(), self.label(label_B)), dim=1)
        given_BH = F.silu(self.given(given))
        h_BH = self.enter(z_BZ) + given_BH
        for block in self.blocks:
            h_BH = block(h_BH, given_BH)
        return self.leave(h_BH)


def matching_loss(net: nn.Module, z_BZ: Tensor, label_B: Tensor, stream: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at one random time per row, over rows and dimensions."""
    noise_BZ = torch.randn(z_BZ.shape, generator=stream)
    t_B = torch.rand(len(z_BZ), generator=stream)
    t_B1 = t_B[:, None]
    found_BZ = net((1 - t_B1) * noise_BZ + t_B1 * z_BZ, t_B, label_B)
    return F.mse_loss(found_BZ, z_BZ - noise_BZ)


class Flow(nn.Module):
    """A distribution of z given a label: standardisation and the velocity between its ends."""

    mean_Z: Tensor
    std_Z: Tensor

    def __init__(self, latent_dim: int, num_labels: int, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean_Z", torch.zeros(latent_dim))
        self.register_buffer("std_Z", torch.ones(latent_dim))
        self.velocity = VelocityNet(latent_dim, num_labels, width, depth)

    def draw(self, label_N: Tensor, stream: torch.Generator, num_steps: int = NUM_STEPS) -> Tensor:
        """One z per label, shape (N, Z)."""
        shape = (len(label_N), len(self.mean_Z))
        return self.path(torch.randn(shape, generator=stream), label_N, num_steps)

    @torch.no_grad()
    def path(self, noise_NZ: Tensor, label_N: Tensor, num_steps: int = NUM_STEPS) -> Tensor:
        """Where the paths from noise end, shape (N, Z), by the midpoint rule."""
        z_NZ = noise_NZ
        step = 1 / num_steps
        for number in range(num_steps):
            t_N = torch.full((len(z_NZ),), number * step)
            half_NZ = z_NZ + step / 2 * self.velocity(z_NZ, t_N, label_N)
            z_NZ = z_NZ + step * self.velocity(half_NZ, t_N + step / 2, label_N)
        return self.mean_Z + self.std_Z * z_NZ


def fit_flow(
    flow: Flow,
    draw_z: Callable[[int], Tensor],
    label_P: Tensor,
    seed: int,
    epochs: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Flow:
    """Fit a flow to latents; ``draw_z(epoch)`` gives one z per training image, shape (P, Z).

    ``flow`` may be on the meta device: its first weights are drawn here, from the seed, as is
    everything random. Returns another flow, whose weights are the moving average of the trained
    ones, in eval mode on the CPU.
    """
    first_PZ = draw_z(0)
    flow = initialize(flow, generator(seed, "flow init"))
    flow.std_Z, flow.mean_Z = torch.std_mean(first_PZ, dim=0)
    flow.std_Z.clamp_(min=1e-6)
    kept = copy.deepcopy(flow)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=PEAK, fused=True, weight_decay=0.0)
    num_batches = math.ceil(len(label_P) / BATCH_SIZE)
    for epoch in range(epochs):
        z_PZ = (draw_z(epoch) - flow.mean_Z) / flow.std_Z
        order = torch.randperm(len(z_PZ), generator=generator(seed, "flow order", epoch))
        total = 0.0
        for number, index_B in enumerate(order.split(BATCH_SIZE)):
            step = epoch * num_batches + number
            rate = learning_rate_at(step, epochs * num_batches, PEAK, "one-cycle")
            optimizer.param_groups[0]["lr"] = rate
            stream = generator(seed, "flow noise", step)
            loss = matching_loss(flow.velocity, z_PZ[index_B], label_P[index_B], stream)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay = min(AVERAGED, (step + 1) / (step + 10))
            with torch.no_grad():
                for average, weight in zip(kept.parameters(), flow.parameters(), strict=True):
                    average.lerp_(weight, 1 - decay)
            total += loss.item() * len(index_B)
        on_epoch(epoch, total / len(z_PZ))
    return kept.eval().requires_grad_(False)
