"""Layers with torch.nn's names, parameters and results, faster on a CPU.

model/vae.py imports this module under the name ``nn``. What is not faster here is torch.nn's own.
The results are the same up to rounding; a training step takes 0.86 of the time
(benchmarks/RECORDS.md). Three things make the difference:

- Channels last: oneDNN's kernels for many channels are about twice as fast on such tensors.
- Between few channels and many, a convolution is one matrix product with the 3x3 patches of the
  image, which one gather collects; the transposed one adds the products' patches up.
- The gradient of a transposed convolution is a convolution, and is computed as one.

A convolution from ``big`` (B, C, H, W) to ``small`` (B, D, H/2, W/2) and the transposed one back
have weights of the same shape (D, C, 3, 3), and are each other's gradients, so three functions are
enough: ``down``, ``up`` and ``weight_gradient``.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Linear, Module

__all__ = ["Conv2d", "ConvTranspose2d", "Flatten", "Linear", "Module"]

FEW = 4  # channels up to which gathering patches is faster than oneDNN


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d; fast if 3x3 with stride 2 and padding 1, which halves an even size.

    (B, C, H, W) -> (B, D, H/2, W/2).
    """

    def forward(self, x: Tensor) -> Tensor:
        # an odd side would be halved with a remainder, which ``up`` cannot give back
        if x.shape[-1] % 2 or x.shape[-2] % 2 or not _is_ours(self, x):
            return super().forward(x)
        return _apply(_Convolution, x, self.weight, self.bias, True)


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d; fast if 3x3 with stride 2, padding 1 and output padding 1.

    (B, D, H, W) -> (B, C, 2H, 2W).
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or self.output_padding != (1, 1) or not _is_ours(self, x):
            return super().forward(x, output_size)
        return _apply(_Convolution, x, self.weight, self.bias, False)


class Flatten(nn.Flatten):
    """torch.nn.Flatten; its gradient has the memory layout of its input.

    Without this, the ReLU before it multiplies a contiguous gradient with a channels-last mask,
    element by element: 3 ms of a step of 27.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.is_contiguous() or torch.compiler.is_compiling():
            return super().forward(x)
        return _apply(_Flatten, x)


def _is_ours(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    """Whether this module computes the layer; torch.compile takes PyTorch's own operations."""
    return (
        (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (2, 2), (1, 1))
        and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
        and layer.bias is not None
        and x.dim() == 4
        and not torch.compiler.is_compiling()
    )


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    y: Tensor = function.apply(*args)
    return y


class _Flatten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _channels_last(gradient.reshape(ctx.shape))


class _Convolution(torch.autograd.Function):
    """``down`` or ``up`` with a bias; the gradient of each is the other one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, is_down: bool) -> Tensor:
        if weight.shape[1] > FEW:  # once for both directions
            x, weight = _channels_last(x), _channels_last(weight)
        ctx.is_down = is_down
        ctx.save_for_backward(x, weight)
        return down(x, weight, bias) if is_down else up(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        if gradient.shape[1] > FEW:
            gradient = _channels_last(gradient)
        big, small = (x, gradient) if ctx.is_down else (gradient, x)
        of_x = None
        if ctx.needs_input_grad[0]:  # the images of a batch need none
            of_x = up(gradient, weight) if ctx.is_down else down(gradient, weight)
        return of_x, weight_gradient(big, small, weight), _sum_rows(_to_rows(gradient)), None


def down(big: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution: (B, C, H, W) -> (B, D, H/2, W/2)."""
    if _by_patches(weight):
        # the product's rows are pixels: channels last, which the next layer wants
        shape = (len(big), len(weight), big.shape[2] // 2, big.shape[3] // 2)
        small = torch.empty(
            shape, dtype=big.dtype, device=big.device, memory_format=torch.channels_last
        )
        # written into the result, which is no view then: a ReLU may change it in place
        _product(_patches(big), weight.flatten(1).mT, bias, out=_to_rows(small))
        return small
    return F.conv2d(_channels_last(big), _channels_last(weight), bias, stride=2, padding=1)


def up(small: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transposed convolution: (B, D, H, W) -> (B, C, 2H, 2W)."""
    if _by_patches(weight):
        return _up_by_patches(small, weight, bias)
    small, weight = _channels_last(small), _channels_last(weight)
    return F.conv_transpose2d(small, weight, bias, stride=2, padding=1, output_padding=1)


def _up_by_patches(small: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num, _, height, width = small.shape
    # each pixel of ``small`` gives a 3x3 patch of ``big``; where patches overlap they are added
    patches = (_to_rows(small) @ weight.flatten(1)).view(num, height, width, -1, 3, 3)
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
        return (_patches(big).mT @ _to_rows(small)).mT.reshape(weight.shape)
    gradients: list[Tensor] = torch.ops.aten.convolution_backward(
        _channels_last(small), _channels_last(big), _channels_last(weight),
        None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False],
    )  # fmt: skip
    return gradients[1]


def _by_patches(weight: Tensor) -> bool:
    """Whether a matrix product with patches is faster than PyTorch's convolutions."""
    return not weight.is_cuda and weight.shape[1] <= FEW


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(a, b, out=out)
    return torch.addmm(bias, a, b, out=out)


def _channels_last(images: Tensor) -> Tensor:
    # a GPU was never measured: there PyTorch's own choice stays
    return images if images.is_cuda else images.contiguous(memory_format=torch.channels_last)


def _to_rows(images: Tensor) -> Tensor:
    """(B, D, H, W) -> a row for each pixel, (B * H * W, D)."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _patches(big: Tensor) -> Tensor:
    """The 3x3 neighbourhood of every second pixel, zeros beyond the edge, (B * H/2 * W/2, 9C)."""
    channels, height, width = big.shape[1:]
    # the places are the same for every image, so their table is made once
    pixels = F.pad(big.reshape(len(big), -1), (1, 0))  # pixel 0 stands for those beyond the edge
    neighbours = _neighbours(channels, height, width, big.device)
    return pixels.index_select(1, neighbours).view(-1, 9 * channels)


@functools.cache
def _neighbours(channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """Which pixels, counted from 1, each patch of an image consists of; 0 is beyond the edge."""
    # on the CPU by name: the first call may come inside of "with torch.device('meta')"
    numbers = torch.arange(1.0, channels * height * width + 1, device="cpu")
    numbers = numbers.view(1, channels, height, width)
    return F.unfold(numbers, 3, padding=1, stride=2)[0].t().reshape(-1).int().to(device)


def _sum_rows(rows: Tensor) -> Tensor:
    """(R, D) -> (D,); with many columns a product takes a third of the time of sum()."""
    if rows.shape[-1] <= FEW:
        return rows.sum(dim=0)
    return (rows.new_ones(1, len(rows)) @ rows)[0]
