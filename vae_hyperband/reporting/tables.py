"""Tables of results, and an evaluation as such tables: for the terminal, pages and model cards."""

from collections.abc import Sequence
from dataclasses import dataclass

from vae_hyperband.common.checks import plural
from vae_hyperband.evaluation.results import (
    Estimate,
    Evaluation,
    GeneratedImages,
    LatentSpace,
    Likelihood,
)

#: Names of the losses in tables and figures; nats per image.
LOSS_NAMES = {
    "bound": "bound (beta = 1)",
    "recon_loss": "reconstruction",
    "KL_divergence": "KL divergence",
}

#: Names of the other measures. A table with "fid" names the features in its title or a note.
MEASURE_NAMES = {
    "active_units": "active units",
    "linear_probe": "linear probe",
    "knn_probe": "kNN probe",
    "mig": "MIG",
    "fid": "FID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "closer_than_held_out": "copying",
    "inception_fid": "Inception FID",
}


@dataclass(frozen=True)
class Table:
    """Rows of cells, each row named by its first cell; a head, if the columns have names."""

    title: str
    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()

    def text(self) -> str:
        """Aligned columns, without the title: names to the left, values below a head to the
        right."""
        lines = [self.head, *self.rows] if self.head else self.rows
        first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
        align = str.rjust if self.head else str.ljust
        return "\n".join(
            "  ".join([name.ljust(first), *map(align, cells, widths)]).rstrip()
            for name, *cells in lines
        )


def evaluation_text(evaluation: Evaluation) -> str:
    """An evaluation as lines of text."""
    parts = [headline(evaluation)]
    for table in evaluation_tables(evaluation):
        indented = table.text().replace("\n", "\n  ")
        parts.append(f"{table.title}\n  {indented}")
    return "\n\n".join(parts)


def headline(evaluation: Evaluation) -> str:
    split, num = evaluation.split, evaluation.num_images
    return f"{split} split, {plural(num, 'image')}; mean +- standard error"


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """An evaluation as up to three tables."""
    tables = []
    if likelihood := evaluation.likelihood:
        rows = list(_likelihood_rows(likelihood).items())
        tables.append(Table(f"likelihood: {likelihood.unit}", rows))
    if latents := evaluation.latents:
        title = "latent space"
        if latents.linear_probe:
            title += ": accuracy of probes on the posterior means"
        tables.append(Table(title, list(_latent_rows(latents).items())))
    if evaluation.images:
        tables.append(_image_table(evaluation.images))
    return tables


def _likelihood_rows(found: Likelihood) -> dict[str, str]:
    rows = {
        "bound": f"{found.bound:.2f}",
        "  reconstruction": f"{found.recon_loss:.2f}",
        "  KL divergence": f"{found.KL_divergence:.2f}",
    }
    if iwae := found.iwae:
        rows[f"IWAE-{iwae.num_samples} bound"] = (
            f"{iwae:.2f}  (the bound less {iwae.gain_on_these_images:.2f}, "
            f"from {plural(iwae.num_images, 'image')})"
        )
    if bits := found.bits_per_dimension:
        iwae_bits = found.iwae_bits_per_dimension
        more = f"  (IWAE {iwae_bits:.3f})" if iwae_bits else ""
        rows["bits per dimension"] = f"{bits:.3f}{more}"
    if found.entropy_floor is not None:
        rows |= {
            "entropy floor": f"{abs(found.entropy_floor):.2f}",  # of black and white it is -0
            "bound above floor": f"{found.nats_above_floor:.2f}",
            "mean image": f"{found.mean_image:.2f}  ({_share(found)})",
        }
    return rows


def _share(found: Likelihood) -> str:
    if found.share_of_gap is None:
        return "no gap from here to the floor: the images hardly differ"
    if found.share_of_gap < 0:
        return f"the bound is {found.bound.mean - (found.mean_image or 0):.2f} nats worse"
    return f"the bound closes {found.share_of_gap:.1%} of the gap from here to the floor"


def _latent_rows(latents: LatentSpace) -> dict[str, str]:
    collapsed = "  COLLAPSED: z carries no information about the image" if latents.collapsed else ""
    rows = {
        MEASURE_NAMES["active_units"]: f"{latents.active_units} of {latents.latent_dim}{collapsed}",
        "mutual information": f"{latents.mutual_information:.2f} nats",
    }
    if latents.raw_pixels:
        for probe in ("linear_probe", "knn_probe"):
            of_latents: Estimate = getattr(latents, probe)
            of_pixels: Estimate = getattr(latents.raw_pixels, probe)
            rows[MEASURE_NAMES[probe]] = f"{of_latents:.3f}  (raw pixels {of_pixels:.3f})"
    if factors := latents.factors:
        rows |= {
            MEASURE_NAMES["mig"]: f"{factors.mig:.3f}",
            "FactorVAE score": f"{factors.factor_vae_score:.3f}",
            "DCI": ", ".join(f"{name} {value:.3f}" for name, value in factors.dci.items()),
        }
    return rows


def _image_table(images: GeneratedImages) -> Table:
    """A column for each kind of images; a dash where a measure does not apply."""
    kinds = images.kinds.values()
    rows = [["images", *(f"{kind.num_images:,}" for kind in kinds)]]
    for measure in ("fid", "kid", "precision", "recall", "density", "coverage",
                    "closer_than_held_out", "inception_fid"):  # fmt: skip
        digits = 2 if "fid" in measure else 4 if measure == "kid" else 3
        found: list[Estimate | None] = [getattr(kind, measure) for kind in kinds]
        if any(found):
            cells = [f"{value:.{digits}f}" if value else "-" for value in found]
            rows.append([MEASURE_NAMES[measure], *cells])
    title = f"images against the split's: {images.fid_name} and nearest neighbours"
    if not any(kind.precision for kind in kinds):
        title += " (no precision to coverage: each image of the split equals its 5 nearest ones)"
    return Table(title, rows, head=["", *images.kinds])
