"""The network's layers: fast on a CPU, and for many networks side by side.

The (transposed) convolutions, 3x3 with stride 2, ReLU included, and the linear layers between them
are PyTorch's own layers with the same parameters, and compute the same to rounding, forward and
backward, in less time (benchmarks/training_speed.py), for three reasons:

- Channels last: oneDNN's kernels for many channels are about twice as fast on such tensors.
- Between few channels and many, a convolution is one matrix product with the 3x3 patches of the
  image, which one gather collects; the transposed one adds the products' patches up.
- The gradient of a transposed convolution is a convolution, and computed as one.

A convolution from ``big`` (B, C, H, W) to ``small`` (B, D, H/2, W/2) and the transposed one back
have weights of the same shape (D, C, 3, 3), and are each other's gradients, so that three functions
are all there is.

A pack of N networks is the same code: ``torch.func.vmap`` over their weights ends here, with
weights (N, D, C, 3, 3) and images (N * B, C, H, W). On a CPU its members' products are computed one
after the other, as each alone would be, to the same bits; on a GPU all are batched products.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 4  # channels up to which gathering patches is faster than oneDNN


def down(big: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution: (B, C, H, W) -> (B, D, H/2, W/2)."""
    if _by_patches(big, weight):
        height, width = big.shape[2] // 2, big.shape[3] // 2
        small_RD = _product(_of(weight, _patches(big)), weight.flatten(-3).mT, bias)
        return small_RD.view(len(big), height, width, -1).permute(0, 3, 1, 2)
    if weight.dim() == 5:
        return _joined([down(*one) for one in _members(weight, big, bias)])
    return F.conv2d(_laid_out(big), _laid_out(weight), bias, stride=2, padding=1)


def up(small: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transposed convolution: (B, D, H, W) -> (B, C, 2H, 2W)."""
    if _by_patches(small, weight):
        return _up_by_patches(small, weight, bias)
    if weight.dim() == 5:
        return _joined([up(*one) for one in _members(weight, small, bias)])
    small, weight = _laid_out(small), _laid_out(weight)
    return F.conv_transpose2d(small, weight, bias, stride=2, padding=1, output_padding=1)


def _up_by_patches(small: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num, _, height, width = small.shape
    patches = _product(_of(weight, _rows(small)), weight.flatten(-3))
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
        patches, rows = _of(weight, _patches(big)), _of(weight, _rows(small))
        return _product(patches.mT, rows).mT.reshape(weight.shape)
    if weight.dim() == 5:
        pairs = zip(big.chunk(len(weight)), small.chunk(len(weight)), weight, strict=True)
        return torch.stack([weight_gradient(*one) for one in pairs])
    return torch.ops.aten.convolution_backward(
        _laid_out(small), _laid_out(big), _laid_out(weight),
        None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False],
    )[1]  # fmt: skip


def _by_patches(images: Tensor, weight: Tensor) -> bool:
    """Whether one product of matrices with patches is faster than PyTorch's convolutions.

    On a GPU those of a pack would be grouped convolutions, of one group per member.
    """
    return weight.dim() == 5 if images.is_cuda else weight.shape[-3] <= FEW


def _of(weight: Tensor, rows: Tensor) -> Tensor:
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


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix product plus bias; of a pack on a CPU: each member's as it would be alone."""
    if a.dim() == 2:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    if _one_by_one(a):
        products = a.new_empty(*a.shape[:2], b.shape[2])
        for i, product in enumerate(products):
            if bias is None:
                torch.mm(a[i], b[i], out=product)
            else:
                torch.addmm(bias[i], a[i], b[i], out=product)
        return products
    return a @ b if bias is None else torch.baddbmm(bias[:, None], a, b)


def _laid_out(images: Tensor) -> Tensor:
    """Channels last, if that is faster."""
    return images if images.is_cuda else images.contiguous(memory_format=torch.channels_last)


def _rows(images: Tensor) -> Tensor:
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


class _Layer(torch.autograd.Function):
    """``forward`` with bias and ReLU, differentiated by means of its adjoint ``backward``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, is_down: bool) -> Tensor:
        y = down(x, weight, bias) if is_down else up(x, weight, bias)
        return y.relu_() if relu else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, relu, ctx.is_down = inputs
        ctx.save_for_backward(x, weight, output if relu else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight, y = ctx.saved_tensors
        if gradient.shape[1] > FEW:
            gradient = _laid_out(gradient)
        if y is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        big, small = (x, gradient) if ctx.is_down else (gradient, x)
        adjoint: Callable[..., Tensor] = up if ctx.is_down else down
        of_x = adjoint(gradient, weight) if ctx.needs_input_grad[0] else None
        of_bias = _sum_rows(_of(weight, _rows(gradient)))
        return of_x, weight_gradient(big, small, weight), of_bias, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor, *how: bool
    ) -> tuple[Tensor, int]:
        x, weight, bias = _first(info, in_dims, x, weight, bias)
        return _Layer.apply(x.flatten(0, 1), weight, bias, *how).unflatten(0, x.shape[:2]), 0


class _Linear(torch.autograd.Function):
    """A linear layer: (B, K), (D, K), (D,) -> (B, D); for a pack (N, B, K) and so on."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _product(x, weight.mT, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x = _product(gradient, weight) if ctx.needs_input_grad[0] else None
        return of_x, _product(gradient.mT, x), _sum_rows(gradient)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _Linear.apply(*_first(info, in_dims, *tensors)), 0


def _first(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> list[Tensor]:
    """The tensors with the pack's axis, which some may lack, as their first one."""
    return [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=False)
    ]


def _sum_rows(rows: Tensor) -> Tensor:
    """(R, D) -> (D,); with many columns a product takes a third of the time of sum()."""
    if rows.shape[-1] <= FEW:
        return rows.sum(dim=-2)
    return _product(rows.new_ones(*rows.shape[:-2], 1, rows.shape[-2]), rows).squeeze(-2)


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
    return _Linear.apply(x.permute(0, 2, 3, 1).flatten(1), weight, bias)


def linear_to_images(
    x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """A linear layer, then images of that shape: (B, D), (C * H * W, D) -> (B, C, H, W)."""
    weight = weight.unflatten(0, shape).permute(1, 2, 0, 3).flatten(0, 2)
    bias = bias.unflatten(0, shape).permute(1, 2, 0).flatten()
    rows = _Linear.apply(x, weight, bias).unflatten(1, (*shape[1:], shape[0]))
    return rows.permute(0, 3, 1, 2)
