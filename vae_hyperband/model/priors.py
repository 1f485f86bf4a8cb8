"""Priors over z that are learned with the model.

Shape suffixes: K pseudo-inputs, C channels, H height, W width.
"""

import torch
from torch import Tensor, nn


class VampPrior(nn.Module):
    """Pseudo-inputs u that are learned; p(z) is the mean of their q(z|u).

    Tomczak & Welling 2018, equation 9.
    """

    def __init__(self, num_inputs: int, image_size: int, channels: int) -> None:
        super().__init__()
        self.logits_KCHW = nn.Parameter(torch.zeros(num_inputs, channels, image_size, image_size))

    @property
    def images_KCHW(self) -> Tensor:
        return torch.sigmoid(self.logits_KCHW)
