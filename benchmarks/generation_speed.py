"""Claim: `sample` draws and decodes on a CPU at nearly half the speed that the decoder's matrix
products alone allow, sigmoid and bytes included; reconstruction at two thirds of the network's.

    python benchmarks/generation_speed.py       # 2 minutes on 2 cores

Contenders take turns of 16,640 images. Writes benchmarks/generation_speed.json.
"""

import argparse

import torch
from alternation import Contenders, ratio, summary, write

BOUNDS = {"sample": "decoder's matrix products", "reconstruct": "network's matrix products"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    threads = torch.get_num_threads()
    with Contenders([*BOUNDS, *BOUNDS.values()], threads) as contenders:
        rates = contenders.rounds(parser.parse_args().rounds)
    result = {
        "threads": threads,
        "images_per_second": {name: summary(values) for name, values in rates.items()},
        "share_of_the_bound": {name: ratio(rates, name, bound) for name, bound in BOUNDS.items()},
        "rounds": rates,
    }
    write("generation_speed", result)


if __name__ == "__main__":
    main()
