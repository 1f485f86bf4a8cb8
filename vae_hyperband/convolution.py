"""The 3x3 convolution of stride 2, its adjoint and their gradients: fast on a CPU, and for packs.

They compute the same as PyTorch's to rounding, in less time (benchmarks/training_speed.py):

- Channels last: oneDNN's kernels for many channels are about twice as fast on such tensors.
- Between few channels and many, a convolution is one matrix product with the 3x3 patches of the
  image, which one gather collects; the transposed one adds the products' patches up.
- The gradient of a transposed convolution is a convolution, and computed as one.

A convolution from ``big`` (B, C, H, W) to ``small`` (B, D, H/2, W/2) and the transposed one back
have weights of the same shape (D, C, 3, 3), and are each other's gradients, so that three functions
are all there is. A pack of N networks has weights (N, D, C, 3, 3), images (N * B, C, H, W) and
biases (N, C). On a CPU its members' products are computed one after the other, as each alone
would be, to the same bits; on a GPU all are batched products.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 4  # channels up to which gathering patches is faster than oneDNN


def down(big: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution: (B, C, H, W) -> (B, D, H/2, W/2)."""
    if _by_patches(big, weight):
        height, width = big.shape[2] // 2, big.shape[3] // 2
        small_RD = product(by_member(weight, _patches(big)), weight.flatten(-3).mT, bias)
        return small_RD.view(len(big), height, width, -1).permute(0, 3, 1, 2)
    if weight.dim() == 5:
        return _joined([down(*one) for one in _members(weight, big, bias)])
    return F.conv2d(channels_last(big), channels_last(weight), bias, stride=2, padding=1)


def up(small: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transposed convolution: (B, D, H, W) -> (B, C, 2H, 2W)."""
    if _by_patches(small, weight):
        return _up_by_patches(small, weight, bias)
    if weight.dim() == 5:
        return _joined([up(*one) for one in _members(weight, small, bias)])
    small, weight = channels_last(small), channels_last(weight)
    return F.conv_transpose2d(small, weight, bias, stride=2, padding=1, output_padding=1)


def _up_by_patches(small: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num, _, height, width = small.shape
    patches = product(by_member(weight, to_rows(small)), weight.flatten(-3))
    patches = patches.view(num, height, width, -1, 3, 3)
    # one row and column more at the top and the left, which the convolution's padding was
    big = patches.new_zeros(num, patches.shape[3], 2 * height + 1, 2 * width + 1)
    for i in range(3):
        for j in range(3):
            window = big[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2]
            window += patches[..., i, j].permute(0, 3, 1, 2)
    big = big[:, :, 1:, 1:].contiguous()
    if bias is not None:
        big.unflatten(0, (*bias.shape[:-1], -1)).add_(bias[..., None, :, None, None])
    return big


def weight_gradient(big: Tensor, small: Tensor, weight: Tensor) -> Tensor:
    """Of the sum of ``down(big, weight) * small``, which is that of ``up(small, weight) * big``."""
    if _by_patches(big, weight):
        patches, rows = by_member(weight, _patches(big)), by_member(weight, to_rows(small))
        return product(patches.mT, rows).mT.reshape(weight.shape)
    if weight.dim() == 5:
        pairs = zip(big.chunk(len(weight)), small.chunk(len(weight)), weight, strict=True)
        return torch.stack([weight_gradient(*one) for one in pairs])
    return torch.ops.aten.convolution_backward(
        channels_last(small), channels_last(big), channels_last(weight),
        None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False],
    )[1]  # fmt: skip


def _by_patches(images: Tensor, weight: Tensor) -> bool:
    """Whether one product of matrices with patches is faster than PyTorch's convolutions.

    On a GPU those of a pack would be grouped convolutions, of one group per member.
    """
    return weight.dim() == 5 if images.is_cuda else weight.shape[-3] <= FEW


def by_member(weight: Tensor, rows: Tensor) -> Tensor:
    """Rows of a pack's images, (N * R, K), by member, (N, R, K), if the weights are a pack's."""
    return rows.unflatten(0, (len(weight), -1)) if weight.dim() == 5 else rows


def _members(
    weight: Tensor, images: Tensor, bias: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Images, weights and bias of each member of a pack."""
    num = len(weight)
    biases = [None] * num if bias is None else bias.unbind()
    return zip(images.chunk(num), weight.unbind(), biases, strict=True)


def _joined(images: list[Tensor]) -> Tensor:
    """The members' images after one another; of one member as they are, without a copy."""
    return torch.cat(images) if len(images) > 1 else images[0]


def _one_by_one(a: Tensor) -> bool:
    """Whether a pack's products are computed each by itself, as its members' alone would be."""
    return not a.is_cuda


def _aligned(matrix: Tensor) -> bool:
    """Whether it begins where PyTorch lets a tensor begin, as what is not part of a pack does.

    On some CPUs (AMD's with AVX-512) the last bits of MKL's products depend on where a matrix lies.
    """
    return matrix.data_ptr() % 64 == 0


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix product plus bias; of a pack on a CPU: each member's as it would be alone."""
    if a.dim() == 2:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    if _one_by_one(a):
        products = a.new_empty(*a.shape[:2], b.shape[2])
        for i, place in enumerate(products):
            out = place if _aligned(place) else torch.empty_like(place)
            one, other = (x if _aligned(x) else x.clone() for x in (a[i], b[i]))
            if bias is None:
                torch.mm(one, other, out=out)
            else:
                torch.addmm(bias[i], one, other, out=out)
            if out is not place:
                place.copy_(out)
        return products
    return a @ b if bias is None else torch.baddbmm(bias[:, None], a, b)


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
    return product(rows.new_ones(*rows.shape[:-2], 1, rows.shape[-2]), rows).squeeze(-2)
