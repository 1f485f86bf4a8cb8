"""Claim: on CPUs a search whose trials are trained by a packing process ends with the same bytes as
one whose trials compute by themselves, and takes a little longer, so that it is not the default.

    python benchmarks/packed_search.py       # 6 minutes a round on 2 cores

The default search (12 trials of up to 9 epochs, ASHA) with --engine solo, and with --engine packed
--pack-size 1, in turn; wall time from start to exit, ratios within a round. Writes
benchmarks/packed_search.json.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from alternation import write
from search_overhead import measure

ENGINES = {"solo": ["solo"], "packed": ["packed", "--pack-size", "1"]}


def one_round() -> dict[str, dict[str, Any]]:
    """Both searches; they must end alike."""
    measured, left = {}, {}
    for engine, words in ENGINES.items():
        with tempfile.TemporaryDirectory() as folder:
            measured[engine] = measure(Path(folder), "--engine", *words)
            left[engine] = (Path(folder) / "checkpoints/search/trials.json").read_bytes()
    if left["solo"] != left["packed"]:
        raise SystemExit("the two engines gave different results")
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    rounds = [one_round() for _ in range(parser.parse_args().rounds)]
    walls = {engine: [found[engine]["wall_seconds"] for found in rounds] for engine in ENGINES}
    ratios = [packed / solo for solo, packed in zip(*walls.values(), strict=True)]
    write(
        "packed_search",
        {
            "packed_to_solo": {"median": statistics.median(ratios), "all": ratios},
            "wall_seconds": walls,
            "rounds": rounds,
        },
    )


if __name__ == "__main__":
    main()
