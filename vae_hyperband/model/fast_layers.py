"""Fast layers for a CPU: the 3x3 convolution of stride 2, its adjoint, and their gradients.

They compute the same as PyTorch's to rounding, in less time (benchmarks/training_speed.py):

- Channels last: oneDNN's kernels for many channels are about twice as fast on such tensors.
- Between few channels and many, a convolution is one matrix product with the 3x3 patches of the
  image, which one gather collects; the transposed one adds the products' patches up.
- The gradient of a transposed convolution is a convolution, and computed as one.

A convolution from ``big`` (B, C, H, W) to ``small`` (B, D, H/2, W/2) and the transposed one back
have weights of the same shape (D, C, 3, 3), and are each other's gradients, so that three functions
are all there is.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 4  # channels up to which gathering patches is faster than oneDNN


class _Layer(torch.autograd.Function):
    """``forward`` with bias and ReLU, differentiated by means of its adjoint ``backward``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, is_down: bool
    ) -> Tensor:
        if weight.shape[1] > FEW:  # once for both directions
            x, weight = channels_last(x), channels_last(weight)
        y = down(x, weight, bias) if is_down else up(x, weight, bias)
        y = y.relu_() if relu else y
        ctx.is_down = is_down
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight, y = ctx.saved_tensors
        if gradient.shape[1] > FEW:
            gradient = channels_last(gradient)
        if y is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        big, small = (x, gradient) if ctx.is_down else (gradient, x)
        adjoint: Callable[..., Tensor] = up if ctx.is_down else down
        of_weight = weight_gradient(big, small, weight)
        of_x = adjoint(gradient, weight) if ctx.needs_input_grad[0] else None
        return of_x, of_weight, sum_rows(to_rows(gradient)), None, None


class Conv(nn.Conv2d):
    """3x3, stride 2, padding 1: half the size. (B, C, H, W) -> (B, D, H/2, W/2), ReLU included."""

    def __init__(self, in_channels: int, out_channels: int, relu: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return _Layer.apply(x, self.weight, self.bias, self.relu, True)

    def plain(self, x: Tensor) -> Tensor:
        """The same by PyTorch's own layer."""
        y = super().forward(x)
        return torch.relu(y) if self.relu else y


class ConvTranspose(nn.ConvTranspose2d):
    """3x3, stride 2: exactly twice the size. (B, D, H, W) -> (B, C, 2H, 2W), ReLU included."""

    def __init__(self, in_channels: int, out_channels: int, relu: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)
        self.relu = relu

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None, "the output is twice the size of the input"
        return _Layer.apply(x, self.weight, self.bias, self.relu, False)

    def plain(self, x: Tensor) -> Tensor:
        """The same by PyTorch's own layer."""
        y = super().forward(x)
        return torch.relu(y) if self.relu else y


def linear_from_images(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Flatten, then a linear layer: (B, C, H, W), (D, C * H * W), (D,) -> (B, D)."""
    # copying the weights into the order of the pixels is cheaper than the reverse
    weight = weight.unflatten(1, x.shape[1:]).permute(0, 2, 3, 1).flatten(1)
    return F.linear(x.permute(0, 2, 3, 1).flatten(1), weight, bias)


def linear_to_images(
    x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """A linear layer, then images of that shape: (B, D), (C * H * W, D) -> (B, C, H, W)."""
    weight = weight.unflatten(0, shape).permute(1, 2, 0, 3).flatten(0, 2)
    bias = bias.unflatten(0, shape).permute(1, 2, 0).flatten()
    rows = F.linear(x, weight, bias).unflatten(1, (*shape[1:], shape[0]))
    return rows.permute(0, 3, 1, 2)


def down(big: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution: (B, C, H, W) -> (B, D, H/2, W/2)."""
    if _by_patches(weight):
        height, width = big.shape[2] // 2, big.shape[3] // 2
        small_RD = _product(_patches(big), weight.flatten(-3).mT, bias)
        return small_RD.view(len(big), height, width, -1).permute(0, 3, 1, 2)
    return F.conv2d(channels_last(big), channels_last(weight), bias, stride=2, padding=1)


def up(small: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transposed convolution: (B, D, H, W) -> (B, C, 2H, 2W)."""
    if _by_patches(weight):
        return _up_by_patches(small, weight, bias)
    small, weight = channels_last(small), channels_last(weight)
    return F.conv_transpose2d(small, weight, bias, stride=2, padding=1, output_padding=1)


def _up_by_patches(small: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num, _, height, width = small.shape
    patches = (to_rows(small) @ weight.flatten(-3)).view(num, height, width, -1, 3, 3)
    # one row and column more at the top and the left, which the convolution's padding was
    big = patches.new_zeros(num, patches.shape[3], 2 * height + 1, 2 * width + 1)
    for i in range(3):
        for j in range(3):
            window = big[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2]
            window += patches[..., i, j].permute(0, 3, 1, 2)
    big = big[:, :, 1:, 1:].contiguous()
    if bias is not None:
        big += bias[:, None, None]
    return big


def weight_gradient(big: Tensor, small: Tensor, weight: Tensor) -> Tensor:
    """Of the sum of ``down(big, weight) * small``, which is that of ``up(small, weight) * big``."""
    if _by_patches(weight):
        return (_patches(big).mT @ to_rows(small)).mT.reshape(weight.shape)
    return torch.ops.aten.convolution_backward(
        channels_last(small), channels_last(big), channels_last(weight),
        None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False],
    )[1]  # fmt: skip


def _by_patches(weight: Tensor) -> bool:
    """Whether a matrix product with patches is faster than PyTorch's convolutions."""
    return not weight.is_cuda and weight.shape[1] <= FEW


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a @ b if bias is None else torch.addmm(bias, a, b)


def channels_last(images: Tensor) -> Tensor:
    """Channels last, if that is faster."""
    return images if images.is_cuda else images.contiguous(memory_format=torch.channels_last)


def to_rows(images: Tensor) -> Tensor:
    """(B, D, H, W) -> a row for each pixel, (B * H * W, D)."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _patches(big: Tensor) -> Tensor:
    """The 3x3 neighbourhood of every second pixel, zeros beyond the edge, (B * H/2 * W/2, 9C)."""
    channels, height, width = big.shape[1:]
    pixels = F.pad(big.reshape(len(big), -1), (1, 0))  # pixel 0 stands for those beyond the edge
    neighbours = _neighbours(channels, height, width, big.device)
    return pixels.index_select(1, neighbours).view(-1, 9 * channels)


@functools.cache
def _neighbours(channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """Which pixels, counted from 1, each patch of an image consists of; 0 is beyond the edge."""
    numbers = torch.arange(1.0, channels * height * width + 1, device="cpu")
    numbers = numbers.view(1, channels, height, width)
    return F.unfold(numbers, 3, padding=1, stride=2)[0].t().reshape(-1).int().to(device)


def sum_rows(rows: Tensor) -> Tensor:
    """(R, D) -> (D,); with many columns a product takes a third of the time of sum()."""
    if rows.shape[-1] <= FEW:
        return rows.sum(dim=-2)
    return (rows.new_ones(1, len(rows)) @ rows)[0]
