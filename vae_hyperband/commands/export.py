"""The command ``export``: a trained model for other programs, or as a web page."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from vae_hyperband.commands.options import (
    ConfigFile,
    NetworkOption,
    RunArg,
    find_ckpt,
    parse_options,
)
from vae_hyperband.commands.sample import sampler_for, usual_sampler
from vae_hyperband.common.checks import flag, read_json, require, require_number
from vae_hyperband.common.config import Folders
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.files import check_place, make_folder, write_text, write_together
from vae_hyperband.data.splits import Split, as_trained
from vae_hyperband.evaluation.results import Evaluation
from vae_hyperband.evaluation.samplers import (
    LearnedFlow,
    Mixture,
    Prior,
    SamplerConfig,
    SamplerName,
)
from vae_hyperband.export.hub import DATA_NAMES, push, write_shared
from vae_hyperband.export.pretrained import PREFIX
from vae_hyperband.model.checkpoint import Checkpoint, load_ckpt
from vae_hyperband.model.vae import VAE
from vae_hyperband.reporting.report import EVALUATIONS
from vae_hyperband.reporting.summaries import print_progress


@dataclass(frozen=True)
class ExportArgs(ConfigFile):
    """Write a trained model for other programs, or as an interactive web page.

    vae-hyperband export mine --format web --out explorer

    web: one index.html that runs encoder and decoder in any browser, without a network.

    onnx: encoder.onnx and decoder.onnx, verified against PyTorch.

    safetensors: weights, config.json and a model card, as model hubs expect them; load_model
    reads the folder.
    """

    run: RunArg
    format: Literal["web", "onnx", "safetensors"]
    """The format to write."""
    out: Path
    """Folder to write to; created if missing."""
    fitting: tyro.conf.OmitArgPrefixes[SamplerConfig]
    license: str | None = None
    """safetensors: licence of the weights, for the model card; None: mit, of your own images
    other."""
    push: str | None = None
    """safetensors: upload the files to this repository of the Hugging Face hub, ORG/NAME."""
    evaluation: Path | None = None
    """safetensors: file of "evaluate --json" for the card (default: one beside the run's logs)."""
    sampler: SamplerName | None = None
    """web: also sample z from the mixture or flow fitted to the training latents; None: from the
    mixture that pretrained:images comes with."""
    split: Literal["validation", "test"] = "validation"
    """web: split whose images are on the map."""
    num_images: int = 1000
    """web: number of images on the map."""
    network: NetworkOption = None
    folders: tyro.conf.OmitArgPrefixes[Folders] = field(default_factory=Folders)


#: Options of a single format, with their defaults.
ONLY_FOR: dict[str, tuple[str, Any]] = {
    "license": ("safetensors", ExportArgs.license),
    "push": ("safetensors", ExportArgs.push),
    "evaluation": ("safetensors", ExportArgs.evaluation),
    "sampler": ("web", ExportArgs.sampler),
    "split": ("web", ExportArgs.split),
    "num_images": ("web", ExportArgs.num_images),
}


def export(argv: list[str]) -> int:
    args = parse_options(ExportArgs, argv, "vae-hyperband export")
    require_number("num_images", args.num_images, 2)
    for name, (format, usual) in ONLY_FOR.items():
        require(
            args.format == format or getattr(args, name) == usual,
            f"{flag(name)} needs --format {format}: remove it.",
        )
    require(
        args.sampler in ("mixture", "flow")
        or args.run.startswith(PREFIX)
        or args.fitting == SamplerConfig(),
        "The options for fitting a sampler (--components, --flow-...) need --sampler mixture or "
        "flow.",
    )
    checkpoint = load_ckpt(find_ckpt(args.run, args.folders))
    write = {"web": _web, "onnx": _onnx, "safetensors": _safetensors}[args.format]
    for path in write(args, checkpoint):
        print(path)
    return 0


def _safetensors(args: ExportArgs, checkpoint: Checkpoint) -> list[Path]:
    if not args.evaluation:
        evaluation = _saved_evaluation(args.folders.logs_dir, checkpoint)
    else:
        evaluation = Evaluation.from_dict(read_json(args.evaluation), str(args.evaluation))
        if evaluation.checkpoint_digest != checkpoint.digest:
            raise ConfigError(f"{args.evaluation} is not an evaluation of {checkpoint.path}.")
    usual = "mit" if checkpoint.config.dataset in ("fashion-mnist", "drawn") else "other"
    files = write_shared(checkpoint, args.out, args.license or usual, evaluation)
    if args.push:
        print(f"pushed: {push(files, args.push)}")
    return files


def _saved_evaluation(logs_dir: Path, checkpoint: Checkpoint) -> Evaluation | None:
    """The evaluation of these weights beside the run's logs: of the test split, else of another."""
    folder = logs_dir / checkpoint.path.resolve().parent.name
    files = [folder / name for name in EVALUATIONS if (folder / name).is_file()]
    found = []
    for path in files:
        try:
            read = Evaluation.from_dict(read_json(path), str(path))
        except ConfigError as error:  # nobody named the file: it costs its metrics, no more
            print(f"note: {error}", file=sys.stderr, flush=True)
            continue
        if read.checkpoint_digest == checkpoint.digest:
            found.append(read)
    return min(found, key=lambda one: one.split != "test", default=None)


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        "weights": checkpoint.weights_digest,
        "config": json.dumps(checkpoint.config.to_dict()),
    }


