"""Many runs at once: a pack of networks that take their steps together, as one with an axis more.

The members of a pack share their data, batch size and kind of objective; latent dimension, learning
rate, beta and seed are each one's own. A narrower code lies in the first dimensions of the widest:
the others have zero weights, which take no part in training, and zero noise, so that what they add
to every term of every objective is zero, too (free-bits apart, where it is taken away again).
A member is put in, takes steps beside the others, and is taken out again; what it becomes depends
on nobody else. A step that is not finite holds its member where it was, and nobody else.

On a GPU a step is captured once per batch length as a CUDA graph and replayed, without the host
waiting for it: all that changes from step to step, hyperparameters included, lies in tensors. With
``--cuda-graph`` a run alone is a pack of one.

Shape suffixes: N places of the pack, B images of a batch, S samples of z per batch, K steps,
C channels, H height, W width, Z latent dimensions of the widest member.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from vae_hyperband.bounds import standard_normal
from vae_hyperband.config import TrainConfig, model_settings
from vae_hyperband.data import Split, epoch_order
from vae_hyperband.errors import ConfigError, DeviceError
from vae_hyperband.model import VAE
from vae_hyperband.objective import Nats, batch_losses, knobs_at, noise_per_image
from vae_hyperband.stacked import Stack
from vae_hyperband.state import TrainState
from vae_hyperband.steps import as_drawn, loss_sums

#: On a CPU, images per batch up to which one pass of all members is faster than a pass of each.
FEW_IMAGES = 32


class _Objective(nn.Module):
    """What one member minimises, as a function of its parameters for ``functional_call``."""

    def __init__(self, config: TrainConfig, model: VAE, num_images: int) -> None:
        super().__init__()
        self.config, self.model, self.num_images = config, model, num_images

    def forward(self, x_BCHW: Tensor, noise_SZ: Tensor, knobs: Tensor) -> tuple[Nats, Tensor]:
        _, beta, capacity = knobs.unbind()
        return batch_losses(
            self.config, self.model, x_BCHW, noise_SZ, beta, capacity, self.num_images
        )


@dataclass
class _Inputs:
    """What one step reads and writes, at fixed places in memory, for one length of batch."""

    x_NBCHW: Tensor
    noise_NSZ: Tensor
    sums_N5: Tensor  # those of loss_sums, and whether the step was taken


class Pack:
    """``capacity`` places for runs whose configurations agree with ``config`` but for what is
    said above; ``latent_dim`` is that of the widest. ``train`` is what they are trained on."""

    def __init__(
        self,
        config: TrainConfig,
        train: Split,
        capacity: int = 1,
        latent_dim: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.capacity, self.device = config, capacity, torch.device(device)
        self.latent_dim = latent_dim or config.latent_dim
        self._train = Split(train.images_NCHW.to(device), train.labels_N, train.digest)
        channels, image_size, _ = train.image_shape
        settings = model_settings(config.to_dict()) | {"latent_dim": self.latent_dim}
        with torch.device("meta"):  # no weights of its own: functional_call brings each member's
            model = VAE(image_size=image_size, channels=channels, **settings)
        self._objective = _Objective(config, model, len(train))
        self._names = [name for name, _ in self._objective.named_parameters()]
        # AdamW takes a GPU's learning rate in float32 only
        kind = torch.float32 if self.device.type == "cuda" else torch.float64
        self._knobs_N3 = torch.zeros(capacity, 3, dtype=kind, device=device)
        self._waits_N = torch.ones(capacity, dtype=torch.bool, device=device)
        self._diverged_N = torch.zeros(capacity, dtype=torch.bool, device=device)
        self._skips_N = torch.ones(capacity, device=device)  # 1: the optimizer does nothing
        shapes = [parameter.shape for parameter in model.parameters()]
        self._stack = Stack(shapes, self._knobs_N3[:, 0], self._skips_N)
        self._steps: dict[int, tuple[_Inputs, Callable[[], None]]] = {}  # by length of batch

    def run(self, members: list[TrainState], num_steps: int) -> list[Tensor]:
        """Train each member on by so many steps, or to the end of its epoch if that is nearer.

        Returns the losses of each one's steps, (K, 4) as of :func:`~vae_hyperband.steps.loss_sums`.
        A member with fewer steps than were due would diverge in the next. The models and optimizers
        are brought to the last step; ``state.step`` and ``state.sums`` are left to the caller.
        """
        assert 0 < len(members) <= self.capacity, len(members)
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            return self._run(members, num_steps)

    def _run(self, members: list[TrainState], num_steps: int) -> list[Tensor]:
        for place, member in enumerate(members):
            self._refuse_other(member.config)
            self._stack.put(place, member)
        self._diverged_N.fill_(False)
        sums_KN5 = torch.cat(list(self._sums(members, num_steps))).cpu()
        losses = []
        for place, member in enumerate(members):
            taken_K5 = sums_KN5[sums_KN5[:, place, 4] == 1, place]
            losses.append(self._own(member, taken_K5[:, :4]))
            if len(taken_K5):
                self._stack.take_out(place, member, len(taken_K5))
        return losses

    def _refuse_other(self, config: TrainConfig) -> None:
        mine, theirs = (c.common() | {"batch_size": c.batch_size} for c in (self.config, config))
        if mine != theirs or config.latent_dim > self.latent_dim:
            raise ConfigError("A pack takes runs of one batch size and one objective only.")

    def _own(self, member: TrainState, losses_K4: Tensor) -> Tensor:
        """Without what free-bits has counted for dimensions that the member does not have."""
        if member.config.objective == "free-bits":
            others = self.latent_dim - member.config.latent_dim
            for k, losses in enumerate(losses_K4):
                beta = knobs_at(member.config, member.step + k, member.steps_per_epoch).beta
                losses[2] -= beta * member.config.free_bits * others * losses[3]
        return losses_K4

    # ---- who takes which step when

    def _sums(self, members: list[TrainState], num_steps: int) -> Iterator[Tensor]:
        """Take all steps; their losses, (K, N, 5) per length of batch.

        Who is at the end of an epoch, where a batch may be shorter, waits for those who are not.
        """
        short = len(self._train) % self.config.batch_size
        spans, last = [], []
        for member in members:
            left = member.steps_per_epoch - member.step % member.steps_per_epoch
            end = member.step + min(num_steps, left)
            cut = end - (short > 0 and num_steps >= left)
            spans.append(range(member.step, cut))
            last.append(range(cut, end))
        if any(spans):
            yield self._taken(members, spans, self.config.batch_size)
        if any(last):
            yield self._taken(members, last, short)

    def _taken(self, members: list[TrainState], spans: list[range], length: int) -> Tensor:
        """Each member's steps of that span, with batches of one length: (K, N, 5)."""
        num_rounds = max(map(len, spans))
        index_KNB = torch.zeros(num_rounds, self.capacity, length, dtype=torch.int64)
        knobs_KN3 = torch.zeros(num_rounds, self.capacity, 3, dtype=torch.float64)
        waits_KN = torch.ones(num_rounds, self.capacity, dtype=torch.bool)
        for place, (member, span) in enumerate(zip(members, spans, strict=True)):
            if span:
                config, steps_per_epoch = member.config, member.steps_per_epoch
                order = epoch_order(len(self._train), config.seed, member.epoch)
                start = span.start % steps_per_epoch * config.batch_size
                images = order[start : start + len(span) * length]
                index_KNB[: len(span), place] = images.view(-1, length)
                knobs = [knobs_at(config, step, steps_per_epoch) for step in span]
                knobs_KN3[: len(span), place] = torch.tensor(knobs, dtype=torch.float64)
                waits_KN[: len(span), place] = False
        # all at once: a copy for each step would make the host wait for the GPU
        tables = [table.to(self.device) for table in (index_KNB, knobs_KN3, waits_KN)]
        inputs, take_step = self._step_of(length)
        sums = []
        for k, (index_NB, knobs_N3, waits_N) in enumerate(zip(*tables, strict=True)):
            self._knobs_N3.copy_(knobs_N3)
            self._waits_N.copy_(waits_N)
            inputs.x_NBCHW.copy_(self._train.pixels(index_NB.flatten()).view_as(inputs.x_NBCHW))
            self._draw(inputs, members, [span[k] if k < len(span) else None for span in spans])
            take_step()
            sums.append(inputs.sums_N5.clone())
        self._waits_N.fill_(True)
        return torch.stack(sums)

    def _draw(self, inputs: _Inputs, members: list[TrainState], steps: list[int | None]) -> None:
        """What is random in each member's step: its noise, its images' bits."""
        noises: dict[tuple[int, ...], Tensor] = {}  # members of one seed often need the same
        for place, (member, step) in enumerate(zip(members, steps, strict=True)):
            if step is None:
                continue
            config = member.config
            if config.binarize != "none":
                inputs.x_NBCHW[place] = as_drawn(config, inputs.x_NBCHW[place], step)
            what = (config.seed, step, config.latent_dim)
            if what not in noises:
                num = inputs.noise_NSZ.shape[1]
                noises[what] = standard_normal(
                    config.seed, "noise", step, num, config.latent_dim, self.device
                )
            inputs.noise_NSZ[place, :, : config.latent_dim] = noises[what]
            inputs.noise_NSZ[place, :, config.latent_dim :] = 0

    # ---- one step of all

    def _step_of(self, length: int) -> tuple[_Inputs, Callable[[], None]]:
        """The step for batches of that length, and what it reads; captured if on a GPU."""
        if length not in self._steps:
            num, shape = noise_per_image(self.config) * length, self._train.image_shape
            inputs = _Inputs(
                torch.zeros(self.capacity, length, *shape, device=self.device),
                torch.zeros(self.capacity, num, self.latent_dim, device=self.device),
                torch.zeros(self.capacity, 5, dtype=torch.float64, device=self.device),
            )
            step = functools.partial(self._step, inputs)
            self._steps[length] = (inputs, captured(step) if self.device.type == "cuda" else step)
        return self._steps[length]

    def _step(self, inputs: _Inputs) -> None:
        on_cpu, length = self.device.type == "cpu", inputs.x_NBCHW.shape[1]
        if self.capacity > 1 and (not on_cpu or length <= FEW_IMAGES):
            return self._step_at(slice(0, self.capacity), inputs)
        for place in range(self.capacity):
            if on_cpu and self._waits_N[place]:
                inputs.sums_N5[place] = 0
            else:
                self._step_at(place, inputs)

    def _step_at(self, places: slice | int, inputs: _Inputs) -> None:
        """A step of all places side by side, or of one."""
        weights = self._stack.weights(places)
        losses = self._losses if isinstance(places, int) else vmap(self._losses)
        knobs = self._knobs_N3[places].float()
        nats, total = losses(weights, inputs.x_NBCHW[places], inputs.noise_NSZ[places], knobs)
        gradients = torch.autograd.grad(total.sum(), weights)
        # a norm is finite only if all squares are, of which Adam keeps an average
        gradient = torch.cat([x.reshape(*total.shape, -1) for x in gradients], dim=-1)
        gradient *= self._stack.own_NP[places]
        norm = torch.linalg.vector_norm(gradient, dim=-1)
        finite, waits = torch.isfinite(total.detach() + norm), self._waits_N[places]
        self._diverged_N[places] |= ~waits & ~finite
        taken = ~(waits | self._diverged_N[places])
        self._skips_N[places] = (~taken).float()
        sums = torch.cat((loss_sums(nats, total.detach()), taken.double()[..., None]), dim=-1)
        inputs.sums_N5[places] = torch.where(taken[..., None], sums, 0.0)
        if isinstance(places, int):
            return self._stack.update(places, gradient)
        for place, gradient_P in enumerate(gradient):
            self._stack.update(place, gradient_P)

    def _losses(
        self, weights: list[Tensor], x_BCHW: Tensor, noise_SZ: Tensor, knobs: Tensor
    ) -> tuple[Nats, Tensor]:
        by_name = dict(zip(self._names, weights, strict=True))
        return functional_call(self._objective, by_name, (x_BCHW, noise_SZ, knobs))


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A step as a CUDA graph; while it is captured, no place may be about to take one."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in their first calls
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(
            f"The training step could not be captured as a CUDA graph ({reason}): leave out "
            "--cuda-graph, or --engine packed."
        ) from error
    return graph.replay
