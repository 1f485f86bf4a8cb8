"""What changes from step to step: the learning rate, the weight of the KL, its capacity."""

import math
from typing import NamedTuple

from vae_hyperband.common.config import TrainConfig

WARMUP_SHARE = 0.15  # of a one-cycle schedule


def beta_at(
    step: int, beta: float, warmup_steps: float, num_steps: int = 1, cycles: int = 0
) -> float:
    """The KL weight of a step: linear from 0 to beta over the warm-up (Bowman et al. 2016).

    With ``cycles`` that many times over the training, each half rise and half plateau (Fu et al.
    2019, equation 6).
    """
    if cycles:
        # the place within a cycle goes from 0 to 1; beta is reached in its middle
        return beta * min(1.0, 2 * (step * cycles / num_steps % 1))
    return beta * min(1.0, step / warmup_steps) if warmup_steps > 0 else beta


def learning_rate_at(step: int, num_steps: int, peak: float, schedule: str) -> float:
    """One-cycle: cosine from peak/25 up over the first 15% of steps, then cosine down to
    peak/250,000 (Smith & Topin 2018). "constant" is the peak throughout."""
    if schedule == "constant":
        return peak
    # counted as torch's OneCycleLR counts, whose values these are
    warmup = max(1.0, WARMUP_SHARE * num_steps - 1)
    if step <= warmup:
        low, high, share = peak / 25, peak, step / warmup
    else:
        low, high = peak / 25e4, peak
        share = 1 - (step - warmup) / max(1.0, num_steps - 1 - warmup)
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


class StepSettings(NamedTuple):
    """The values that the schedules give to one step."""

    learning_rate: float
    beta: float
    capacity: float  # nats of KL that objective "capacity" aims at


def settings_at(config: TrainConfig, step: int, steps_per_epoch: int) -> StepSettings:
    """The capacity rises to its end over the first half of the training (Burgess et al. 2018)."""
    # functions of the step alone, so a resumed run needs no state of a scheduler
    num_steps = config.epochs * steps_per_epoch
    warmup_steps = config.kl_warmup_epochs * steps_per_epoch
    return StepSettings(
        learning_rate_at(step, num_steps, config.learning_rate, config.schedule),
        beta_at(step, config.beta, warmup_steps, num_steps, config.kl_cycles),
        config.capacity * min(1.0, 2 * step / num_steps),
    )
