"""The network's layers, differentiated by hand: see :mod:`vae_hyperband.convolution` for why.

The (transposed) convolutions, 3x3 with stride 2, ReLU included, and the linear layers between them
are PyTorch's own layers with the same parameters. A pack of N networks is the same code:
``torch.func.vmap`` over their weights ends here.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vae_hyperband.convolution import (
    FEW,
    by_member,
    channels_last,
    down,
    product,
    sum_rows,
    to_rows,
    up,
    weight_gradient,
)


def in_pack(tensor: Tensor) -> bool:
    """Whether vmap is at work on it. PyTorch has no public way to ask.

    Functions that vmap can take cost 0.4 ms a step more, 4% at batch 128, than those it cannot.
    """
    return torch._C._functorch.is_batchedtensor(tensor)


class _Layer(torch.autograd.Function):
    """``forward`` with bias and ReLU, differentiated by means of its adjoint ``backward``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, is_down: bool
    ) -> Tensor:
        if weight.shape[1] > FEW:  # once for both directions
            x, weight = channels_last(x), channels_last(weight)
        y = _PackedLayer.forward(x, weight, bias, relu, is_down)
        _PackedLayer.setup_context(ctx, (x, weight, bias, relu, is_down), y)
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
        of_bias = sum_rows(by_member(weight, to_rows(gradient)))
        return of_x, of_weight, of_bias, None, None


class _PackedLayer(_Layer):
    """The same for vmap, whose functions have a forward without ctx."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, weight: Tensor, bias: Tensor, relu: bool, is_down: bool
    ) -> Tensor:
        y = down(x, weight, bias) if is_down else up(x, weight, bias)
        return y.relu_() if relu else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, relu, ctx.is_down = inputs
        ctx.save_for_backward(x, weight, output if relu else None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor, *how: bool
    ) -> tuple[Tensor, int]:
        x, weight, bias = _first(info, in_dims, x, weight, bias)
        return _PackedLayer.apply(x.flatten(0, 1), weight, bias, *how).unflatten(0, x.shape[:2]), 0


class _PackedLinear(torch.autograd.Function):
    """A pack's linear layers, (N, B, K), (N, D, K), (N, D) -> (N, B, D), each as by F.linear."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return product(x, weight.mT, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x = product(gradient, weight) if ctx.needs_input_grad[0] else None
        return of_x, product(gradient.mT, x), gradient.sum(dim=-2)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _PackedLinear.apply(*_first(info, in_dims, *tensors)), 0


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, is_down: bool) -> Tensor:
    kind = _PackedLayer if in_pack(weight) else _Layer
    return kind.apply(x, weight, bias, relu, is_down)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _PackedLinear.apply(x, weight, bias) if in_pack(weight) else F.linear(x, weight, bias)


def _first(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> list[Tensor]:
    """The tensors with the pack's axis, which some may lack, as their first one."""
    return [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=False)
    ]


class Conv(nn.Conv2d):
    """3x3, stride 2, padding 1: half the size. (B, C, H, W) -> (B, D, H/2, W/2), ReLU included."""

    def __init__(self, in_channels: int, out_channels: int, relu: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return _layer(x, self.weight, self.bias, self.relu, is_down=True)

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
        return _layer(x, self.weight, self.bias, self.relu, is_down=False)

    def plain(self, x: Tensor) -> Tensor:
        """The same by PyTorch's own layer."""
        y = super().forward(x)
        return torch.relu(y) if self.relu else y


def linear_from_images(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Flatten, then a linear layer: (B, C, H, W), (D, C * H * W), (D,) -> (B, D)."""
    # copying the weights into the order of the pixels is cheaper than the reverse
    weight = weight.unflatten(1, x.shape[1:]).permute(0, 2, 3, 1).flatten(1)
    return _linear(x.permute(0, 2, 3, 1).flatten(1), weight, bias)


def linear_to_images(
    x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """A linear layer, then images of that shape: (B, D), (C * H * W, D) -> (B, C, H, W)."""
    weight = weight.unflatten(0, shape).permute(1, 2, 0, 3).flatten(0, 2)
    bias = bias.unflatten(0, shape).permute(1, 2, 0).flatten()
    rows = _linear(x, weight, bias).unflatten(1, (*shape[1:], shape[0]))
    return rows.permute(0, 3, 1, 2)
