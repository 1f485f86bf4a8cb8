"""Which likelihood for which images: each is trained on photographs in colour and on garments in
grey, with the default options, and looked at.

    python benchmarks/likelihoods.py           # an hour on 2 cores at load; goes on after a stop
    python benchmarks/likelihoods.py --table   # the tables of docs/objectives.md

Photographs: 32x32 patches of scikit-learn's two sample photographs (china.jpg, flower.jpg), those
of the left 512 columns to train on, those of the other 128 to validate on. Garments: the first
10,000 images of Fashion-MNIST's training split and the first 2,000 of its validation split.
Writes a row per run to benchmarks/likelihoods.json, and pictures (images, their reconstructions,
samples of the prior) to logs/likelihoods/.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from vae_hyperband import RunOptions, TrainConfig, fit, load_model
from vae_hyperband.common.process import environment
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Split, load_split
from vae_hyperband.evaluation.bounds import (
    bits_are_of,
    bits_per_dimension,
    eval_dataloader,
    split_nats,
)
from vae_hyperband.evaluation.results import mean_and_error

FOLDER = Path(__file__).parent
RAW, PICTURES = FOLDER / "likelihoods.json", Path("logs/likelihoods")
SIZE, COLUMNS = 32, 512
EPOCHS = {"photographs": 15, "garments": 10}
SETTINGS = {
    "bernoulli": {},
    "continuous-bernoulli": {"likelihood": "continuous-bernoulli"},
    "gaussian --sigma 1": {"likelihood": "gaussian", "sigma": 1.0},
    "gaussian": {"likelihood": "gaussian"},
    "learned-gaussian": {"likelihood": "learned-gaussian"},
    "laplace": {"likelihood": "laplace"},
    "discretized-logistic": {"likelihood": "discretized-logistic"},
}


@dataclass(frozen=True)
class Row:
    """One run, measured on its validation split; nats per image."""

    images: str
    name: str
    seed: int
    epochs: int
    num_train: int
    num_validation: int
    bound: float
    bound_standard_error: float
    KL_divergence: float
    bits_per_dimension: float | None
    mean_squared_error: float  # of reconstructions, per pixel and channel
    scale: list[float] | None  # exp(log_scale), where it is learned


def patches(photographs: list[np.ndarray], columns: slice, stride: int) -> Split:
    """All patches of a part of the photographs, ``stride`` pixels apart."""
    parts = [photograph[:, columns] for photograph in photographs]
    images, labels = [], []
    for label, part in enumerate(parts):
        for top in range(0, part.shape[0] - SIZE + 1, stride):
            for left in range(0, part.shape[1] - SIZE + 1, stride):
                images.append(part[top : top + SIZE, left : left + SIZE])
                labels.append(label)
    x_NCHW = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    digest = hashlib.sha256(x_NCHW.tobytes()).hexdigest()
    return Split(torch.from_numpy(x_NCHW), torch.tensor(labels), digest)


def splits(images: str) -> tuple[Split, Split]:
    if images == "garments":
        train, validation = load_split("train"), load_split("validation")
        return train.subset(torch.arange(10_000)), validation.subset(torch.arange(2_000))
    photographs = load_sample_images().images
    return patches(photographs, slice(COLUMNS), 6), patches(photographs, slice(COLUMNS, None), 16)


def picture(x_NCHW: torch.Tensor, path: Path) -> None:
    """A grid of four rows, twice as large."""
    grid = x_NCHW.unflatten(0, (4, -1)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray((grid.clamp(0, 1) * 255).round().byte().squeeze(-1).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def one_run(images: str, name: str, seed: int, train: Split, validation: Split) -> Row:
    run, epochs = f"likelihoods-{images}-{name.replace(' --', '-')}-{seed}", EPOCHS[images]
    run = run.replace(" ", "-")
    dataset = {"dataset": "custom"} if images == "photographs" else {}
    config = TrainConfig(epochs=epochs, val_interval=epochs, seed=seed, **dataset, **SETTINGS[name])
    options = RunOptions(run=run, device="cpu", num_threads=1, tensorboard=False)
    with torch.enable_grad():
        trained = fit(config, options, splits=(train, validation))
    model = load_model(trained.best)
    nats = split_nats(model, eval_dataloader(validation), 0)
    bound = mean_and_error(nats.recon_B + nats.kl_B)
    x_NCHW = validation.pixels(slice(None))
    shown = torch.cat([model.reconstruct(x_BCHW) for x_BCHW in x_NCHW.split(500)])
    some = torch.linspace(0, len(validation) - 1, 16).long()
    samples = model.sample(32, generator(0, "look"))
    picture(torch.cat((x_NCHW[some], shown[some], samples)), PICTURES / f"{run}.png")
    in_bits = bits_per_dimension(bound, model.likelihood, validation.image_shape).mean
    return Row(
        images, name, seed, epochs, len(train), len(validation),
        bound=bound.mean,
        bound_standard_error=bound.standard_error,
        KL_divergence=nats.kl_B.mean().item(),
        bits_per_dimension=in_bits if bits_are_of(model.likelihood, grey=True) else None,
        mean_squared_error=(shown - x_NCHW).square().mean().item(),
        scale=None if model.log_scale is None else model.log_scale.exp().flatten().tolist(),
    )  # fmt: skip


def table(rows: list[Row], images: str) -> str:
    """The runs on one kind of images in Markdown; the first seed of each likelihood."""
    lines = [
        "| `--likelihood` | KL | bits per dimension | root of the mean squared error, in levels |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.images == images and row.seed == 0:
            bits = "-" if row.bits_per_dimension is None else f"{row.bits_per_dimension:.2f}"
            error = 255 * row.mean_squared_error**0.5
            lines.append(f"| `{row.name}` | {row.KL_divergence:.1f} | {bits} | {error:.1f} |")
    return "\n".join(lines)


def load() -> list[Row]:
    return [Row(**row) for row in json.loads(RAW.read_text())["rows"]] if RAW.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    rows = load()
    for images in EPOCHS:
        if arguments.table:
            print(table(rows, images), end="\n\n")
            continue
        train, validation = splits(images)
        for seed in arguments.seeds:
            for name in SETTINGS:
                if not any((r.images, r.name, r.seed) == (images, name, seed) for r in rows):
                    rows.append(one_run(images, name, seed, train, validation))
                    found = {"environment": environment(torch.device("cpu"))}
                    found |= {"rows": [vars(row) for row in rows]}
                    RAW.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
