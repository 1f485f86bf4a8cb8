"""Claim: the feature network that ships with the package can be made again, and classifies the
10,000 test images of Fashion-MNIST with an accuracy of at least 0.925.

It is trained on the 50,000 training images alone, so that the validation and the test split are
both new to it. Run: python benchmarks/feature_net.py [--epochs 20] [--threads 1]
Writes vae_hyperband/evaluation/feature_net.safetensors and benchmarks/feature_net.json, and prints
the digest that vae_hyperband/evaluation/features.py has to name. The recipe is the one of networks
of a user's own data (vae_hyperband/evaluation/feature_net.py), for longer. The same torch build,
CPU and number of threads give the same bytes; other ones other weights of the same accuracy, by and
large. bfloat16, for the CPUs that have it, halves the time.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from vae_hyperband.common.process import environment
from vae_hyperband.data.splits import load_split
from vae_hyperband.evaluation.feature_net import (
    NUM_FEATURES,
    NetSettings,
    accuracy,
    train_feature_net,
)
from vae_hyperband.evaluation.features import WEIGHTS

BATCH_SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    train = load_split("train")
    steps = args.epochs * math.ceil(len(train) / BATCH_SIZE)
    net = train_feature_net(train, NetSettings(), BATCH_SIZE, steps, bfloat16=True)
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
