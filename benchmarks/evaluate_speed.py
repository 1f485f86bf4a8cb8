"""How long each part of a full evaluation of Fashion-MNIST's test images takes, and how long the
commands take to their first line.

``--against FOLDER``, which has another version of the package, measures both in turns, each in a
process of its own. CPU seconds are compared: other work on the machine changes them less than the
time that passes. The first evaluation of a version has an empty cache, the second what that kept.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = ("--help", "--version", "slurm", "train --help", "search --help", "evaluate --help")


def clock() -> tuple[float, float]:
    """Seconds that passed, and those of this process's CPU."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.time(), used.ru_utime + used.ru_stime


def parts(ckpt: Path, threads: int, names: list[str]) -> dict:
    """One evaluation in this process: wall and CPU seconds of each part, and what was found."""
    import torch

    from vae_hyperband.common.process import keep_freed_memory
    from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate

    torch.set_num_threads(threads)
    keep_freed_memory()
    marks = []

    def say(text: str) -> None:
        if found := re.match(r"\d of \d: (.*)", text):
            marks.append((found[1], clock()))

    with tempfile.TemporaryDirectory() as folder:  # where no sampler is fitted yet
        copied = shutil.copy(ckpt, Path(folder) / "best.pt")
        options = EvaluateOptions(parts=tuple(names))
        evaluation = evaluate(Path(copied), "test", options=options, say=say)
    ends = [mark for _, mark in marks[1:]] + [clock()]
    seconds = {
        name: {"wall": end[0] - begun[0], "cpu": end[1] - begun[1]}
        for (name, begun), end in zip(marks, ends, strict=True)
    }
    total = {kind: sum(part[kind] for part in seconds.values()) for kind in ("wall", "cpu")}
    return {"seconds": seconds | {"total": total}, "evaluation": evaluation.to_dict()}


def in_process(package: Path, *arguments: str, cache: Path, threads: int) -> str:
    environment = os.environ | {
        "PYTHONPATH": str(package),
        "VAE_HYPERBAND_CACHE": str(cache),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, *arguments]
    # there, too: with -m Python looks for packages in the current folder first
    done = subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def start(package: Path, words: str, cache: Path) -> float:
    """CPU seconds of a command that computes nothing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = ("-m", "vae_hyperband.train_vae", *words.split())
    in_process(package, *arguments, cache=cache, threads=1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", type=Path)
    parser.add_argument("--against", type=Path, help="a folder with another vae_hyperband/")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["likelihood", "latents", "images"])
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(parts(args.ckpt, args.threads, args.parts)))
        return
    versions = {"ours": ROOT} | ({"against": args.against.resolve()} if args.against else {})
    starts = {name: {words: [] for words in COMMANDS} for name in versions}
    found = {name: [] for name in versions}
    for _ in range(args.rounds):
        for name, package in versions.items():
            with tempfile.TemporaryDirectory() as folder:
                cache = Path(folder)
                for words in COMMANDS:
                    starts[name][words].append(start(package, words, cache))
                call = (
                    str(Path(__file__).resolve()),
                    str(args.ckpt.resolve()),
                    "--threads",
                    str(args.threads),
                    "--part",
                )
                call += ("--parts", *args.parts)
                pair = [
                    json.loads(in_process(package, *call, cache=cache, threads=args.threads))
                    for _ in range(2)
                ]
                found[name].append({"first": pair[0], "again": pair[1]["seconds"]})
    from alternation import write

    middles = {
        name: {words: statistics.median(values) for words, values in kinds.items()}
        for name, kinds in starts.items()
    }
    write(
        "evaluate_speed",
        {
            "threads": args.threads,
            "rounds": args.rounds,
            "start_cpu_seconds": middles,
            "evaluations": found,
        },
    )


if __name__ == "__main__":
    main()
