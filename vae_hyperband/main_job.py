"""The whole job in one call: data -> search -> train the winner -> evaluate it once -> figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vae_hyperband import search_figures
from vae_hyperband.config import Dataset, Places, RunOptions, TrainConfig
from vae_hyperband.data import SplitName, load_split
from vae_hyperband.download import ensure_data
from vae_hyperband.evaluation import evaluate_once
from vae_hyperband.evaluation_config import PARTS, EvaluateOptions, Part
from vae_hyperband.process import pick_device, stop_flag
from vae_hyperband.report import draw_run, look_at, say, summary_of, table_of, with_error
from vae_hyperband.search import STOPPING, search
from vae_hyperband.search_command import train_winner
from vae_hyperband.search_config import SearchConfig, SearchOptions
from vae_hyperband.training import FitResult
from vae_hyperband.trials import SearchResult, describe


@dataclass(frozen=True, kw_only=True)
class MainJob(Places):
    """The whole job: data, search, train the best configuration, evaluate it, figures.

    vae-hyperband run

    The same command goes on after a stop; what is trained is not trained again.
    """

    run: str = "fashion"
    """Name of the job: <run>-search and <run>-best are its folders."""
    num_trials: int = 8
    """Configurations to try."""
    max_epochs: int = 3
    """Epochs of a trial that is never stopped."""
    epochs: int = 10
    """Epochs of the best configuration's full training."""
    scheduler: Literal["asha", "hyperband", "none"] = "asha"
    """asha stops the worse trials early; hyperband pauses them."""
    dataset: Dataset = "fashion-mnist"
    """fashion-mnist; drawn makes garments of known factors; custom takes those of --data-dir."""
    parts: tuple[Part, ...] = PARTS
    """What the final evaluation looks at; without images the job is a minute or two shorter."""
    seed: int = 0
    """Decides the configurations drawn, and every run's weights, order and noise."""


def run_main_job(job: MainJob) -> bool:
    """Do the whole job; whether it finished (False: stopped on request, the same call goes on)."""
    places: dict[str, Any] = {
        "device": job.device,
        "checkpoints_dir": job.checkpoints_dir,
        "logs_dir": job.logs_dir,
        "data_dir": job.data_dir,
    }
    pick_device(job.device)  # mistakes before the work, not after the search
    TrainConfig(epochs=job.epochs, seed=job.seed)
    if job.dataset == "fashion-mnist":
        _heading("1/5  data: Fashion-MNIST, checked by its digests")
        if job.data_dir is None:
            ensure_data(install=True)
    else:
        _heading(f"1/5  data: {job.dataset}")
    names: tuple[SplitName, ...] = ("train", "validation")  # the test split is for step 4
    for name in names:
        split = load_split(name, job.data_dir, job.dataset)
        print(f"{name:10} {len(split):6,} images, digest {split.digest[:12]}...", flush=True)

    _heading(f"2/5  search: {job.num_trials} configurations, up to {job.max_epochs} epochs each")
    config = SearchConfig(
        num_trials=job.num_trials,
        max_epochs=job.max_epochs,
        scheduler=job.scheduler,
        seed=job.seed,
        dataset=job.dataset,
    )
    with stop_flag(STOPPING) as should_stop:
        found = search(config, SearchOptions(run=f"{job.run}-search", **places), should_stop)
        if found is None:
            return False
        picture = search_figures.best_config(
            found, job.logs_dir / f"{job.run}-search" / "best_config.png"
        )
        print(summary_of(found), flush=True)

        _heading(f"3/5  train the best configuration for {job.epochs} epochs")
        options = RunOptions(run=f"{job.run}-best", **places)
        trained = train_winner(found, job.epochs, options, should_stop)
    best = trained.state.config
    if not trained.finished:
        return False

    _heading("4/5  evaluate it, once, on the test split")
    report = evaluate_once(
        trained.log_folder / "evaluation.json",
        trained.best,
        "test",
        job.data_dir,
        job.device,
        EvaluateOptions(parts=job.parts, samplers=("prior", "mixture")),
        say,
    )
    print(table_of(report), flush=True)

    _heading("5/5  figures")
    for path in (picture, *draw_run(trained, best, job.data_dir)):
        print(path, flush=True)
    _print_summary(found, trained, best, report, picture, job)
    return True


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _print_summary(
    found: SearchResult,
    trained: FitResult,
    best: TrainConfig,
    report: dict[str, Any],
    picture: Path,
    job: MainJob,
) -> None:
    _heading("done")
    rows = {
        "best configuration": describe(best.to_dict()),
        "validation bound": f"{trained.state.best['bound']:.2f} nats/image, beta = 1",
        "test bound": f"{with_error(report['bound'])} nats/image, beta = 1",
        "checkpoint": trained.best,
        "TensorBoard logs": trained.log_folder,
        "picture of the search": picture,
        "configuration file": job.checkpoints_dir / f"{job.run}-search" / "best_config.json",
        "look at them": look_at(job.logs_dir),
    }
    for name, value in rows.items():
        print(f"{name:22} {value}", flush=True)
