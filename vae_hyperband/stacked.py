"""The weights of many networks and their optimizers' memories, each a row of one tensor.

Rows are as long as those of the widest network; a narrower one lies in the first elements of each
parameter's dimensions, and zeros beyond.

Shape suffixes: N places, P all parameters of one network.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vae_hyperband.objective import knobs_at
from vae_hyperband.state import ADAM_BETAS, TrainState


class Stack:
    """Places for networks whose parameters have, at most, those shapes.

    ``rate_N`` holds the learning rates; where ``skips_N`` is 1, an update does nothing. Both are
    the caller's, on the device where the weights shall lie.
    """

    def __init__(self, shapes: list[torch.Size], rate_N: Tensor, skips_N: Tensor) -> None:
        self._shapes = shapes
        size = (len(rate_N), sum(shape.numel() for shape in shapes))
        self._weights_NP, self._mean_NP, self._square_NP = (
            torch.zeros(size, device=rate_N.device) for _ in range(3)
        )
        self.own_NP = torch.zeros_like(self._weights_NP)  # 1: a parameter that the member has
        # each parameter by itself: AdamW on a CPU rounds the last elements of a tensor differently
        self._leaves = [
            [view[place].requires_grad_() for view in self._views(self._weights_NP)]
            for place in range(len(rate_N))
        ]
        self._optimizers = [
            self._optimizer(place, rate_N[place], skips_N[place]) for place in range(len(rate_N))
        ]

    def _optimizer(self, place: int, rate: Tensor, skip: Tensor) -> Any:
        leaves = self._leaves[place]
        optimizer: Any = torch.optim.AdamW(
            leaves, lr=rate, betas=ADAM_BETAS, fused=True, capturable=rate.is_cuda
        )
        memory = zip(self._views(self._mean_NP), self._views(self._square_NP), strict=True)
        for leaf, (mean, square) in zip(leaves, memory, strict=True):
            optimizer.state[leaf] = {
                "step": torch.zeros((), device=rate.device),
                "exp_avg": mean[place],
                "exp_avg_sq": square[place],
            }
        # the calls before the capture are meant to be made without it
        optimizer._warned_capturable_if_run_uncaptured = True
        # by these a scaler of mixed precision tells it that a gradient is not finite
        optimizer.grad_scale, optimizer.found_inf = None, skip
        return optimizer

    def weights(self, places: slice | int) -> list[Tensor]:
        """Each parameter of those places, to be differentiated by."""
        return [view[places].detach().requires_grad_() for view in self._views(self._weights_NP)]

    def update(self, place: int, gradient_P: Tensor) -> None:
        """One step of AdamW; the gradient has all parameters in a row."""
        for leaf, gradient in zip(self._leaves[place], self._views(gradient_P[None]), strict=True):
            leaf.grad = gradient[0]
        self._optimizers[place].step()

    @torch.no_grad()
    def put(self, place: int, member: TrainState) -> None:
        for flat_NP in (self._weights_NP, self._mean_NP, self._square_NP, self.own_NP):
            flat_NP[place].zero_()
        for mine, theirs in self._tensors(place, member):
            mine.copy_(theirs)
        for parameter, view in zip(
            member.model.parameters(), self._views(self.own_NP), strict=True
        ):
            view[_corner(place, parameter)] = 1
        for memory in self._optimizers[place].state.values():
            memory["step"].fill_(member.step)

    @torch.no_grad()
    def take_out(self, place: int, member: TrainState, num_steps: int) -> None:
        """Bring the member to where it is ``num_steps`` after having been put in."""
        for mine, theirs in self._tensors(place, member):
            theirs.copy_(mine)
        for memory in member.optimizer.state.values():
            memory["step"].fill_(member.step + num_steps)
        last = knobs_at(member.config, member.step + num_steps - 1, member.steps_per_epoch)
        member.optimizer.param_groups[0]["lr"] = last.learning_rate

    def _tensors(self, place: int, member: TrainState) -> Iterator[tuple[Tensor, Tensor]]:
        """The place's tensors, cut to the member's size, and the member's own."""
        kept = (self._weights_NP, self._mean_NP, self._square_NP)
        views = zip(*(self._views(flat_NP) for flat_NP in kept), strict=True)
        for parameter, mine in zip(member.model.parameters(), views, strict=True):
            memory = member.optimizer.state[parameter]
            if not memory:  # AdamW makes its memory in its first step
                memory["step"] = torch.zeros((), device=parameter.device)
                memory["exp_avg"] = torch.zeros_like(parameter)
                memory["exp_avg_sq"] = torch.zeros_like(parameter)
            corner = _corner(place, parameter)
            theirs = (parameter.data, memory["exp_avg"], memory["exp_avg_sq"])
            yield from ((view[corner], own) for view, own in zip(mine, theirs, strict=True))

    def _views(self, flat_NP: Tensor) -> list[Tensor]:
        """Each parameter, (N, ...), of those that lie one after the other in a row."""
        parts = flat_NP.split([shape.numel() for shape in self._shapes], dim=1)
        return [
            part.view(len(flat_NP), *shape) for part, shape in zip(parts, self._shapes, strict=True)
        ]


def _corner(place: int, parameter: Tensor) -> tuple[int | slice, ...]:
    """Where in the widest network's parameter of that place a member's own lies."""
    return (place, *(slice(0, length) for length in parameter.shape))
