"""Claim: once 20,000 PNGs are decoded, an epoch of batches loads at least 10 times as fast as with
a loader that opens each image, and takes at most 2% of a training step.

    python benchmarks/own_images.py --json benchmarks/own_images.json

The reference is what a tutorial writes: a list of files by their folder, PIL for each image, a
float tensor, torch's DataLoader with 2 workers. Both give shuffled batches of 128 floats; the two
alternate; the ratio is that of the medians. Then a map of 4 GB is decoded and, by another process,
trained on for an epoch and validated, each with RLIMIT_DATA at 1 GB: heap and private pages, which
a map of a file is no part of.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.process import environment
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.decoded import decoded_set
from vae_hyperband.data.splits import load_split
from vae_hyperband.training.dry_run import seconds_per_step

BATCH_SIZE = 128


def write_pictures(folder: Path, num: int, size: int) -> None:
    """PNGs of smooth random colours in ten folders; about 6 KB each."""
    random = np.random.default_rng(0)
    for number in range(num):
        place = folder / f"class {number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (9, 9, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        noise = random.integers(-8, 8, (size, size, 3))
        pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number:06}.png")


class ImageFolder(Dataset[tuple[torch.Tensor, int]]):
    """As a tutorial writes it: each image is opened when it is asked for."""

    def __init__(self, folder: Path) -> None:
        classes = sorted(path.name for path in folder.iterdir())
        self.files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).iterdir())
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[number]
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, label


def images_per_second(loader: DataLoader) -> float:
    """Of one epoch, the start of workers included."""
    started, num = time.perf_counter(), 0
    for x_BCHW, _ in loader:
        num += len(x_BCHW)
    return num / (time.perf_counter() - started)


def speeds(folder: Path, rounds: int) -> dict[str, object]:
    started = time.perf_counter()
    found = decoded_set(folder, quiet=True)
    first = sum(found.counts.values()) / (time.perf_counter() - started)
    started = time.perf_counter()
    train = load_split("train", data=folder)
    again = time.perf_counter() - started
    ours, reference = [], []
    cached = get_dataloader(train, BATCH_SIZE, shuffle=True)
    per_image: DataLoader = DataLoader(ImageFolder(folder), BATCH_SIZE, shuffle=True, num_workers=2)
    for _ in range(rounds):
        ours.append(images_per_second(cached))
        reference.append(images_per_second(per_image))
    config = TrainConfig(dataset="images", batch_size=BATCH_SIZE)
    step = seconds_per_step(config, train, torch.device("cpu"))
    batch = BATCH_SIZE / statistics.median(ours)
    return {
        "decoding, images/s": first,
        "finding it again, s": again,
        "cached epochs, images/s": ours,
        "one file per image, images/s": reference,
        "ratio": statistics.median(ours) / statistics.median(reference),
        "training step, s": step,
        "share of a step": batch / step,
    }


DECODE = """
import sys
from pathlib import Path
from vae_hyperband.data.decoded import decoded_set

decoded_set(Path(sys.argv[1]))
"""

LARGE = """
import resource, sys
from pathlib import Path
from vae_hyperband.common.config import (RunOptions, TrainConfig)
from vae_hyperband.training import loop

def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

most = 0
def watch() -> bool:
    global most
    most = max(most, anonymous())
    return False

folder = Path(sys.argv[2])
options = RunOptions(
    data=Path(sys.argv[1]), checkpoints_dir=folder / "c", logs_dir=folder / "l", device="cpu",
)
config = TrainConfig(epochs=1, latent_dim=16, widths=(8, 16))
trained = loop.fit(config, options, should_stop=watch, quiet=True)
print(trained.finished, trained.state.num_images, most / 1024)
"""


def large_map(num_bytes: int, size: int, allowed: int) -> dict[str, object]:
    """A run on a map of that many bytes, with that much memory of its own allowed."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "large.npy"
        num = num_bytes // (3 * size**2)
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (num, size, size, 3))
        random = np.random.default_rng(0)
        for start in range(0, num, 4096):
            rows = images[start : start + 4096]
            rows[:] = random.integers(0, 256, rows.shape, np.uint8)
        images.flush()
        del images

        def limit() -> None:
            # of data: heap and private pages that can be written; a file's map is not in it
            resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))

        # as "vae-hyperband data" and then "train": what decoding has needed is not there any more
        for script in (DECODE, LARGE):
            done = subprocess.run(
                [sys.executable, "-c", script, path, place],
                capture_output=True, text=True, preexec_fn=limit,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stderr)
        finished, trained_on, peak = done.stdout.split()
    return {
        "map, bytes": num_bytes,
        "allowed, bytes": allowed,
        "finished": finished == "True",
        "training images": int(trained_on),
        "peak of anonymous memory, MB": float(peak),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--num", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, default=4_000_000_000, help="bytes of the large map")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write_pictures(Path(place) / "pictures", args.num, args.size)
        found = speeds(Path(place) / "pictures", args.rounds)
    if args.large:
        found["large"] = large_map(args.large, args.size, 1_000_000_000)
    found |= {"num": args.num, "size": args.size, "environment": environment(torch.device("cpu"))}
    text = json.dumps(found, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
