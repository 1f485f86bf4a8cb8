"""The loop that tutorials teach, as a user would write it: what ours is measured against.

A Dataset of PIL images with ToTensor, a DataLoader that collates them, the README's network in
plain modules, binary cross-entropy on sigmoids, Adam at 1e-3, the loss read at every step.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vae_hyperband.data.splits import load_split


class Images(Dataset):
    """One PIL image per item, as torchvision's FashionMNIST gives them, then ToTensor."""

    def __init__(self, num: int | None = None) -> None:
        split = load_split("train")
        self.images = split.images_NCHW[:num, 0].numpy()
        self.labels = split.labels_N[:num]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index], mode="L")
        pixels = torch.from_numpy(np.array(image, copy=True)).unsqueeze(0)
        return pixels.to(torch.float32).div(255), int(self.labels[index])


class Net(nn.Module):
    """Parameters have our names, so that our evaluation can load them."""

    def __init__(self, latent_dim: int = 32) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(1, 32, 3, stride=2, padding=1),
                "conv2": nn.Conv2d(32, 64, 3, stride=2, padding=1),
                "fc_mu": nn.Linear(64 * 7 * 7, latent_dim),
                "fc_logvar": nn.Linear(64 * 7 * 7, latent_dim),
            }
        )
        self.decoder = nn.ModuleDict(
            {
                "fc": nn.Linear(latent_dim, 64 * 7 * 7),
                "conv_t1": nn.ConvTranspose2d(64, 32, 3, 2, 1, output_padding=1),
                "conv_t2": nn.ConvTranspose2d(32, 1, 3, 2, 1, output_padding=1),
            }
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.encoder["conv1"](x))
        h = F.relu(self.encoder["conv2"](h))
        h = h.view(h.size(0), -1)
        return self.encoder["fc_mu"](h), self.encoder["fc_logvar"](h)

    def decode(self, z: Tensor) -> Tensor:
        h = self.decoder["fc"](z).view(-1, 64, 7, 7)
        h = F.relu(self.decoder["conv_t1"](h))
        return torch.sigmoid(self.decoder["conv_t2"](h))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decode(z), mu, logvar


class Reference:
    """A training run of the reference loop."""

    def __init__(
        self,
        num_images: int | None = None,
        workers: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.net, self.device = Net().to(device), device
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.loader = DataLoader(
            Images(num_images), batch_size=128, shuffle=True, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip

    def epoch(self) -> tuple[float, float]:
        """One epoch: seconds, and the mean loss."""
        started, total = time.perf_counter(), 0.0
        self.net.train()
        for x, _ in self.loader:
            x = x.to(self.device)
            self.optimizer.zero_grad()
            reconstruction, mu, logvar = self.net(x)
            loss = F.binary_cross_entropy(reconstruction, x, reduction="sum")
            loss = loss - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
            (loss / len(x)).backward()
            self.optimizer.step()
            total += loss.item()
        return time.perf_counter() - started, total / len(self.loader.dataset)
