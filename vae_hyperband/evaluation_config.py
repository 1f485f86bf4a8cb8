"""Every setting of an evaluation, once. What is looked at, and how closely."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from vae_hyperband.checks import check_types, require, require_number
from vae_hyperband.samplers import SAMPLERS, SamplerConfig, SamplerName

Part = Literal["likelihood", "latents", "images"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What an evaluation looks at, and how closely."""

    parts: tuple[Part, ...] = PARTS
    """likelihood: bounds; latents: active units, probes; images: FID and its kin."""
    iwae_samples: int = 100
    """Importance samples per image of the IWAE bound; 0: leave it out."""
    iwae_images: int = 1000
    """Images of the split, at random, on which what the IWAE bound gains is measured."""
    samplers: tuple[SamplerName, ...] = SAMPLERS
    """Where z comes from for generated images; what is not fitted yet is fitted first."""
    num_generated: int | None = None
    """Images to generate per sampler (default: as many as the split has); FID depends on it."""
    inception: Path | None = None
    """Measure FID in Inception's features, too: its weights as TorchScript, which you have to have
    (inception-2015-12-05.pt of StyleGAN2-ADA; docs/evaluation.md)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require(len(self.parts) > 0, "--parts names no part: give at least one.")
        require_number("iwae_samples", self.iwae_samples, 0)
        require_number("iwae_images", self.iwae_images, 2)
        require(
            self.inception is None or self.inception.is_file(),
            f"--inception is {str(self.inception)!r}, but there is no such file.",
        )
        if self.num_generated is not None:
            require_number("num_generated", self.num_generated, 10)