def _onnx(args: ExportArgs, checkpoint: Checkpoint) -> list[Path]:
    # here, since it needs packages that the base installation lacks
    from vae_hyperband.export.onnx_export import decoder_graph, encoder_graph, largest_difference

    model = checkpoint.model()
    graphs = {
        name: make(model, _facts(checkpoint)).SerializeToString()
        for name, make in (("encoder.onnx", encoder_graph), ("decoder.onnx", decoder_graph))
    }
    apart = largest_difference(model, graphs["encoder.onnx"], graphs["decoder.onnx"])
    print_progress(f"ONNX Runtime and PyTorch differ by at most {apart:.1e}")
    make_folder(args.out)
    write_together({args.out / name: graph for name, graph in graphs.items()})
    return [args.out / name for name in graphs]


def _web(args: ExportArgs, checkpoint: Checkpoint) -> list[Path]:
    from vae_hyperband.export.explorer import page

    config = checkpoint.config
    model = checkpoint.model()
    split = _first(checkpoint.split(args.split, args.folders), args.num_images)
    split = dataclasses.replace(as_trained(split, config), class_names=checkpoint.class_names)
    out = args.out / "index.html"
    check_place(out)  # fail before the work
    html = page(
        model,
        split,
        f"A VAE of {DATA_NAMES[config.dataset]}",
        _shown(checkpoint, model),
        _fitted(args, checkpoint),
        # shapes on a black ground, as Fashion-MNIST and digits have them; else any image
        ink=model.channels == 1 and config.dataset != "images",
    )
    write_text(out, html)
    return [out]


def _first(split: Split, num: int) -> Split:
    return dataclasses.replace(
        split, images_NCHW=split.images_NCHW[:num], labels_N=split.labels_N[:num]
    )


def _shown(checkpoint: Checkpoint, model: VAE) -> dict[str, str]:
    shown = {
        "latent dimension": str(model.latent_dim),
        "beta": f"{checkpoint.config.beta:g}",
        "epochs": str(checkpoint.epoch),
    }
    if losses := checkpoint.own_losses:
        shown["validation bound"] = f"{losses['bound']:.1f} nats/image"
    return shown | {"weights": checkpoint.weights_digest[:12]}


def _fitted(args: ExportArgs, checkpoint: Checkpoint) -> Mixture | LearnedFlow | None:
    name = args.sampler or usual_sampler(args.run, checkpoint)
    sampler = sampler_for(checkpoint, name, args.fitting, args.folders)
    return None if isinstance(sampler, Prior) else sampler
