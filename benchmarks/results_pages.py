"""Write the tables of README.md and docs/, and their figures, from docs/results.json.

reproduce.py writes results.json and calls this. To write the pages again without training:
python benchmarks/results_pages.py. A table stands between two comments with its name.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.files import write_text
from vae_hyperband.reporting import figures
from vae_hyperband.training.study import Row, grouped, over_seeds

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results.json"
Results = dict[str, Any]

#: What all models of docs/results.json were trained with; the default is 0.008 today.
COMMON = {"learning_rate": 4e-3}
COMMON_OPTION = "--learning-rate 0.004"

#: Measures, the digits they are shown with, and their columns' titles.
BOUND = ("bound", 2, "test bound")
KL = ("KL_divergence", 1, "KL")
ACTIVE = ("active_units", 0, "active units")
LINEAR = ("linear_probe", 3, "linear probe")
FID = "FID (Fashion-MNIST features)"  # never comparable with an FID in Inception's features
RECONSTRUCTIONS = ("fid_reconstructions", 2, f"{FID} of reconstructions")
PRIOR = ("fid_prior", 2, f"{FID}, z from the prior")
MIXTURE = ("fid_mixture", 2, f"{FID}, z from the mixture")
FLOW = ("fid_flow", 2, f"{FID}, z from the flow")
MIG, DCI = ("mig", 3, "MIG"), ("dci", 3, "DCI disentanglement")
FACTOR_VAE = ("factor_vae_score", 3, "FactorVAE score")
Column = tuple[str, int, str]


def models(results: Results) -> str:
    """VAE and beta-VAE by latent size and beta, then the best bound and the best images."""
    columns = [BOUND, LINEAR, RECONSTRUCTIONS, PRIOR, MIXTURE, FLOW]
    groups = grouped(rows_of(results, "table") + rows_of(results, "sweep"))
    return markdown("model", columns, lines_of(groups, columns) + best_lines(results, columns))


def highlights(results: Results) -> str:
    """The README's four rows: VAE, beta-VAE, best bound, best images."""
    columns = [BOUND, LINEAR, PRIOR, MIXTURE]
    table = [row for row in rows_of(results, "table") if row["config"]["latent_dim"] == 32]
    lines = lines_of(grouped(table), columns) + best_lines(results, columns)
    return markdown("model", columns, lines)


def lines_of(groups: list[list[Row]], columns: list[Column]) -> list[list[str]]:
    """One line per group of seeds, named by beta and latent size."""
    lines = []
    for group in groups:
        config = group[0]["config"]
        kind = "VAE" if config["beta"] == 1 else f"beta-VAE, beta {config['beta']:g}"
        lines.append([f"{kind}, latent {config['latent_dim']}", *cells(group, columns)])
    return lines


def best_lines(results: Results, columns: list[Column]) -> list[list[str]]:
    """The models with the best bound and the best images, named by their options."""
    return [
        [f"{what}: `{options_of(row)}`", *cells([row], columns)]
        for part, what in (("bound", "best bound"), ("sharp", "best images"))
        for row in rows_of(results, part)
    ]


def variants(results: Results) -> str:
    """One thing changed at a time, beside the model that is changed."""
    columns = [BOUND, KL, ACTIVE, LINEAR, RECONSTRUCTIONS, PRIOR]
    default = [row for row in rows_of(results, "table") if row["name"] == "z32-b1-s0"]
    return markdown(
        f"`train {COMMON_OPTION}` with",
        columns,
        [
            [f"`{options_of(row)}`" if options_of(row) else "nothing else", *cells([row], columns)]
            for row in default + rows_of(results, "variants")
        ],
    )


def bits(results: Results) -> str:
    """Binarised images: the bound and IWAE-5000, with standard errors over images."""
    lines = []
    for row in rows_of(results, "bits"):
        pairs = [row["bound"], row["iwae"]]
        numbers = [f"{pair['mean']:.2f} +- {pair['standard_error']:.2f}" for pair in pairs]
        lines.append([f"`{options_of(row)}`", *numbers])
    return markdown(
        f"`train {COMMON_OPTION}` with", [BOUND, ("iwae", 2, "test IWAE-5000 bound")], lines
    )


