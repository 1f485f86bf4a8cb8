"""Claim: the models in the package, in half precision and with their mixture, are at most 4 MB each
and as good as the checkpoints that they were made of.

    vae-hyperband train --run images --preset images
    vae-hyperband train --run bound --preset bound
    python benchmarks/pretrained.py      # 10 minutes on 2 busy cores

Writes vae_hyperband/pretrained/ (models and their card) and benchmarks/pretrained.json. Checkpoint
and packed model are compared on the validation split; the card's figures are of the packed models
on the test split.
"""

import argparse
import hashlib
from pathlib import Path

from alternation import write

from vae_hyperband import EvaluateOptions, evaluate, load_ckpt
from vae_hyperband.commands.train import PRESETS
from vae_hyperband.common.config import TrainConfig, changed_options
from vae_hyperband.evaluation.results import Evaluation
from vae_hyperband.evaluation.samplers import get_sampler
from vae_hyperband.export.pretrained import FOLDER, PREFIX, pack, pretrained_ckpt
from vae_hyperband.reporting.tables import evaluation_text

#: What the images of each are sampled from.
SAMPLERS = {"images": ("mixture",), "bound": ("prior",)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints-dir", type=Path, default=Path("checkpoints"))
    folder = parser.parse_args().checkpoints_dir
    FOLDER.mkdir(exist_ok=True)
    found, cards = {}, []
    for name, samplers in SAMPLERS.items():
        checkpoint = load_ckpt(folder / name / "best.pt")
        assert {**checkpoint.config.to_dict(), "seed": 0} == PRESETS[name].to_dict()
        if "mixture" in samplers:
            get_sampler("mixture", checkpoint, lambda c=checkpoint: c.split("train"))
        file = FOLDER / f"{name}.pt"
        pack(checkpoint.path, file)
        options = EvaluateOptions(parts=("likelihood", "images"), samplers=samplers)
        packed = pretrained_ckpt(name)
        measured = {
            "checkpoint, validation": evaluate(checkpoint, "validation", options=options),
            "packed, validation": evaluate(packed, "validation", options=options),
            "packed, test": evaluate(packed, "test", options=options),
        }
        rows = {what: evaluation.to_dict() for what, evaluation in measured.items()}
        for what in ("packed, validation", "packed, test"):
            rows[what]["checkpoint"] = f"{PREFIX}{name}"  # not a folder of this machine
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        found[name] = {"bytes": file.stat().st_size, "sha256": digest, **rows}
        cards.append(card(name, found[name]))
    (FOLDER / "README.md").write_text(HEAD + "\n".join(cards), encoding="utf-8")
    write("pretrained", found)


HEAD = """# The models in the package

Variational autoencoders of Fashion-MNIST (28x28 grey images of garments; Xiao, Rasul & Vollgraf
2017, MIT licence), trained and measured with this package by `benchmarks/pretrained.py`; MIT
licence. They know garments of this data set and nothing else. `vae-hyperband sample
pretrained:images`, `vae_hyperband.load_pretrained("images")`.
"""


def card(name: str, facts: dict) -> str:
    """The part of the model card about one model."""
    options = " ".join(changed_options(PRESETS[name].to_dict(), TrainConfig().to_dict()))
    text = evaluation_text(Evaluation.from_dict(facts["packed, test"], name))
    return (
        f"\n## {name}\n\n`vae-hyperband train --run {name} --preset {name}`, that is, `{options}`. "
        f"{facts['bytes'] / 1e6:.2f} MB, SHA-256\n`{facts['sha256']}`. On the test split:\n\n"
        f"```\n{text}\n```\n"
    )


if __name__ == "__main__":
    main()
