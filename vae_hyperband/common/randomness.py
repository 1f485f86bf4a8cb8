"""The only source of randomness: a function of (seed, purpose, position), never hidden state.

No generator is kept between uses. So nothing that observes a run (validation, pictures, logs) can
change it, and resuming needs one integer instead of a saved generator.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def generator(
    seed: int, purpose: str, position: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator that depends on its arguments alone: the noise of step 12,345 is the same
    whether the run got there in one go or was killed seven times on the way.

    ``purpose`` names the stream ("order", "noise", "init"), ``position`` counts in it (epochs,
    steps).
    """
    return torch.Generator(device).manual_seed(_number(seed, purpose, position))


def _number(seed: int, purpose: str, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    # manual_seed takes 63 bits of an unsigned number
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """PyTorch's own CPU generator, seeded within the block and as it was after it.

    For code that is not this package's, and samples from that generator.
    """
    before = torch.get_rng_state()
    # not torch.manual_seed, which would seed every GPU's generator, too
    torch.default_generator.manual_seed(_number(seed, purpose, 0))
    try:
        yield
    finally:
        torch.set_rng_state(before)


def standard_normal(
    seed: int, purpose: str, position: int, num: int, latent_dim: int, device: torch.device
) -> Tensor:
    """Noise for ``num`` images, shape (num, Z)."""
    stream = generator(seed, purpose, position, device)
    return torch.randn(num, latent_dim, generator=stream, device=device)