def disentanglement(results: Results) -> str:
    """Synthetic garments: how well the latent dimensions separate their factors, by beta."""
    columns = [MIG, DCI, FACTOR_VAE, ACTIVE, BOUND]
    groups = grouped(rows_of(results, "drawn"))
    return markdown(
        "beta",
        columns,
        [[f"{group[0]['config']['beta']:g}", *cells(group, columns)] for group in groups],
    )


#: The pages, and the tables on each.
PAGES: dict[str, dict[str, Callable[[Results], str]]] = {
    "README.md": {"highlights": highlights},
    "docs/results.md": {"models": models},
    "docs/objectives.md": {"variants": variants},
    "docs/evaluation.md": {"bits": bits, "disentanglement": disentanglement},
}
#: Single numbers of docs/results.md between <!--name--> and <!--/-->: part, measure, digits.
NUMBERS = {"raw_probe": ("sharp", "raw_linear_probe", 3), "real_fid": ("sharp", "fid_real", 2)}


def rows_of(results: Results, part: str) -> list[Row]:
    """The part's rows, if it has been run."""
    return results[part]["rows"] if part in results else []


def betas(results: Results) -> list[Row]:
    """All models of latent size 32 that differ only in beta and seed."""
    table = [row for row in rows_of(results, "table") if row["config"]["latent_dim"] == 32]
    return table + rows_of(results, "sweep")


PICTURES: dict[str, Callable[[Results], list[Row]]] = {
    "docs/rate_distortion.png": betas,
    "docs/disentanglement.png": lambda results: rows_of(results, "drawn"),
}


def options_of(row: Row) -> str:
    """The settings that differ from the default and from :data:`COMMON`, as options."""
    default = TrainConfig().to_dict() | COMMON
    changed = {name: value for name, value in row["config"].items() if value != default[name]}
    return " ".join(
        f"--{name.replace('_', '-')} {value:g}"
        if isinstance(value, float)
        else f"--{name.replace('_', '-')} {value}"
        for name, value in changed.items()
    )


def cells(group: list[Row], columns: list[Column]) -> list[str]:
    """Means over seeds, +- half of the 95% interval where there are several."""
    found = []
    for measure, digits, _ in columns:
        value = over_seeds(group, measure) if group else {"mean": math.nan}  # not measured yet
        cell = "" if math.isnan(value["mean"]) else f"{value['mean']:.{digits}f}"
        several = cell and value["n"] > 1
        found.append(cell + (f" +- {value['half_interval']:.{digits}f}" if several else ""))
    return found


def markdown(first: str, columns: list[Column], lines: list[list[str]]) -> str:
    head = [first, *(title for *_, title in columns)]
    table = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def filled(page: str, text: str, results: Results) -> str:
    """The page's text with its tables as the results have them."""
    for name, table in PAGES[page].items():
        start, end = f"<!--{name}-->\n", f"<!--/{name}-->"
        before, rest = text.split(start)
        text = before + start + table(results) + "\n" + end + rest.split(end)[1]
    for name, (part, measure, digits) in NUMBERS.items() if page == "docs/results.md" else ():
        [number] = cells(rows_of(results, part), [(measure, digits, "")])
        before, rest = text.split(f"<!--{name}-->")
        text = f"{before}<!--{name}-->{number}<!--/-->{rest.split('<!--/-->', 1)[1]}"
    return text


def write_pages(results: Results) -> None:
    for page in PAGES:
        path = ROOT / page
        write_text(path, filled(page, path.read_text(), results))
    for picture, rows_in in PICTURES.items():
        if rows := rows_in(results):
            print(figures.rate_distortion(rows, ROOT / picture))


if __name__ == "__main__":
    write_pages(json.loads(RESULTS.read_text()))
    sys.exit()
