"""Claim: the feature network that ships with the package can be made again, and classifies the
10,000 test images of Fashion-MNIST with an accuracy of at least 0.925.

It is trained on the 50,000 training images alone, so that the validation and the test split are
both new to it. Run: python benchmarks/feature_net.py [--epochs 20] [--threads 1]
Writes vae_hyperband/evaluation/feature_net.safetensors and benchmarks/feature_net.json, and prints
the digest that vae_hyperband/evaluation/image_quality.py has to name. The same torch build, CPU and
number of threads give the same bytes; other ones other weights of the same accuracy, by and large.
bfloat16, for the CPUs that have it, halves the time.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from vae_hyperband.common.process import environment
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import Split, load_split
from vae_hyperband.evaluation.image_quality import NUM_FEATURES, WEIGHTS, FeatureNet
from vae_hyperband.model.schedules import learning_rate_at

SEED, BATCH_SIZE, PEAK, WEIGHT_DECAY, SMOOTHING, SHIFT = 0, 128, 6e-3, 5e-2, 0.1, 2


def initialize(net: FeatureNet) -> None:
    """He initialisation from our own generator."""
    stream = generator(SEED, "init")
    for parameter in net.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            torch.nn.init.normal_(parameter, 0, math.sqrt(2 / fan_in), generator=stream)


def augmented(x_BCHW: torch.Tensor, step: int) -> torch.Tensor:
    """Each image flipped or not, and the batch shifted by up to two pixels."""
    stream = generator(SEED, "augment", step)
    flip_B = torch.rand(len(x_BCHW), generator=stream) < 0.5
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=stream).tolist()
    x_BCHW = torch.where(flip_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
    return F.pad(x_BCHW, (SHIFT,) * 4)[
        :, :, SHIFT + down : SHIFT + down + 28, SHIFT + right : SHIFT + right + 28
    ]


def train(split: Split, epochs: int) -> FeatureNet:
    net = FeatureNet().to(memory_format=torch.channels_last)
    initialize(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK, weight_decay=WEIGHT_DECAY, fused=True)
    loader = get_dataloader(split, BATCH_SIZE, seed=SEED, shuffle=True)
    steps, step = epochs * len(loader), 0
    for epoch in range(epochs):
        right, started = 0, time.monotonic()
        for x_BCHW, labels_B in loader:
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, steps, PEAK, "one-cycle")
            x_BCHW = augmented(x_BCHW, step).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x_BCHW)
            loss = F.cross_entropy(logits.float(), labels_B, label_smoothing=SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            right += int((logits.argmax(dim=1) == labels_B).sum())
            step += 1
        seconds = time.monotonic() - started
        print(
            f"epoch {epoch + 1}: training accuracy {right / len(split):.4f}, {seconds:.0f} s",
            flush=True,
        )
    net.eval()
    with torch.no_grad():
        features_NF = torch.cat(
            [net.features(part / 255) for part in split.images_NCHW.split(1000)]
        )
    net.scale.copy_(features_NF.var(dim=0).mean().rsqrt())
    return net


@torch.no_grad()
def accuracy(net: FeatureNet, split: Split) -> float:
    found = torch.cat(
        [net(split.pixels(part)).argmax(1) for part in torch.arange(len(split)).split(1000)]
    )
    return (found == split.labels_N).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    net = train(load_split("train"), args.epochs)
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(weights, WEIGHTS)
    facts = {
        "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "bytes": WEIGHTS.stat().st_size,
        "num_features": NUM_FEATURES,
        "epochs": args.epochs,
        "validation_accuracy": accuracy(net, load_split("validation")),
        "test_accuracy": accuracy(net, load_split("test")),
        "seconds": time.monotonic() - started,
        "environment": environment(torch.device("cpu")),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
