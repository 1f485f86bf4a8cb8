"""Measures models against each other: the results table and the rate-distortion picture.

Trains and judges, on Fashion-MNIST with the mission's network, every configuration of the table:
VAE and beta-VAE with latent 16, 32, 64 and three seeds; betas from 0.03 to 8; the other objectives,
priors and likelihoods; on drawn garments beta against disentanglement; and what gives the best
bound and the best images. What is chosen (the best generator's sampler) is chosen on the validation
split; numbers are of the test split.

Run: make reproduce, or python benchmarks/reproduce.py [--only table sweep ...]. About three hours
of one CPU core (benchmarks/RECORDS.md); the same command goes on after a stop. Writes
docs/results.json, and the tables and pictures made of it (results_pages.py).
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from results_pages import COMMON, RESULTS, write_pages

from vae_hyperband.common.config import Places, TrainConfig
from vae_hyperband.common.files import write_text
from vae_hyperband.common.process import EXIT_STOPPED, environment, pick_device, stop_flag
from vae_hyperband.evaluation.evaluate import EvaluateOptions
from vae_hyperband.evaluation.samplers import SamplerConfig
from vae_hyperband.reporting.summaries import print_progress
from vae_hyperband.training.study import Row, run_study, value_of

SEEDS = (0, 1, 2)
#: Candidates for the best images; validation FID decides, the sampler included.
SHARP = {"latent_dim": 64, "epochs": 25}
BEST_SAMPLER = SamplerConfig(components=40)


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**COMMON, **settings)


def name_of(config: TrainConfig) -> str:
    return f"z{config.latent_dim}-b{config.beta:g}-s{config.seed}"


def by_name(configs: list[TrainConfig]) -> dict[str, TrainConfig]:
    return {name_of(config): config for config in configs}


def table_configs() -> dict[str, TrainConfig]:
    return by_name(
        [
            config(latent_dim=latent_dim, beta=beta, seed=seed)
            for latent_dim in (16, 32, 64)
            for beta in (1.0, 0.05)
            for seed in SEEDS
        ]
    )


def sweep_configs() -> dict[str, TrainConfig]:
    """Betas beside those of the table."""
    return by_name([config(beta=beta) for beta in (0.03, 0.1, 0.3, 3.0, 8.0)])


def variant_configs() -> dict[str, TrainConfig]:
    """Each differs in one thing from the table's VAE with latent 32 and seed 0."""
    return {
        "warm-up": config(kl_warmup_epochs=3),
        "cycles": config(kl_cycles=4),
        "free-bits": config(objective="free-bits", free_bits=0.1),
        "capacity": config(objective="capacity", capacity=25, beta=10),
        "beta-tc": config(objective="beta-tc", beta=4),
        "iwae": config(objective="iwae", train_samples=5),
        "vamp": config(prior="vamp"),
        "continuous-bernoulli": config(likelihood="continuous-bernoulli"),
        "discretized-logistic": config(likelihood="discretized-logistic"),
    }


def drawn_configs() -> dict[str, TrainConfig]:
    return by_name(
        [
            config(dataset="drawn", latent_dim=10, beta=beta, seed=seed, epochs=20)
            for beta in (0.3, 1.0, 2.0, 4.0, 8.0, 16.0)
            for seed in SEEDS
        ]
    )


def sharp_configs() -> dict[str, TrainConfig]:
    return {
        "b0.02": config(beta=0.02, **SHARP),
        "b0.02-vamp": config(beta=0.02, prior="vamp", **SHARP),
    }


def bound_configs() -> dict[str, TrainConfig]:
    return {"vamp-40-epochs": config(prior="vamp", epochs=40)}


def bits_configs() -> dict[str, TrainConfig]:
    """The papers' likelihood protocol: pixels black or white, drawn anew at each step."""
    return {"bits": config(binarize="dynamic", epochs=20)}


EVERYTHING = EvaluateOptions()
NO_FLOW = EvaluateOptions(samplers=("prior", "mixture"))
PRIOR_ONLY = EvaluateOptions(samplers=("prior",))
NO_IMAGES = EvaluateOptions(parts=("likelihood", "latents"))
IWAE_5000 = EvaluateOptions(parts=("likelihood",), iwae_samples=5000, iwae_images=1000)
SHARP_OPTIONS = EvaluateOptions(sampler=BEST_SAMPLER)


def best_of(rows: list[Row]) -> str:
    """The run with the lowest FID of any fitted sampler."""
    return min(rows, key=lambda row: best_sampler(row)[1])["name"]


def best_sampler(row: Row) -> tuple[str, float]:
    found = {name: value_of(row, f"fid_{name}") for name in ("mixture", "flow")}
    name = min(found, key=lambda key: found[key])
    return name, found[name]


def reproduce(part: str, places: Places, should_stop: Callable[[], bool]) -> dict | None:
    """One part's rows, on the test split; None if told to stop."""
    if part == "sharp":
        return _sharp(replace(places, run="reproduce-sharp"), should_stop)
    configs, options = {
        "table": (table_configs(), EVERYTHING),
        "sweep": (sweep_configs(), NO_FLOW),
        "variants": (variant_configs(), PRIOR_ONLY),
        "drawn": (drawn_configs(), NO_IMAGES),
        "bound": (bound_configs(), EVERYTHING),
        "bits": (bits_configs(), IWAE_5000),
    }[part]
    places = replace(places, run=f"reproduce-{part}")
    rows = run_study(configs, places, "test", options, should_stop, print_progress)
    return None if rows is None else {"rows": rows}


def _sharp(places: Places, should_stop: Callable[[], bool]) -> dict | None:
    """Model and sampler with the lowest FID on the validation split, judged on the test split."""
    candidates = sharp_configs()
    judged = run_study(candidates, places, "validation", SHARP_OPTIONS, should_stop, print_progress)
    if judged is None:
        return None
    name = best_of(judged)
    row = next(row for row in judged if row["name"] == name)
    chosen = {name: candidates[name]}
    rows = run_study(chosen, places, "test", SHARP_OPTIONS, should_stop, print_progress)
    if rows is None:
        return None
    return {"rows": rows, "validation": judged, "sampler": best_sampler(row)[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["table", "sweep", "variants", "drawn", "bound", "bits", "sharp"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if torch.get_num_threads() > 4:  # the network is small: more threads only wait for each other
        torch.set_num_threads(4)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with stop_flag() as should_stop:
        for part in args.only:
            found = reproduce(part, Places(device=args.device), should_stop)
            if found is None:
                print("stopped and saved; the same command goes on")
                return EXIT_STOPPED
            where = environment(pick_device(args.device))
            results[part] = {**found, "environment": where}
            write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    write_pages(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
